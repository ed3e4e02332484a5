"""An endless weighted stream over several sources of examples, which can be entered at any position.

Owns the order in which examples are drawn; knows nothing about what they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")

_DRAWS_PER_CHUNK = 4096


class Mixture(Generic[T]):
    """Each draw picks a source with probability proportional to its weight, then the next example of that source, in an order
    that is shuffled anew for each pass over it.

    The stream depends on the lengths, the weights and the seed only.

    Args:
        sources: the examples of each source, none of them empty.
        weights: one positive number per source.
        seed: of the choices of sources and of all orders.
    """

    def __init__(self, sources: Sequence[Sequence[T]], weights: Sequence[float], seed: int) -> None:
        if not sources or len(sources) != len(weights) or not all(len(source) for source in sources) or min(weights) <= 0:
            raise ValueError("a mixture needs non-empty sources with one positive weight each")
        self._sources, self._seed = sources, seed
        self._bounds = np.cumsum(weights) / np.sum(weights)

    def examples(self, start: int = 0) -> Iterator[T]:
        """The stream from draw `start` on. The draws before it are counted, not visited: their number is all a resume needs."""
        drawn = np.zeros(len(self._sources), dtype=np.int64)
        orders: dict[int, tuple[int, np.ndarray]] = {}
        for chunk in count():
            choices = self._choices(chunk)
            skip = min(max(start - chunk * _DRAWS_PER_CHUNK, 0), _DRAWS_PER_CHUNK)
            drawn += np.bincount(choices[:skip], minlength=len(self._sources))
            for choice in choices[skip:].tolist():
                examples = self._sources[choice]
                epoch, position = divmod(int(drawn[choice]), len(examples))
                if choice not in orders or orders[choice][0] != epoch:
                    orders[choice] = epoch, np.random.default_rng([self._seed, 1, choice, epoch]).permutation(len(examples))
                drawn[choice] += 1
                yield examples[int(orders[choice][1][position])]

    def _choices(self, chunk: int) -> np.ndarray:
        """The sources of draws [chunk * 4096, (chunk + 1) * 4096)."""
        uniform = np.random.default_rng([self._seed, 0, chunk]).random(_DRAWS_PER_CHUNK)
        # rounding may leave the last bound a hair below 1
        return np.minimum(np.searchsorted(self._bounds, uniform, side="right"), len(self._sources) - 1)
