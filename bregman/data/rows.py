"""Filling rows of fixed capacity from a stream of lengths, looking ahead for what fits.

Owns which examples share a row and which rows make up a step. Works on lengths alone, so that a whole epoch can be planned without
its tokens; laying tokens out is `bregman.data.packing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from bregman.data.mixture import Draw

LOOK_AHEAD = 128
"""Examples a row may choose among: sums of a few of them hit nearly every gap to the token."""


class RowFiller:
    """Takes draws in order, except for the last few of a row, which are the ones that fill it best.

    Every row begins with the oldest example that waits, so none waits for more than `LOOK_AHEAD` rows.

    Args:
        draws: `draws(start)` gives the stream from draw `start` on.
        length: tokens of the example that a draw stands for.
        limit: draws there are; None for an endless stream.
        state: what `state_dict` gave, to go on from there.
    """

    def __init__(
        self,
        draws: Callable[[int], Iterator[Draw]],
        length: Callable[[Draw], int],
        *,
        limit: int | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._draws, self._length = draws, length
        self._drawn = int(state["drawn"]) if state else 0
        waiting = set(state["waiting"]) if state else set()
        first = min(waiting, default=self._drawn)
        self._stream = draws(first)
        self._waiting = [(draw, length(draw)) for draw in islice(self._stream, self._drawn - first) if draw.number in waiting]
        self._limit = limit

    def state_dict(self) -> dict[str, Any]:
        """Where a resumed run goes on: the number of the next draw, and those before it that no row has taken yet. Plain JSON."""
        return {"drawn": self._drawn, "waiting": [draw.number for draw, _ in self._waiting]}

    def extend(self) -> None:
        """Let the stream go on without end."""
        self._limit = None

    def step(self, capacity: int, num_rows: int) -> list[list[Draw]]:
        """The rows of the next step: at most `num_rows`, none of them empty; no rows once the stream has ended.

        An example longer than `capacity` gets a row of its own.
        """
        rows: list[list[Draw]] = []
        while len(rows) < num_rows and (row := self._row(capacity)):
            rows.append(row)
        return rows

    def _row(self, capacity: int) -> list[Draw]:
        self._look_ahead()
        if not self._waiting:
            return []
        draw, length = self._waiting.pop(0)
        row, left = [draw], capacity - length
        while left > 0:
            self._look_ahead()
            if not self._waiting:
                break
            mean = sum(length for _, length in self._waiting) / len(self._waiting)
            draw, length = self._waiting[0]
            if left <= 2 * mean or length > left:
                chosen = best_subset([length for _, length in self._waiting], left)
                row += [self._waiting[index][0] for index in chosen]
                self._waiting = [item for index, item in enumerate(self._waiting) if index not in chosen]
                break
            row.append(draw)
            left -= length
            self._waiting.pop(0)
        return row

    def _look_ahead(self) -> None:
        missing = LOOK_AHEAD - len(self._waiting)
        if self._limit is not None:
            missing = min(missing, self._limit - self._drawn)
        for draw in islice(self._stream, missing):
            self._waiting.append((draw, self._length(draw)))
            self._drawn += 1


def best_subset(lengths: Sequence[int], room: int) -> set[int]:
    """Indices of lengths whose sum comes closest to `room` from below; among equals, those with earlier ones.

    The subset-sum table is one bit per token of room: an integer per length, shifted.
    """
    mask = (1 << (room + 1)) - 1
    candidates = [index for index, length in enumerate(lengths) if length <= room]
    tables = [1]
    for index in reversed(candidates):  # the last table added is the earliest example's: taken back first, so it is preferred
        tables.append((tables[-1] | tables[-1] << lengths[index]) & mask)
    total = tables[-1].bit_length() - 1
    chosen = set()
    for index, before in zip(candidates, reversed(tables[:-1]), strict=True):
        if total >= lengths[index] and before >> (total - lengths[index]) & 1:
            chosen.add(index)
            total -= lengths[index]
    return chosen
