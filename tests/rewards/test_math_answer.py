"""The `math` reward over answers in many written forms, and answers meant to break it."""

from __future__ import annotations

import time

import pytest

from rewards.math_answer import last_boxed, math_answer

BOXED = [
    # gold, what stands in the box, equal
    ("5", "5", True),
    ("5", " 5 ", True),
    ("5", "5.", True),
    ("5", "6", False),
    ("5", "x=5", True),
    ("x=5", "5", True),
    ("-3", "-3", True),
    ("-3", "3", False),
    ("a^2-4", "(a+2)(a-2)", True),
    ("x^2+2x+1", "(x+1)^2", True),
    ("x^2+2x+1", "(x+1)^3", False),
    (r"\frac{1}{3}", "1/3", True),
    ("1/3", r"\frac13", True),
    ("1/3", r"\dfrac{2}{6}", True),
    ("1/3", "0.3333", False),
    ("50%", "0.5", True),
    ("0.5", r"50\%", True),
    ("0.5", r"\frac{1}{2}", True),
    ("(1,2)", "(1, 2)", True),
    ("(1,2)", "[1,2]", False),
    ("(1,2)", "(2,1)", False),
    (r"\{1,2\}", r"\{2,1\}", True),
    ("1,2", "2,1", True),
    ("3", "3, 4", False),
    (r"\frac{\pi}{2}", r"\pi/2", True),
    ("1,000", "1000", True),
    ("1000", "1,000", True),
    (r"\sqrt{8}", r"2\sqrt{2}", True),
    ("2^{10}", "1024", True),
    ("42", r"42\text{ cm}", True),
    ("90", r"90^\circ", True),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", True),
    (r"\text{Paris}", r"\text{Paris}", True),
    ("$5$", "5", True),
    (r"\boxed{5}", "5", True),
    (r"\frac{a}{b+\frac{1}{c}}", r"\frac{ac}{bc+1}", True),
    ("0", "", False),
    ("0", r"\frac{1}{0}", False),
    ("0", "\\", False),
    ("0", "}{", False),
    ("7", r"\infty", False),
    ("0", "()" * 40, False),
    ("1", r"\int_0^1 x^{x} dx", False),
]


def said(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


@pytest.mark.parametrize(("gold", "boxed", "equal"), BOXED)
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


HOSTILE = [
    r"\boxed{9^{9^{9^9}}}",
    r"\boxed{10^{100000000}}",
    r"\boxed{999999999!}",
    r"\boxed{\binom{1000000}{500000}}",
    r"\boxed{(x+1)^{1000000}}",
    r"\boxed{" + "(" * 200 + "1" + ")" * 200 + "}",
    r"\boxed{" + "(" * 2000 + "1" + ")" * 2000 + "}",
    r"\boxed{" + "1" * 100_000 + "}",
    "1 " * 100_000,
    "\\boxed{" * 20_000,
    "\\frac{" * 2_000,
    "\x00\ud800\N{SNOWMAN}",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_are_wrong_in_time(text: str) -> None:
    started = time.monotonic()
    assert math_answer([[]], said(text), answer=["7"], parse_seconds=1, verify_seconds=1) == [0.0]
    assert time.monotonic() - started < 4


@pytest.mark.parametrize(
    ("text", "inside"),
    [(r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{1}\boxed{2} x", "2"), ("no", None), (r"\boxed{{}", None), (r"\boxed{}", "")],
)
def test_last_boxed(text: str, inside: str | None) -> None:
    assert last_boxed(text) == inside
