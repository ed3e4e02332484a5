"""Operator search: the puzzles of the demo, its demonstrations and drills, its verifier and its metrics.

Owns everything about the task, from the standard library alone; the recipe names these functions. Knows nothing of tokens,
models or training.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

OPERATORS = "+-*"
CHOICES = tuple(first + second for first, second in product(OPERATORS, repeat=2))
"""The nine operator pairs, in the cyclic order of a search."""

HELD_OUT = 256
"""Puzzles kept out of every training set."""

GIVE_UP_MARK = "?"

_ATTEMPT = re.compile(r"(\d)([+*-])(\d)=(\d)([+*-])(\d)=(\d)-(\d)=(\d)")
_ANSWER = re.compile(r"(\d)([+*-])(\d)([+*-])(\d)")


@dataclass(frozen=True, slots=True)
class Puzzle:
    """Digits d1 d2 d3 (1 to 9) and a target: find operators whose left-to-right value, modulo 10, is the target.

    Attributes:
        digits: three characters.
        target: 0 to 9.
        solutions: the operator pairs that solve it, at least one, in the order of `CHOICES`.
    """

    digits: str
    target: int
    solutions: tuple[str, ...]

    @property
    def question(self) -> str:
        return f"{self.digits}={self.target}?"


def apply(left: int, operator: str, right: int) -> int:
    """`left operator right` modulo 10."""
    return {"+": left + right, "-": left - right, "*": left * right}[operator] % 10


def value(digits: str, choice: str) -> int:
    """The left-to-right value, modulo 10, of `digits` joined by the operators of `choice`."""
    return apply(apply(int(digits[0]), choice[0], int(digits[1])), choice[1], int(digits[2]))


def expression(digits: str, choice: str) -> str:
    """`616` and `*+` -> `6*1+6`."""
    return f"{digits[0]}{choice[0]}{digits[1]}{choice[1]}{digits[2]}"


def attempt(digits: str, choice: str, target: int) -> str:
    """One line of a search, every step modulo 10: the two operations, then how far the value is from the target.

    `616`, `+-`, 9 -> `6+1=7-6=1-9=2`; a line that ends in `=0` is a hit.
    """
    first, final = apply(int(digits[0]), choice[0], int(digits[1])), value(digits, choice)
    return f"{digits[0]}{choice[0]}{digits[1]}={first}{choice[1]}{digits[2]}={final}-{target}={apply(final, '-', target)}"


@lru_cache(maxsize=1)
def split() -> tuple[tuple[Puzzle, ...], tuple[Puzzle, ...]]:
    """All solvable puzzles as (held out, training), split by a hash of the question: the same for every run and seed."""
    puzzles = []
    for digits in map("".join, product("123456789", repeat=3)):
        values = [value(digits, choice) for choice in CHOICES]
        for target in sorted(set(values)):
            solutions = tuple(choice for choice, reached in zip(CHOICES, values, strict=True) if reached == target)
            puzzles.append(Puzzle(digits, target, solutions))
    puzzles.sort(key=lambda puzzle: hashlib.sha256(puzzle.question.encode()).digest())
    return tuple(puzzles[:HELD_OUT]), tuple(puzzles[HELD_OUT:])


# --- problems ---------------------------------------------------------------------------------------------------------------


def train_problems(*, seed: int, count: int | None = None) -> Iterator[dict[str, Any]]:
    """Training puzzles in the random order of `seed`; all of them, or the first `count`."""
    puzzles = list(split()[1])
    random.Random(seed).shuffle(puzzles)
    yield from map(_problem, puzzles[:count])


def held_out_problems(*, seed: int = 0, count: int = HELD_OUT) -> Iterator[dict[str, Any]]:
    """The first `count` held-out puzzles, whatever the `seed`.

    Raises:
        ValueError: `count` is more than are held out.
    """
    if count > HELD_OUT:
        raise ValueError(f"count is {count}, but {HELD_OUT} puzzles are held out")
    yield from map(_problem, split()[0][:count])


def _problem(puzzle: Puzzle) -> dict[str, Any]:
    share = len(puzzle.solutions) / len(CHOICES)
    return {
        "id": puzzle.question,
        "messages": [{"role": "user", "content": puzzle.question}],
        "digits": puzzle.digits,
        "target": puzzle.target,
        "difficulty": 1.0 - share,
        "solving_share": share,
        "num_digits": len(puzzle.digits),
    }


# --- supervised data --------------------------------------------------------------------------------------------------------


def joint_sft(*, seed: int, count: int, direct: float = 0.1, arithmetic: float = 0.45, attempts: float = 0.45) -> Iterator[dict[str, Any]]:
    """`count` conversations, each direct, arithmetic or attempts with the given weights.

    direct: a training puzzle answered at once. arithmetic: a worksheet of eight single steps. attempts: a worksheet of four
    attempt lines, of which half are made to hit their target.
    """
    rng = random.Random(seed)
    makers = {"direct": _direct, "arithmetic": _arithmetic, "attempts": _attempts}
    for source in rng.choices(list(makers), (direct, arithmetic, attempts), k=count):
        yield _conversation(*makers[source](rng), source)


def long_cot_sft(*, seed: int, count: int, give_up: float = 0.7, persistent: float = 0.1) -> Iterator[dict[str, Any]]:
    """`count` demonstrations of a search on training puzzles.

    A share `persistent` of them searches to the end; the others give up with probability `give_up` after each failed attempt.
    """
    rng = random.Random(seed)
    puzzles = split()[1]
    for _ in range(count):
        puzzle = rng.choice(puzzles)
        patience = 0.0 if rng.random() < persistent else give_up
        yield _conversation(puzzle.question, demonstration(puzzle, patience, rng), "long_cot")


def demonstration(puzzle: Puzzle, give_up: float, rng: random.Random) -> str:
    """A search through `CHOICES` in cyclic order from a random start, one attempt a line, and its answer.

    It ends at the first hit, which it claims; or, with probability `give_up` after each failed attempt, with `?` and a guess:
    it settles for its last attempt.
    """
    start = rng.randrange(len(CHOICES))
    lines: list[str] = []
    for choice in CHOICES[start:] + CHOICES[:start]:
        lines.append(attempt(puzzle.digits, choice, puzzle.target))
        hit = choice in puzzle.solutions
        if hit or rng.random() < give_up:
            mark = "" if hit else GIVE_UP_MARK
            return "<think>" + "\n".join(lines) + f"{mark}</think>{expression(puzzle.digits, choice)}"
    raise ValueError(f"{puzzle.question} has no solution")


def _direct(rng: random.Random) -> tuple[str, str]:
    puzzle = rng.choice(split()[1])
    return puzzle.question, expression(puzzle.digits, rng.choice(puzzle.solutions))


def _arithmetic(rng: random.Random) -> tuple[str, str]:
    steps = [(rng.randrange(10), rng.choice(OPERATORS), rng.randrange(10)) for _ in range(8)]
    asked = "\n".join(f"{left}{operator}{right}" for left, operator, right in steps)
    return asked, "\n".join(f"{left}{operator}{right}={apply(left, operator, right)}" for left, operator, right in steps)


def _attempts(rng: random.Random) -> tuple[str, str]:
    held_out = {(puzzle.digits, puzzle.target) for puzzle in split()[0]}
    lines: list[tuple[str, str, int]] = []
    while len(lines) < 4:
        digits, choice = "".join(rng.choices("123456789", k=3)), rng.choice(CHOICES)
        target = value(digits, choice) if rng.random() < 0.5 else rng.randrange(10)
        if (digits, target) not in held_out:
            lines.append((digits, choice, target))
    asked = "\n".join(f"{expression(digits, choice)}={target}" for digits, choice, target in lines)
    return asked, "\n".join(attempt(*line) for line in lines)


def _conversation(user: str, assistant: str, source: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}], "source": source}


# --- verifier and metrics, in TRL's reward signature ------------------------------------------------------------------------

Completion = str | Sequence[Mapping[str, Any]]
"""A completion as TRL passes it: text, or a list of messages."""


def operator_search(
    prompts: Sequence[Any], completions: Sequence[Completion], digits: Sequence[str], target: Sequence[int], **columns: Any
) -> list[float]:
    """1 if the final answer uses the digits in order and has the target as its value, else 0. What was thought is ignored."""
    return [float(_solves(parts(c)[1], d, t)) for c, d, t in zip(completions, digits, target, strict=True)]


def gave_up(prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float]:
    """1 if the thinking ends in the mark of giving up."""
    return [float((parts(c)[0] or "").endswith(GIVE_UP_MARK)) for c in completions]


def wrong_claim(
    prompts: Sequence[Any], completions: Sequence[Completion], digits: Sequence[str], target: Sequence[int], **columns: Any
) -> list[float]:
    """1 if a completion thinks, does not give up, and answers wrongly all the same: it claims a solution that is none."""
    scores = []
    for completion, d, t in zip(completions, digits, target, strict=True):
        thought, answer = parts(completion)
        claims = thought is not None and answer is not None and not thought.endswith(GIVE_UP_MARK)
        scores.append(float(claims and not _solves(answer, d, t)))
    return scores


def flawed_thinking(
    prompts: Sequence[Any], completions: Sequence[Completion], digits: Sequence[str], target: Sequence[int], **columns: Any
) -> list[float]:
    """0 if a completion thinks as the demonstrations do, else 1.

    That is: every line is a correct attempt at this puzzle, none but the last is a hit, it gives up exactly if the last is no
    hit, and it answers with its last attempt. Neither the order of attempts nor their number matters.
    """
    return [float(not _sound(*parts(c), str(d), int(t))) for c, d, t in zip(completions, digits, target, strict=True)]


def _sound(thought: str | None, answer: str | None, digits: str, target: int) -> bool:
    if thought is None or answer is None:
        return False
    gives_up = thought.endswith(GIVE_UP_MARK)
    matches = [_ATTEMPT.fullmatch(line) for line in thought.removesuffix(GIVE_UP_MARK).split("\n")]
    tried = [match[2] + match[5] for match in matches if match]
    hits = [value(digits, choice) == target for choice in tried]
    return (
        all(match and match[0] == attempt(digits, match[2] + match[5], target) for match in matches)
        and not any(hits[:-1])
        and hits[-1] != gives_up
        and answer == expression(digits, tried[-1])
    )


def parts(completion: Completion) -> tuple[str | None, str | None]:
    """(thinking, answer): thinking is None without a think block, answer is None if the block is never closed."""
    text = completion if isinstance(completion, str) else "".join(str(message["content"]) for message in completion)
    thought, closed, answer = text.rpartition("</think>")
    if closed:
        return thought.removeprefix("<think>").strip(), answer.strip()
    return (text, None) if "<think>" in text else (None, text.strip())


def _solves(answer: str | None, digits: str, target: int) -> bool:
    match = _ANSWER.fullmatch(answer or "")
    return match is not None and match[1] + match[3] + match[5] == str(digits) and value(str(digits), match[2] + match[4]) == int(target)
