"""The `choice` reward over the usual ways to state a choice."""

from __future__ import annotations

import pytest

from rewards.choice import choice

CITIES = ["Rome", "Paris", "Berlin", "Madrid"]

LETTERS = [
    # response, gold, score
    ("B", "B", 1.0),
    ("b", "B", 1.0),
    ("(B)", "B", 1.0),
    ("B.", "B", 1.0),
    ("B)", "B", 1.0),
    ("[B]", "B", 1.0),
    ("**B**", "B", 1.0),
    ("Ｂ", "B", 1.0),
    ("$B$", "B", 1.0),
    ("A", "B", 0.0),
    (r"\boxed{B}", "B", 1.0),
    (r"So \boxed{\text{B}}.", "B", 1.0),
    (r"\boxed{(B)}", "B", 1.0),
    (r"\boxed{A} no, \boxed{B}", "B", 1.0),
    (r"\boxed{B} no, \boxed{A}", "B", 0.0),
    (r"The answer is B. \boxed{A}", "B", 0.0),
    (r"\boxed{A or B}", "B", 0.0),
    (r"\boxed{}", "B", 0.0),
    ("The answer is B", "B", 1.0),
    ("The answer is (B).", "B", 1.0),
    ("the correct answer is: **B**", "B", 1.0),
    ("The correct option is B because of gravity.", "B", 1.0),
    ("Answer: B", "B", 1.0),
    ("Final answer: option B", "B", 1.0),
    ("I choose B.", "B", 1.0),
    ("Option B", "B", 1.0),
    ("Long reasoning about A.\n\nB", "B", 1.0),
    ("The answer is A. Wait, the answer is B.", "B", 1.0),
    ("The answer is B. Wait, the answer is A.", "B", 0.0),
    ("The answer is A or B", "B", 0.0),
    ("The answer is B or A", "B", 0.0),
    ("The answer is a matter of taste", "A", 0.0),
    ("A good question, but I do not know", "A", 0.0),
    ("A B C D", "B", 0.0),
    ("Z", "B", 0.0),
    ("", "B", 0.0),
    ("<think>B</think>A", "B", 0.0),
    ("<think>A</think>B", "B", 1.0),
    ("<think>B", "B", 0.0),
    ("B", "(B)", 1.0),
    ("B", "b", 1.0),
    ("B", 1, 1.0),
    ("A", 0, 1.0),
    ("B", None, None),
    ("B", "", None),
    ("B", "?", None),
]

SEVERAL = [
    ("A, C", "AC", 1.0),
    ("C, A", "A,C", 1.0),
    ("AC", ["A", "C"], 1.0),
    ("A and C", "AC", 1.0),
    ("A, B, and C", "ABC", 1.0),
    ("(A), (C)", "AC", 1.0),
    ("A C", "AC", 1.0),
    (r"\boxed{A, C}", "AC", 1.0),
    (r"\boxed{AC}", "CA", 1.0),
    ("The answers are A and C.", "AC", 1.0),
    ("A", "AC", 0.0),
    ("A, B, C", "AC", 0.0),
    ("The answer is A, B", "A", 0.0),
    ("A, C", "A", 0.0),
]

TEXTS = [
    ("Paris", "B", 1.0),
    ("paris.", "B", 1.0),
    ("The answer is Paris.", "B", 1.0),
    (r"\boxed{\text{Paris}}", "B", 1.0),
    ("B. Paris", "B", 1.0),
    ("(B) Paris", "B", 1.0),
    ("B: Paris", "B", 1.0),
    ("The answer is B) Paris", "B", 1.0),
    ("B. Rome", "B", 0.0),  # contradicts itself
    ("Rome", "B", 0.0),
    ("B", "Paris", 1.0),
    ("Paris", "Paris", 1.0),
    ("B", 1, 1.0),
    ("E", "B", 0.0),
    ("B", "E", None),
    ("B", 7, None),
]


def said(text: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}]]


@pytest.mark.parametrize(("text", "gold", "score"), [*LETTERS, *SEVERAL])
def test_letters(text: str, gold: object, score: float | None) -> None:
    assert choice([[]], said(text), answer=[gold]) == [score]


@pytest.mark.parametrize(("text", "gold", "score"), TEXTS)
@pytest.mark.parametrize("options", [CITIES, dict(zip("ABCD", CITIES, strict=True))], ids=["list", "mapping"])
def test_options(text: str, gold: object, score: float | None, options: object) -> None:
    assert choice([[]], said(text), answer=[gold], options=[options]) == [score]


def test_options_of_some_problems_only() -> None:
    both = said("Paris") + said("B")
    assert choice([[]] * 2, both, answer=["B", "B"], options=[CITIES, None]) == [1.0, 1.0]


def test_letters_that_can_be_options() -> None:
    assert choice([[]], said("E"), answer=["E"], letters=4) == [None]
    assert choice([[]], said("E"), answer=["E"], letters=5) == [1.0]


def test_long_responses_are_quick() -> None:
    assert choice([[]], said("A, " * 300_000 + "\nThe answer is B"), answer=["B"]) == [1.0]
    assert choice([[]], said("(" * 300_000), answer=["B"]) == [0.0]
    assert choice([[]], said(r"\boxed{" * 100_000), answer=["B"]) == [0.0]
