"""What a person sees of the data: token-length histograms, counts per source, and which tokens are trained.

Owns plain text for `bregman check` and `bregman show`; decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from bregman.types import ImagePatches, Sequence

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


def image_report(sizes: Items[int], *, rows: int, with_images: int, tokens: int) -> str:
    """Counts of the images of a source that has some.

    Args:
        sizes: tokens of each image.
        rows: of the source, `with_images` of which show an image.
        tokens: of all rows, text and images.
    """
    taken = sum(sizes)
    share = f"{taken / len(sizes):.0f} tokens each on average ({taken / tokens:.0%} of all tokens), the largest {max(sizes)}"
    return f"{len(sizes):,} images in {with_images:,} of {rows:,} rows: {share}"


def colour_mask(tokenizer: PreTrainedTokenizerBase, sequence: Sequence) -> Text:
    """The sequence's text: trained tokens bold green, the rest dim, the tokens of an image in one place.

    Runs of equal mask are decoded together, so that characters made of several tokens are shown whole.
    """
    from rich.text import Text

    text = Text()
    mask = np.asarray(sequence.loss_mask)
    begins = _image_begins(sequence)
    cuts = {edge for begin, image in begins.items() for edge in (begin, begin + image.num_tokens)}
    edges = sorted({0, len(mask), *cuts, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist()})
    for first, last in pairwise(edges):
        if first in begins:
            text.append(_image(begins[first]), style="cyan")
            continue
        ids = sequence.token_ids[first:last].tolist()
        piece = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text.append(str(piece), style="bold green" if mask[first] else "dim")
    return text


def _image_begins(sequence: Sequence) -> dict[int, ImagePatches]:
    """Each image by the place of its first token."""
    if sequence.image_positions is None:
        return {}
    firsts = np.cumsum([0, *(image.num_tokens for image in sequence.images[:-1])])
    return dict(zip(sequence.image_positions[firsts].tolist(), sequence.images, strict=True))


def _image(image: ImagePatches) -> str:
    return f"[image {image.grid[0]} x {image.grid[1]} patches, {image.num_tokens} tokens]"
