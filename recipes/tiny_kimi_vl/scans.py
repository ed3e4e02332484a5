"""Scan puzzles on pictures: count the red ones in a grid of shapes, or add up the bars of a chart, row by row.

Owns these puzzles, their demonstrations and what a sound scan is; drawing is `drawing.py`'s.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from drawing import COLOURS, SHAPES, Cell, draw_bars, draw_shapes
from PIL import Image

GIVE_UP_MARK = "?"
COLUMNS = 3
"""Shapes in a row of a grid."""

MIN_ROWS, MAX_ROWS = 2, 4


@dataclass(frozen=True, slots=True)
class Scan:
    """A picture whose rows are looked at in turn, and what each of them adds to the total.

    Attributes:
        task: `count` or `chart`.
        question: what the user asks beside the picture.
        amounts: what each row adds: its red shapes, or the length of its bar.
        grid: the shapes of a `count`; empty for a chart.
    """

    task: str
    question: str
    amounts: tuple[int, ...]
    grid: tuple[tuple[Cell, ...], ...] = ()

    @property
    def total(self) -> int:
        """Modulo 10, as all arithmetic here; 0 to 9."""
        return sum(self.amounts) % 10

    @property
    def lines(self) -> tuple[str, ...]:
        """Every row's line, `total so far + what the row adds = new total`: `0+2=2`, `2+1=3`."""
        totals = [total % 10 for total in accumulate(self.amounts, initial=0)]
        return tuple(f"{before}+{amount}={after}" for (before, after), amount in zip(pairwise(totals), self.amounts, strict=True))

    @property
    def held_out(self) -> bool:
        """One in eight of all pictures, chosen by a hash of what they show: the same for every run and seed."""
        return hashlib.sha256(repr(self.grid or self.amounts).encode()).digest()[0] < 32

    def draw(self, rng: random.Random) -> Image.Image:
        return draw_shapes(self.grid, rng) if self.grid else draw_bars(self.amounts, rng)


def random_grid(rng: random.Random, num_rows: int) -> tuple[tuple[Cell, ...], ...]:
    """Rows of three shapes."""
    return tuple(tuple((rng.choice(list(COLOURS)), rng.choice(SHAPES)) for _ in range(COLUMNS)) for _ in range(num_rows))


def random_count(rng: random.Random, num_rows: int) -> Scan:
    """A grid of `num_rows` rows whose red shapes are to be counted."""
    grid = random_grid(rng, num_rows)
    amounts = tuple(sum(colour == "red" for colour, _ in row) for row in grid)
    return Scan("count", "red?", amounts, grid)


def random_chart(rng: random.Random, num_rows: int) -> Scan:
    """A chart of `num_rows` bars to add up."""
    lengths = tuple(rng.randint(1, 9) for _ in range(num_rows))
    return Scan("chart", "total?", lengths)


def random_scan(rng: random.Random, task: str, *, held_out: bool) -> Scan:
    """A `count` or `chart` of two to four rows from the held-out or the training part."""
    make = random_count if task == "count" else random_chart
    while True:
        scan = make(rng, rng.randint(MIN_ROWS, MAX_ROWS))
        if scan.held_out == held_out:
            return scan


def demonstration(scan: Scan, give_up: float, rng: random.Random) -> str:
    """A scan that stops after each row but the last with probability `give_up`, with `?`, and answers with the total so far."""
    lines = scan.lines
    for seen in range(1, len(lines) + 1):
        if seen == len(lines) or rng.random() < give_up:
            break
    mark = GIVE_UP_MARK if seen < len(lines) else ""
    return "<think>" + "\n".join(lines[:seen]) + f"{mark}</think>{lines[seen - 1][-1]}"


def is_sound(thought: str | None, answer: str | None, right: Sequence[str]) -> bool:
    """Whether every line is the right one, it gives up exactly if it stops before the last, and it answers with its last total."""
    if thought is None or answer is None:
        return False
    gives_up = thought.endswith(GIVE_UP_MARK)
    lines = thought.removesuffix(GIVE_UP_MARK).split("\n")
    return lines == list(right[: len(lines)]) and gives_up == (len(lines) < len(right)) and answer == lines[-1][-1:]
