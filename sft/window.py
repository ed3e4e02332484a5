"""The examples of a source that fit a phase's `max_length`, and what becomes of those that do not.

Owns the policy for long conversations and its counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from bregman.errors import DataError
from bregman.types import Sequence as TokenSequence


class Tokenised(Protocol):
    """The tokenised examples of the source `name`. `lengths` int64 [n]: tokens of each; `untrained` int64 [n]: tokens before its first
    trained one. Both are known without reading the example; `where` is what its row is called in errors."""

    @property
    def name(self) -> str: ...

    @property
    def lengths(self) -> np.ndarray: ...

    @property
    def untrained(self) -> np.ndarray: ...

    def where(self, index: int) -> str: ...

    def __getitem__(self, index: int, /) -> TokenSequence: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """What a phase draws of one source.

    Attributes:
        name: of the source.
        lengths: int64 [n], tokens of each example as it is drawn.
        chosen: int64 [n], which examples of `source`; n <= its own.
        skipped: examples left out because they are too long.
        truncated: examples that are cut.
    """

    name: str
    source: Tokenised
    max_length: int
    lengths: np.ndarray
    chosen: np.ndarray
    skipped: int
    truncated: int

    def __getitem__(self, row: int) -> TokenSequence:
        return truncate(self.source[int(self.chosen[row])], self.max_length)


def window(source: Tokenised, max_length: int, too_long: Literal["error", "skip", "truncate"]) -> Window:
    """The examples of `source` as `too_long` has them. One that would be cut before its first trained token is skipped.

    Raises:
        DataError: naming the longest row, with `too_long: error`; or no example is left.
    """
    lengths = source.lengths
    over = lengths > max_length
    if too_long == "error" and over.any():
        longest = int(lengths.argmax())
        found = f"{lengths[longest]} tokens, max_length is {max_length} ({over.sum():,} of {len(over):,} conversations are longer)"
        raise DataError(source.where(longest), found, f"set max_length: {lengths[longest]}, or too_long: skip (or truncate)")
    kept = ~over if too_long != "truncate" else source.untrained < max_length
    if not kept.any():
        raise DataError(source.name, "no conversation is left", f"raise max_length ({max_length})")
    return Window(
        name=source.name,
        source=source,
        max_length=max_length,
        lengths=np.minimum(lengths[kept], max_length),
        chosen=np.flatnonzero(kept),
        skipped=int((~kept).sum()),
        truncated=int((over & kept).sum()),
    )


def truncate(sequence: TokenSequence, max_length: int) -> TokenSequence:
    """The first `max_length` tokens with their mask. No end token is added: a cut answer must not teach the model to stop there.

    An image of which not every token is left loses them all, with everything after its first.
    """
    if len(sequence.token_ids) <= max_length:
        return sequence
    ends = np.cumsum([image.num_tokens for image in sequence.images]).astype(int)
    positions = sequence.image_positions
    whole = len(ends)
    if positions is not None:
        whole = int((positions[ends - 1] < max_length).sum())
        if whole < len(ends):
            first = int(positions[ends[whole - 1] if whole else 0])
            max_length = min(max_length, first)
        positions = positions[: ends[whole - 1] if whole else 0]
    return replace(
        sequence,
        token_ids=sequence.token_ids[:max_length],
        loss_mask=sequence.loss_mask[:max_length],
        rollout_logprobs=None if sequence.rollout_logprobs is None else sequence.rollout_logprobs[:max_length],
        images=sequence.images[:whole],
        image_positions=positions if whole else None,
    )
