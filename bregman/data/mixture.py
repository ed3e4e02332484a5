"""The order in which the rows of several sources are drawn: endless, and can be entered at any position.

Owns positions only; knows nothing about what the rows are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np

_DRAWS_PER_CHUNK = 4096


class Draw(NamedTuple):
    """The draw with this `number` (from 0) of a mixture: `row` of `source`, both counted from 0."""

    number: int
    source: int
    row: int


class Mixture:
    """Each draw picks a source, then the next row of that source, in an order that is shuffled anew for each pass over it.

    By weight, sources are picked at random with probability proportional to their weight. In epochs, each epoch holds every row of
    a source as often as the source has passes, all in random order; of half a pass, every other epoch has the other rows.
    The order depends on the arguments only.

    Args:
        sizes: rows of each source, none of them 0.
        weights: one positive number per source: relative shares, or passes per epoch.
        seed: of the choices of sources and of all orders.
        epochs: `weights` are passes per epoch.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int, *, epochs: bool = False) -> None:
        if not sizes or len(sizes) != len(weights) or min(sizes) <= 0 or min(weights) <= 0:
            raise ValueError("a mixture needs non-empty sources with one positive weight each")
        self._sizes, self._weights, self._seed, self._epochs = list(sizes), list(weights), seed, epochs
        self._bounds = np.cumsum(weights) / np.sum(weights)

    def draws(self, start: int = 0) -> Iterator[Draw]:
        """The draws from `start` on. Those before it are counted, not visited: their number is all a resume needs."""
        drawn = np.zeros(len(self._sizes), dtype=np.int64)
        orders: dict[int, tuple[int, np.ndarray]] = {}
        index = 0
        for choices in self._chunks():
            skip = min(max(start - index, 0), len(choices))
            drawn += np.bincount(choices[:skip], minlength=len(self._sizes))
            index += skip
            for source in choices[skip:].tolist():
                turn, position = divmod(int(drawn[source]), self._sizes[source])
                if source not in orders or orders[source][0] != turn:
                    order = np.random.default_rng([self._seed, 1, source, turn]).permutation(self._sizes[source])
                    orders[source] = turn, order
                drawn[source] += 1
                yield Draw(index, source, int(orders[source][1][position]))
                index += 1

    def draws_in(self, epochs: int) -> int:
        """Draws of the first `epochs` epochs."""
        return sum(int(size * passes * epochs) for size, passes in zip(self._sizes, self._weights, strict=True))

    def draws_until_dry(self) -> tuple[int, int]:
        """How many draws there are before the first that would repeat a row, and the source that it would repeat."""
        before, drawn = 0, np.zeros(len(self._sizes), dtype=np.int64)
        for choices in self._chunks():
            after = drawn + np.bincount(choices, minlength=len(self._sizes))
            dry = {}
            for source in np.flatnonzero(after > self._sizes).tolist():
                left = self._sizes[source] - int(drawn[source])
                dry[int(np.flatnonzero(choices == source)[left])] = source
            if dry:
                return before + min(dry), dry[min(dry)]
            before, drawn = before + len(choices), after
        raise AssertionError("chunks never end")

    def _chunks(self) -> Iterator[np.ndarray]:
        """The sources of all draws, some thousands at a time."""
        for number in count():
            if self._epochs:
                yield from self._epoch(number)
            else:
                uniform = np.random.default_rng([self._seed, 0, number]).random(_DRAWS_PER_CHUNK)
                # rounding may leave the last bound a hair below 1
                yield np.minimum(np.searchsorted(self._bounds, uniform, side="right"), len(self._sizes) - 1)

    def _epoch(self, number: int) -> Iterator[np.ndarray]:
        """A random order of as many picks of each source as its passes give; exact, without holding the order of a whole epoch."""
        rng = np.random.default_rng([self._seed, 2, number])
        pairs = zip(self._sizes, self._weights, strict=True)
        left = np.asarray([int(size * passes * (number + 1)) - int(size * passes * number) for size, passes in pairs])
        while total := int(left.sum()):
            counts = rng.multivariate_hypergeometric(left, min(_DRAWS_PER_CHUNK, total))
            left = left - counts
            yield rng.permutation(np.repeat(np.arange(len(counts)), counts))
