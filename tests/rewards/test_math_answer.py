"""The `math` reward over answers in many written forms, and answers meant to break it."""

from __future__ import annotations

import time

import pytest
from math_pairs import HOSTILE, PAIRS

from rewards.math_answer import _verdict, last_boxed, math_answer
from rewards.math_text import costly


def said(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


@pytest.mark.parametrize(("gold", "boxed", "equal"), PAIRS)
def test_boxed(gold: str, boxed: str, equal: bool) -> None:
    assert math_answer([[]], said(rf"<think>so</think>It is \boxed{{{boxed}}}"), answer=[gold]) == [float(equal)]


WHOLE = [
    (r"<think>\boxed{5}</think>\boxed{6}", "5", 0.0),
    (r"<think>\boxed{6}</think>\boxed{5}", "5", 1.0),
    (r"<think>\boxed{5}</think>", "5", 0.0),
    (r"<think>\boxed{5}", "5", 0.0),
    (r"\boxed{4} or rather \boxed{5}", "5", 1.0),
    (r"\boxed{5} or rather \boxed{4}", "5", 0.0),
    ("The answer is 5.", "5", 1.0),
    ("The answer is $x = 5$", "5", 1.0),
    ("I give up", "5", 0.0),
    (r"\boxed{5", "5", 0.0),  # cut off in the middle of its answer
    ("", "5", 0.0),
    (r"\boxed{5}", None, None),
    (r"\boxed{5}", "", None),
    (r"\boxed{5}", 5, 1.0),
    (r"\boxed{0.5}", 0.5, 1.0),
]


@pytest.mark.parametrize(("text", "gold", "score"), WHOLE)
def test_whole_responses(text: str, gold: object, score: float | None) -> None:
    assert math_answer([[]], said(text), answer=[gold]) == [score]


def test_require_boxed() -> None:
    assert math_answer([[]] * 2, said("The answer is 5", r"\boxed{5}"), answer=["5", "5"], require_boxed=True) == [0.0, 1.0]


UNBOXED = [
    "1 " * 100_000,
    "\\boxed{" * 20_000,
    "\\frac{" * 2_000,
    "The answer is $" + "(" * 200 + "1" + ")" * 200 + "$",
    "The answer is $9^{9^{9^9}}$",
]


@pytest.mark.parametrize(("gold", "boxed", "equal"), HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_are_judged_in_time(gold: str, boxed: str, equal: bool) -> None:
    assert _judged_in_time(rf"\boxed{{{boxed}}}", gold) == float(equal)


@pytest.mark.parametrize("text", UNBOXED, ids=range(len(UNBOXED)))
def test_hostile_texts_are_wrong_in_time(text: str) -> None:
    assert _judged_in_time(text, "7") == 0.0


def _judged_in_time(text: str, gold: str) -> float | None:
    started = time.process_time()
    [score] = math_answer([[]], said(text), answer=[gold], parse_seconds=1, verify_seconds=1)
    assert time.process_time() - started < 4
    return score


def test_a_verdict_is_kept() -> None:
    text = said(r"\boxed{\frac{17}{34} + x^2}")
    math_answer([[]], text, answer=["x^2 + 1/2"])
    before = _verdict.cache_info().hits
    assert math_answer([[]] * 3, text * 3, answer=["x^2 + 1/2"] * 3) == [1.0] * 3
    assert _verdict.cache_info().hits == before + 3


def test_the_table() -> None:
    assert len({(gold, boxed) for gold, boxed, _ in PAIRS}) == len(PAIRS) >= 150


@pytest.mark.parametrize(
    ("text", "inside"),
    [(r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{1}\boxed{2} x", "2"), ("no", None), (r"\boxed{{}", None), (r"\boxed{}", "")],
)
def test_last_boxed(text: str, inside: str | None) -> None:
    assert last_boxed(text) == inside


@pytest.mark.parametrize(
    "answer",
    ["2^{100}", "x^{2}y^{2}z^{2}", "e^{x^2}", "2^{2^{3}}", "2024^{2023}", "(x+1)^{10}", "100!", r"\frac{x^{n}}{n!}", r"\binom{2n}{n}"],
)
def test_ordinary_answers_are_not_refused(answer: str) -> None:
    assert not costly(answer)
