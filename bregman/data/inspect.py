"""What a person sees of the data: token-length histograms, counts per source, and which tokens are trained.

Owns plain text for `bregman check` and `bregman show`; decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from bregman.types import Sequence

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

_BINS = 10
_BAR = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceReport:
    """Counts of one source.

    Attributes:
        name: of the source.
        rows: examples read.
        tokens: tokens of all examples.
        trained_tokens: training targets among them; 0 for problems.
        longest: tokens of the longest example.
        over_limit: examples longer than the limit.
        limit: tokens an example may have.
    """

    name: str
    rows: int
    tokens: int
    trained_tokens: int
    longest: int
    over_limit: int
    limit: int

    def __str__(self) -> str:
        trained = f", {self.trained_tokens / self.tokens:.0%} of them trained" if self.trained_tokens else ""
        lengths = f"mean {self.tokens / self.rows:.0f}, longest {self.longest} of {self.limit}"
        over = f", {self.over_limit:,} over the limit" if self.over_limit else ""
        return f"{self.name}: {self.rows:,} rows, {self.tokens:,} tokens{trained}; {lengths}{over}"


def source_report(name: str, lengths: Items[int], limit: int, trained_tokens: int = 0) -> SourceReport:
    """Counts of a non-empty source from the token lengths of its examples."""
    return SourceReport(
        name=name,
        rows=len(lengths),
        tokens=sum(lengths),
        trained_tokens=trained_tokens,
        longest=max(lengths),
        over_limit=sum(length > limit for length in lengths),
        limit=limit,
    )


def length_report(lengths: Items[int], limit: int, unit: str = "tokens") -> str:
    """A histogram of `lengths` (in `unit`) up to `limit`, and how many are longer: those the stage cuts, drops or refuses."""
    if not lengths:
        return "no examples"
    values = np.asarray(lengths)
    if values.min() == values.max() <= limit:
        return f"{len(values):,} examples of {values[0]} {unit} each, limit {limit}"
    top = max(1, min(limit, int(values.max())))
    width = -(-top // _BINS)
    # each bin holds first..last, both included; the last one ends at the limit or the longest example, never beyond
    bins = [(first, min(first + width - 1, top)) for first in range(1, top + 1, width)]
    rows = [(f"{first}-{last}" if first < last else f"{last}", int(((values >= first) & (values <= last)).sum())) for first, last in bins]
    over = int((values > limit).sum())
    if over:
        rows.append((f"> {limit}", over))
    most = max(count for _, count in rows)
    label, digits = max(len(text) for text, _ in rows), len(f"{most:,}")
    lines = [f"{len(values):,} examples of {values.min()} to {values.max()} {unit}, median {int(np.median(values))}, limit {limit}"]
    for text, count in rows:
        bar = "█" * max(round(_BAR * count / max(most, 1)), 1 if count else 0)
        lines.append(f"  {text:>{label}} {count:>{digits},} {bar}".rstrip())
    lines.append(f"  over the limit: {over:,} ({over / len(values):.1%}), to be cut or dropped" if over else "  over the limit: none")
    return "\n".join(lines)


def colour_mask(tokenizer: PreTrainedTokenizerBase, sequence: Sequence) -> Text:
    """The sequence's text: trained tokens bold green, the rest dim.

    Runs of equal mask are decoded together, so that characters made of several tokens are shown whole.
    """
    from rich.text import Text

    text = Text()
    mask = np.asarray(sequence.loss_mask)
    edges = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(mask)]
    for first, last in pairwise(edges):
        ids = sequence.token_ids[first:last].tolist()
        piece = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text.append(str(piece), style="bold green" if mask[first] else "dim")
    return text
