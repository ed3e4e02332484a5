"""Tokenised examples of a source: made in a stream, kept in a cache on disk, memory-mapped for random access.

Owns the format and the safety of the cache: a shard appears at once, is checked when it is opened, and is made again if it is
damaged. What an example is made of is the caller's (`tokenise`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bregman.data.readers import Rows
from bregman.errors import DataError
from bregman.types import ImagePatches, Sequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS_PER_SHARD = 2_000_000
"""A shard ends with the row that reaches this or `ROWS_PER_SHARD`; what is not yet on disk is lost when a run is interrupted."""
ROWS_PER_SHARD = 65_536
_REASONS = 20

Tokenise = Callable[[int], Sequence]
"""The example made of a row, by its index. Raises DataError."""


@dataclass(kw_only=True)
class RowLedger:
    """What became of the rows of a source: `rows` = examples + the sum of `skipped`.

    Attributes:
        rows: read.
        skipped: rows by reason; the reason is the error without the particulars of the row.
        first: the first error of each reason, as the arguments of its DataError.
    """

    rows: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    first: dict[str, tuple[str, str, str]] = field(default_factory=dict)

    def skip(self, error: DataError) -> None:
        reason = re.sub(r"`[^`]*`|'[^']*'|\"[^\"]*\"", "…", error.found)
        reason = re.sub(r"\d+", "N", reason)
        if reason not in self.skipped and len(self.skipped) >= _REASONS:
            reason = "other"
        self.skipped[reason] += 1
        self.first.setdefault(reason, (error.where, error.found, error.fix))

    def add(self, other: RowLedger) -> None:
        self.rows += other.rows
        self.skipped.update(other.skipped)
        self.first = {**other.first, **self.first}


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """Examples of the rows from `first` to `end`. On disk: a folder with two or three npy files and shard.json.

    Attributes:
        tokens: int32 [T] of all examples end to end; a trained token is stored as its bitwise complement, a negative number.
        index: int64 [n, 5] per example: where its tokens end, its row, its first trained token, where its image positions end, how
            many of its tokens are trained.
        image_positions: int64 of all examples end to end.
    """

    first: int
    end: int
    tokens: np.ndarray
    index: np.ndarray
    image_positions: np.ndarray
    ledger: RowLedger


class TokenStore:
    """The tokenised examples of one source, in the order of its rows.

    Attributes:
        name: of the source.
        lengths: int64 [n], tokens of each example.
        untrained: int64 [n], tokens before the first trained one of each example.
        trained_tokens: training targets of all examples.
        ledger: what became of the rows.
    """

    def __init__(self, rows: Rows, shards: list[_Shard], images: Callable[[int], tuple[ImagePatches, ...]] | None) -> None:
        self.name = rows.name
        self._rows, self._shards, self._images = rows, shards, images
        self._begins = np.cumsum([0, *(len(shard.index) for shard in shards)])
        self.lengths = np.concatenate([np.diff(shard.index[:, 0], prepend=0) for shard in shards])
        self.untrained = np.concatenate([shard.index[:, 2] for shard in shards])
        self.trained_tokens = sum(int(shard.index[:, 4].sum()) for shard in shards)
        self.ledger = RowLedger()
        for shard in shards:
            self.ledger.add(shard.ledger)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sequence:
        place = int(np.searchsorted(self._begins, index, side="right")) - 1
        shard, row = self._shards[place], index - int(self._begins[place])
        before = shard.index[row - 1] if row else np.zeros(5, dtype=np.int64)
        stored = np.asarray(shard.tokens[before[0] : shard.index[row, 0]])
        trained = stored < 0
        positions = np.asarray(shard.image_positions[before[3] : shard.index[row, 3]])
        images = self._images(int(shard.index[row, 1])) if self._images and len(positions) else ()
        if sum(image.num_tokens for image in images) != len(positions):
            found = "its images are not those that it was tokenised with"
            raise DataError(self.where(index), found, "give changed image files new names, or write the data file again")
        return Sequence(
            token_ids=np.where(trained, ~stored, stored).astype(np.int64),
            loss_mask=trained,
            images=images,
            image_positions=positions if len(positions) else None,
        )

    @property
    def with_images(self) -> int:
        """Examples that show an image."""
        return sum(int((np.diff(shard.index[:, 3], prepend=0) > 0).sum()) for shard in self._shards)

    def image_sizes(self) -> list[int]:
        """Tokens of every image. The template's text around each keeps images of one example apart."""
        sizes: list[int] = []
        for shard in self._shards:
            count = len(shard.image_positions)
            begins = np.flatnonzero(np.diff(shard.image_positions, prepend=-2) != 1)
            borders = shard.index[:, 3][shard.index[:, 3] < count]
            sizes += np.diff(np.union1d(begins, borders), append=count).tolist() if count else []
        return sizes

    def where(self, index: int) -> str:
        """What the row of an example is called in errors."""
        place = int(np.searchsorted(self._begins, index, side="right")) - 1
        return self._rows.where(int(self._shards[place].index[index - int(self._begins[place]), 1]))


def token_store(
    rows: Rows,
    tokenise: Tokenise,
    *,
    on_bad_row: Literal["error", "skip"],
    cache: Path | None = None,
    images: Callable[[int], tuple[ImagePatches, ...]] | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> TokenStore:
    """Tokenise every row of a source, or find it done.

    Args:
        rows: of the source.
        tokenise: makes the example of a row.
        on_bad_row: whether a row that cannot be tokenised ends the run or is counted and left out.
        cache: folder for these rows tokenised in this way (`cache_folder`); None keeps examples in memory.
        images: the images of a row, encoded when it is drawn.
        progress: told the number of rows done, now and then.

    Raises:
        DataError: a bad row with `on_bad_row: error`; or no row is left.
    """
    shards: list[_Shard] = []
    done = 0
    while done < len(rows):
        progress(done)
        shard = _open(cache / str(done)) if cache is not None else None
        if shard is None:
            shard = _build(rows, done, tokenise, on_bad_row, progress)
            if cache is not None:
                _write(cache / str(done), shard)
                shard = _open(cache / str(done)) or shard
        if on_bad_row == "error" and shard.ledger.first:
            raise DataError(*next(iter(shard.ledger.first.values())))
        shards.append(shard)
        done = shard.end
    store = TokenStore(rows, shards, images)
    if not len(store):
        where, found, fix = next(iter(store.ledger.first.values()))
        raise DataError(rows.name, f"none of its {len(rows):,} rows can be used; the first: {where}: {found}", fix)
    return store


def cache_folder(content: str | None, *settings: Any) -> Path | None:
    """Where shards of rows with this content hash are kept: `$BREGMAN_CACHE`, else `$XDG_CACHE_HOME/bregman`, else `~/.cache/bregman`.

    The folder's name is a hash of the content, of `settings` (anything JSON) and of the code of this package: none of them can change
    without new shards. None for rows without a content hash.
    """
    if content is None:
        return None
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        code.update(file.read_bytes())
    key = json.dumps([content, settings, code.hexdigest()], sort_keys=True)
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bregman"
    root = Path(os.environ.get("BREGMAN_CACHE") or default)
    return root / "tokens" / hashlib.sha256(key.encode()).hexdigest()[:32]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of everything that decides which tokens a conversation becomes: vocabulary, merges, special tokens, chat template."""
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer)
    state = json.dumps([backend, tokenizer.chat_template, dict(tokenizer.special_tokens_map)], sort_keys=True, default=str)
    return hashlib.sha256(state.encode()).hexdigest()


def _build(rows: Rows, first: int, tokenise: Tokenise, on_bad_row: str, progress: Callable[[int], None]) -> _Shard:
    tokens: list[np.ndarray] = []
    index: list[tuple[int, int, int, int, int]] = []
    positions: list[np.ndarray] = []
    ledger, total, images = RowLedger(), 0, 0
    row = first
    while row < len(rows) and row - first < ROWS_PER_SHARD and total < TOKENS_PER_SHARD:
        if row % 1000 == 0:
            progress(row)
        try:
            sequence = tokenise(row)
        except DataError as error:
            if on_bad_row == "error":
                raise
            ledger.skip(error)
        else:
            ids = sequence.token_ids.astype(np.int32)
            tokens.append(np.where(sequence.loss_mask, ~ids, ids))
            if sequence.image_positions is not None:
                positions.append(sequence.image_positions)
                images += len(sequence.image_positions)
            total += len(ids)
            index.append((total, row, int(sequence.loss_mask.argmax()), images, int(sequence.loss_mask.sum())))
        row += 1
    ledger.rows = row - first
    return _Shard(
        first=first,
        end=row,
        tokens=np.concatenate(tokens) if tokens else np.zeros(0, dtype=np.int32),
        index=np.asarray(index, dtype=np.int64).reshape(-1, 5),
        image_positions=np.concatenate(positions) if positions else np.zeros(0, dtype=np.int64),
        ledger=ledger,
    )


_ARRAYS = ("tokens", "index", "image_positions")


def _write(folder: Path, shard: _Shard) -> None:
    """Written aside, then renamed: another run that makes the same shard at the same time makes no harm."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
        try:
            for name in _ARRAYS:
                np.save(aside / f"{name}.npy", getattr(shard, name), allow_pickle=False)
            checksums = {name: _checksum(aside / f"{name}.npy") for name in _ARRAYS}
            ledger = {"rows": shard.ledger.rows, "skipped": shard.ledger.skipped, "first": shard.ledger.first}
            described = {"first": shard.first, "end": shard.end, "ledger": ledger, "checksums": checksums}
            (aside / "shard.json").write_text(json.dumps(described))
            if folder.exists():  # a damaged one, or another run's
                shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
        except OSError:
            if not folder.exists():
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        fix = "free some space, or set BREGMAN_CACHE to a folder that can be written"
        raise DataError(f"cache folder {folder.parent}", f"cannot be written ({error.strerror})", fix) from None


def _open(folder: Path) -> _Shard | None:
    """The shard in `folder`, or None if there is none or it is damaged."""
    try:
        described = json.loads((folder / "shard.json").read_text())
        if any(_checksum(folder / f"{name}.npy") != described["checksums"][name] for name in _ARRAYS):
            return None
        ledger = RowLedger(
            rows=described["ledger"]["rows"],
            skipped=Counter(described["ledger"]["skipped"]),
            first={reason: (error[0], error[1], error[2]) for reason, error in described["ledger"]["first"].items()},
        )
        return _Shard(
            first=described["first"],
            end=described["end"],
            tokens=np.load(folder / "tokens.npy", mmap_mode="r", allow_pickle=False),
            index=np.load(folder / "index.npy", allow_pickle=False),
            image_positions=np.load(folder / "image_positions.npy", mmap_mode="r", allow_pickle=False),
            ledger=ledger,
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _checksum(path: Path) -> int:
    """CRC-32 of a file. Read rather than mapped: pages of a map count as memory of this process."""
    value = 0
    for block in _blocks(path):
        value = zlib.crc32(block, value)
    return value


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            yield block
