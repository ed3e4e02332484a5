"""The data of a supervised stage: sources tokenised (or found tokenised), cut into phases, and what became of every row.

Owns the wiring of `bregman.data.shards` and `sft.stream` for a recipe, and the texts that tell a person about it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bregman.data.chat import check_masks, tokenize_conversations
from bregman.data.config import SourceConfig
from bregman.data.images import encode_images
from bregman.data.shards import TokenStore, cache_folder, token_store, tokenizer_hash
from bregman.data.sources import image_folder, read_conversation, read_rows
from bregman.types import ImagePatches
from bregman.types import Sequence as TokenSequence
from recipes.schema import Recipe
from sft.config import SFTConfig
from sft.stream import Stream, plan_stream
from sft.window import Window, window

if TYPE_CHECKING:
    from bregman.protocols import ImageEncoder


def tokenised(
    source: SourceConfig,
    base: Path,
    tokenizer: Any,
    seed: int,
    on_bad_row: Any,
    *,
    encoder: ImageEncoder | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> TokenStore:
    """Every usable row of `source`, tokenised and with its mask checked.

    Raises:
        DataError: a row is malformed and `on_bad_row` is `error`; no row can be used.
    """
    rows, folder = read_rows(source, base, seed), image_folder(source, base)

    def tokenise(index: int) -> TokenSequence:
        conversation = read_conversation(rows, index, folder)
        (sequence,) = tokenize_conversations(tokenizer, [conversation], encoder=encoder)
        check_masks([sequence], tokenizer, [rows.where(index)])
        return sequence

    def images(index: int) -> tuple[ImagePatches, ...]:
        return encode_images(read_conversation(rows, index, folder).images, encoder, rows.where(index))

    return token_store(
        rows,
        tokenise,
        on_bad_row=on_bad_row,
        cache=cache_folder(rows.content_hash(), tokenizer_hash(tokenizer), repr(vars(encoder)) if encoder is not None else ""),
        images=images,
        progress=lambda done: progress(f"tokenising {rows.name}: {done:,} of {len(rows):,} rows"),
    )


def streams(recipe: Recipe, stage: SFTConfig, stores: list[TokenStore]) -> list[Stream]:
    """One per phase.

    Raises:
        DataError: a conversation is longer than `max_length` with `too_long: error`, no conversation of a source is left, or a
            source runs dry with `on_exhausted: error`.
    """
    result = []
    for number, phase in enumerate(stage.plan):
        windows = [window(store, phase.max_length, stage.too_long) for store in stores]
        epochs = phase.epochs is not None
        stream = plan_stream(
            phase,
            windows,
            [source.passes if epochs else source.weight for source in stage.sources],
            recipe.seed + number,
            on_exhausted=stage.on_exhausted,
            tokens_per_micro_batch=recipe.learner.tokens_per_micro_batch,
            num_ranks=recipe.cluster.learner_workers // recipe.learner.context_parallel,
        )
        result.append(replace(stream, facts=_fates(stores, windows)))
    return result


def fates(store: TokenStore, view: Window) -> str:
    """What became of the rows of a source in a phase, in one line; the counts add up."""
    used = len(view.lengths)
    parts = [f"{used - view.truncated:,} used whole"]
    parts += [f"{view.truncated:,} truncated"] if view.truncated else []
    parts += [f"{view.skipped:,} above max_length {view.max_length:,} skipped"] if view.skipped else []
    parts += [f"{count:,} skipped: {reason}" for reason, count in store.ledger.skipped.most_common()]
    return f"{store.ledger.rows:,} rows: {', '.join(parts)}"


def losses(stores: list[TokenStore], stream: Stream) -> list[str]:
    """A line per source some of whose rows are not used as they are, and one if the sources run dry early."""
    pairs = [(store, view) for store, view in zip(stores, stream.sources, strict=True) if isinstance(view, Window)]
    lines = [f"{store.name}: {fates(store, view)}" for store, view in pairs if store.ledger.skipped or view.skipped or view.truncated]
    wanted = stream.phase.steps
    if wanted is not None and stream.steps < wanted:
        lines.append(f"a source runs dry after {stream.steps} of {wanted} steps; on_exhausted: stop ends there")
    return lines


def _fates(stores: list[TokenStore], windows: list[Window]) -> dict[str, float]:
    """The rows of all sources of a phase by what became of them: `rows` = `used` + `skipped` + `too_long`; `truncated` are used."""
    return {
        "data/rows": float(sum(store.ledger.rows for store in stores)),
        "data/used": float(sum(len(view.lengths) for view in windows)),
        "data/truncated": float(sum(view.truncated for view in windows)),
        "data/too_long": float(sum(view.skipped for view in windows)),
        "data/skipped": float(sum(store.ledger.skipped.total() for store in stores)),
    }
