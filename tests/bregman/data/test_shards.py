"""The shard cache: what is stored comes back, is made once, is made again when damaged, and never grows with the data in memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter

from bregman.data import shards
from bregman.data.config import SourceConfig
from bregman.data.readers import Rows, read_rows
from bregman.data.shards import cache_folder, token_store
from bregman.errors import DataError
from bregman.types import ImagePatches, Sequence


@pytest.fixture(autouse=True)
def small_shards(monkeypatch, tmp_path):
    monkeypatch.setattr(shards, "ROWS_PER_SHARD", 10)
    monkeypatch.setenv("BREGMAN_CACHE", str(tmp_path / "cache"))


def source(path: Path, count: int = 35) -> Rows:
    path.write_text("".join(json.dumps({"n": number}) + "\n" for number in range(count)))
    config = TypeAdapter(SourceConfig).validate_python({"kind": "jsonl", "path": str(path)})
    return read_rows(config, path.parent, 0)


class Tokenise:
    """Row n becomes n + 2 tokens, the last n + 1 trained; every `bad`-th row is refused."""

    def __init__(self, rows: Rows, bad: int = 0) -> None:
        self.rows, self.bad, self.calls = rows, bad, []

    def __call__(self, index: int) -> Sequence:
        self.calls.append(index)
        number = self.rows[index]["n"]
        if self.bad and number % self.bad == self.bad - 1:
            raise DataError(self.rows.where(index), f"the answer `{number}` in turn {number} is empty", "fill it in")
        return Sequence(token_ids=np.arange(number, 2 * number + 2), loss_mask=np.arange(number + 2) >= 1)


def store_of(rows: Rows, tokenise: Tokenise, *, on_bad_row="error", settings=(), **options):
    return token_store(rows, tokenise, on_bad_row=on_bad_row, cache=cache_folder(rows.content_hash(), *settings), **options)


def contents(store) -> list[tuple[list[int], list[bool]]]:
    return [(store[index].token_ids.tolist(), store[index].loss_mask.tolist()) for index in range(len(store))]


def test_second_time_nothing_is_tokenised(tmp_path):
    rows = source(tmp_path / "a.jsonl")
    first, second = Tokenise(rows), Tokenise(rows)
    stores = [store_of(rows, first), store_of(rows, second)]
    assert first.calls == list(range(35)) and second.calls == []
    assert contents(stores[0]) == contents(stores[1])
    assert contents(stores[1])[3] == ([3, 4, 5, 6, 7], [False, True, True, True, True])
    assert stores[1].lengths.tolist() == [n + 2 for n in range(35)] and set(stores[1].untrained.tolist()) == {1}
    assert stores[1].trained_tokens == sum(n + 1 for n in range(35))
    assert stores[1][3].token_ids.dtype == np.int64 and stores[1].where(3) == "a.jsonl row 4"


def test_other_data_settings_or_code_make_other_shards(tmp_path, monkeypatch):
    rows = source(tmp_path / "a.jsonl")
    folders = {cache_folder(rows.content_hash(), "t1"), cache_folder(rows.content_hash(), "t2")}
    folders.add(cache_folder(source(tmp_path / "b.jsonl", 34).content_hash(), "t1"))
    (tmp_path / "code").mkdir()
    monkeypatch.setattr(shards, "__file__", str(tmp_path / "code" / "shards.py"))
    folders.add(cache_folder(rows.content_hash(), "t1"))
    assert len(folders) == 4
    monkeypatch.undo()
    assert cache_folder(source(tmp_path / "copy.jsonl").content_hash(), "t1") == cache_folder(rows.content_hash(), "t1")


@pytest.mark.parametrize("damage", ["byte", "cut", "missing", "json", "empty json"])
def test_a_damaged_shard_is_made_again(tmp_path, damage):
    rows = source(tmp_path / "a.jsonl")
    whole = contents(store_of(rows, Tokenise(rows)))
    folder = cache_folder(rows.content_hash()) / "10"
    tokens = folder / "tokens.npy"
    content = tokens.read_bytes()
    match damage:
        case "byte":
            tokens.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
        case "cut":
            tokens.write_bytes(content[:-8])
        case "missing":
            tokens.unlink()
        case "json":
            (folder / "shard.json").write_text("{")
        case "empty json":
            (folder / "shard.json").write_text("[]")
    again = Tokenise(rows)
    assert contents(store_of(rows, again)) == whole
    assert again.calls == list(range(10, 20))
    assert store_of(rows, last := Tokenise(rows)) and last.calls == []


def test_an_interrupted_run_keeps_its_shards(tmp_path):
    rows = source(tmp_path / "a.jsonl")

    def interrupted(index: int) -> Sequence:
        if index == 25:
            raise KeyboardInterrupt
        return Tokenise(rows)(index)

    with pytest.raises(KeyboardInterrupt):
        store_of(rows, interrupted)
    second = Tokenise(rows)
    store_of(rows, second)
    assert second.calls == list(range(20, 35))


def _make(path: Path) -> None:
    shards.ROWS_PER_SHARD = 10
    rows = source_of(path)
    store = store_of(rows, Tokenise(rows))
    os._exit(0 if len(contents(store)) == 35 else 1)


def source_of(path: Path) -> Rows:
    return read_rows(TypeAdapter(SourceConfig).validate_python({"kind": "jsonl", "path": str(path)}), path.parent, 0)


def test_runs_at_the_same_time(tmp_path):
    rows = source(tmp_path / "a.jsonl")
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_make, args=(tmp_path / "a.jsonl",)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    store = store_of(rows, last := Tokenise(rows))
    assert last.calls == [] and len(store) == 35
    assert sorted(path.name for path in cache_folder(rows.content_hash()).iterdir()) == ["0", "10", "20", "30"]


class TestBadRows:
    def test_error_names_the_first_also_from_the_cache(self, tmp_path):
        rows = source(tmp_path / "a.jsonl")
        with pytest.raises(DataError, match=r"a.jsonl row 7: the answer `6` in turn 6 is empty; fill it in"):
            store_of(rows, Tokenise(rows, bad=7))
        store_of(rows, Tokenise(rows, bad=7), on_bad_row="skip")
        with pytest.raises(DataError, match=r"a.jsonl row 7: the answer `6` in turn 6 is empty; fill it in"):
            store_of(rows, Tokenise(rows, bad=7))

    def test_skipped_rows_are_counted_by_reason_and_add_up(self, tmp_path):
        rows = source(tmp_path / "a.jsonl")
        for _ in range(2):
            store = store_of(rows, Tokenise(rows, bad=7), on_bad_row="skip")
            assert store.ledger.skipped == {"the answer … in turn N is empty": 5}
            assert store.ledger.rows == 35 == len(store) + store.ledger.skipped.total()
            assert store.where(6) == "a.jsonl row 8"

    def test_none_left(self, tmp_path):
        rows = source(tmp_path / "a.jsonl")
        with pytest.raises(DataError, match=r"a.jsonl: none of its 35 rows can be used; the first: a.jsonl row 1: the answer"):
            store_of(rows, Tokenise(rows, bad=1), on_bad_row="skip")


def test_images_are_encoded_when_they_are_drawn(tmp_path):
    rows = source(tmp_path / "a.jsonl", 3)

    def tokenise(index: int) -> Sequence:
        images = tuple(picture(2) for _ in range(index))
        return Sequence(
            token_ids=np.arange(10),
            loss_mask=np.arange(10) > 7,
            images=images,
            image_positions=np.arange(1, 1 + 2 * index) if index else None,
        )

    encoded: list[int] = []

    def images(index: int) -> tuple[ImagePatches, ...]:
        encoded.append(index)
        return tuple(picture(2) for _ in range(index))

    store = store_of(rows, tokenise, images=images)
    assert encoded == [] and store[0].images == () and store[0].image_positions is None and encoded == []
    drawn = store[2]
    assert len(drawn.images) == 2 and drawn.image_positions.tolist() == [1, 2, 3, 4] and encoded == [2]
    changed = store_of(rows, tokenise, images=lambda index: (picture(3),) * index)
    with pytest.raises(DataError, match=r"a.jsonl row 2: its images are not those that it was tokenised with"):
        changed[1]


def picture(tokens: int) -> ImagePatches:
    return ImagePatches(pixels=np.zeros((tokens, 3, 1, 1), np.float32), grid=(1, tokens), num_tokens=tokens)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BREGMAN_CACHE", str(tmp_path / "file"))
    rows = source(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="cannot be written .*set BREGMAN_CACHE"):
        store_of(rows, Tokenise(rows))


STREAM = """
import resource, sys
import numpy as np
from pathlib import Path
from pydantic import TypeAdapter
from bregman.data import shards
from bregman.data.config import SourceConfig
from bregman.data.readers import read_rows
from bregman.types import Sequence
shards.TOKENS_PER_SHARD = 500_000
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = read_rows(TypeAdapter(SourceConfig).validate_python({"kind": "jsonl", "path": sys.argv[1]}), Path("."), 0)
def tokenise(index):
    ids = np.frombuffer(rows[index]["text"].encode(), dtype=np.uint8).astype(np.int64)
    return Sequence(token_ids=ids, loss_mask=np.arange(len(ids)) > 0)
store = shards.token_store(rows, tokenise, on_bad_row="error", cache=shards.cache_folder(rows.content_hash()))
print(len(store), int(store.lengths.sum()), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_does_not_grow_with_the_data(tmp_path):
    path = tmp_path / "large.jsonl"
    with path.open("w") as file:
        for number in range(12_000):
            file.write(json.dumps({"text": f"{number:06d}" + "x" * 5000}) + "\n")
    size = path.stat().st_size // 2**20
    done = subprocess.run([sys.executable, "-c", STREAM, str(path)], capture_output=True, text=True, timeout=60, check=True)
    count, tokens, grown = map(int, done.stdout.split())
    assert (count, tokens) == (12_000, 12_000 * 5006)
    assert size > 55 and grown < size / 2, f"{size} MiB of text, {4 * tokens >> 20} MiB of tokens, grew by {grown} MiB"
