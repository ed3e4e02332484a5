"""Operator search that looks at things twice: demonstrations of long and of short thinking, and how often a thought looks again.

Owns what differs from recipes/tiny_thinking, whose puzzles and verifier are used as they are. Standard library only.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from recipes.tiny_thinking import task as search
from recipes.tiny_thinking.task import CHOICES, GIVE_UP_MARK, Completion, Puzzle

AGAIN = "?"
"""With this begins a line that works out the one before it once more. Without a mark a model of this size loses count and loops."""

DOUBTS = (0.0, 0.5, 1.0)
"""Probability with which a thought looks at a failed attempt again; drawn for each thought, with `DOUBT_WEIGHTS`."""

DOUBT_WEIGHTS = (0.15, 0.35, 0.5)


def long_cot_sft(*, seed: int, count: int) -> Iterator[dict[str, Any]]:
    """`count` searches to the end on training puzzles, most of which look at things twice."""
    rng = random.Random(seed)
    for _ in range(count):
        puzzle = rng.choice(search.split()[1])
        yield _conversation(puzzle, demonstration(puzzle, rng, doubt=rng.choices(DOUBTS, DOUBT_WEIGHTS)[0]))


def short_cot_sft(*, seed: int, count: int, give_up: float = 0.5) -> Iterator[dict[str, Any]]:
    """`count` searches on training puzzles that look at nothing twice and give up with probability `give_up` after a failed attempt."""
    rng = random.Random(seed)
    for _ in range(count):
        puzzle = rng.choice(search.split()[1])
        yield _conversation(puzzle, demonstration(puzzle, rng, give_up=give_up))


def demonstration(puzzle: Puzzle, rng: random.Random, *, doubt: float = 0.0, give_up: float = 0.0) -> str:
    """A search through `CHOICES` in their order, one attempt a line, and its answer.

    Args:
        doubt: above 0, a failed attempt is looked at again with this probability, and the hit one to three times.
        give_up: probability of ending after a failed attempt with `?` and that attempt as the answer.
    """
    lines: list[str] = []
    for choice in CHOICES:
        line, hit = search.attempt(puzzle.digits, choice, puzzle.target), choice in puzzle.solutions
        looks = 0 if not doubt else rng.randint(1, 3) if hit else int(rng.random() < doubt)
        lines += [line, *[AGAIN + line] * looks]
        if hit or rng.random() < give_up:
            mark = "" if hit else GIVE_UP_MARK
            return "<think>" + "\n".join(lines) + f"{mark}</think>{search.expression(puzzle.digits, choice)}"
    raise ValueError(f"{puzzle.question} has no solution")


def second_looks(prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float]:
    """Lines of thinking that look at an attempt again."""
    thoughts = [(search.parts(completion)[0] or "").split("\n") for completion in completions]
    return [float(sum(line.startswith(AGAIN) for line in lines)) for lines in thoughts]


def _conversation(puzzle: Puzzle, assistant: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": puzzle.question}, {"role": "assistant", "content": assistant}]}
