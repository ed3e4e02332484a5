"""What a phase of supervised training draws from: the examples of its sources in the order of a mixture, and how many steps it takes.

Owns the arithmetic of steps, rows and epochs. Where examples come from is the caller's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from bregman.data.mixture import Draw, Mixture
from bregman.data.rows import RowFiller
from bregman.errors import DataError
from bregman.types import Sequence as TokenSequence
from sft.config import Phase


class Examples(Protocol):
    """The examples of one source that a phase may draw. `lengths`: tokens of each; known without reading the example."""

    @property
    def name(self) -> str: ...

    @property
    def lengths(self) -> np.ndarray: ...

    def __getitem__(self, row: int, /) -> TokenSequence: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The shape of an optimizer step: at most `count` rows of `capacity` tokens each."""

    capacity: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The examples of one phase, in order.

    Attributes:
        phase: its settings.
        sources: none of them empty.
        mixture: over the sources.
        limit: draws there are; None for an endless stream.
        rows: of each step.
        steps: of the phase.
        facts: numbers about the data, logged with the phase's first step.
    """

    phase: Phase
    sources: Sequence[Examples]
    mixture: Mixture
    limit: int | None
    rows: Rows
    steps: int
    facts: Mapping[str, float] = field(default_factory=dict)

    def filler(self, state: Mapping[str, Any] | None = None) -> RowFiller:
        """From the start, or from where `RowFiller.state_dict` was taken."""
        return _filler(self.mixture, self.sources, self.limit, state)

    def example(self, draw: Draw) -> TokenSequence:
        return self.sources[draw.source][draw.row]


def shape(phase: Phase, tokens_per_micro_batch: int, num_ranks: int) -> Rows:
    """Rows of equal capacity, a multiple of the ranks, that share the tokens of a step: full rows are then equal work for each rank.

    A row is a micro-batch. Where `max_length` is more than `tokens_per_micro_batch`, rows are as long as that: an example of this
    length has to fit into memory anyway.
    """
    longest = max(tokens_per_micro_batch, phase.max_length)
    count = -(-phase.tokens_per_step // longest)
    count = -(-count // num_ranks) * num_ranks
    return Rows(capacity=max(phase.tokens_per_step // count, 1), count=count)


def plan_stream(
    phase: Phase,
    sources: Sequence[Examples],
    weights: Sequence[float],
    seed: int,
    *,
    on_exhausted: Literal["repeat", "stop", "error"],
    tokens_per_micro_batch: int,
    num_ranks: int,
) -> Stream:
    """The stream of `phase`. Epochs, and steps that may run dry, are played through on the lengths to count their steps.

    Raises:
        DataError: with `on_exhausted: error`, a source does not have enough rows.
    """
    rows = shape(phase, tokens_per_micro_batch, num_ranks)
    mixture = Mixture([len(source.lengths) for source in sources], weights, seed, epochs=phase.epochs is not None)
    if phase.epochs is not None:
        limit = mixture.draws_in(phase.epochs)
        steps = _count_steps(_filler(mixture, sources, limit), rows, None)
    elif on_exhausted == "repeat":
        assert phase.steps is not None
        limit, steps = None, phase.steps
    else:
        assert phase.steps is not None
        limit, dry = mixture.draws_until_dry()
        steps = _count_steps(_filler(mixture, sources, limit), rows, phase.steps)
        if steps < phase.steps and on_exhausted == "error":
            found = f"its {len(sources[dry].lengths):,} rows are used up after {steps} of {phase.steps} steps"
            raise DataError(sources[dry].name, found, "lower its weight or the steps, or set on_exhausted: repeat (or stop)")
    return Stream(phase=phase, sources=sources, mixture=mixture, limit=limit, rows=rows, steps=steps)


def _filler(mixture: Mixture, sources: Sequence[Examples], limit: int | None, state: Mapping[str, Any] | None = None) -> RowFiller:
    lengths = [source.lengths for source in sources]
    return RowFiller(mixture.draws, lambda draw: int(lengths[draw.source][draw.row]), limit=limit, state=state)


def _count_steps(filler: RowFiller, rows: Rows, most: int | None) -> int:
    steps = 0
    while (most is None or steps < most) and filler.step(rows.capacity, rows.count):
        steps += 1
    return steps
