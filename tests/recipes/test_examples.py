"""A stage's data from file to stream: every row is accounted for, the second start tokenises nothing, and a text model refuses images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bregman.errors import DataError
from bregman.models.tiny.tokenizer import character_tokenizer
from recipes import examples
from recipes.examples import losses, streams, tokenised
from recipes.schema import Recipe

ROWS = [
    {"prompt": "1+1=?", "completion": "2"},
    {"prompt": "2+2=?", "completion": " "},
    {"messages": [{"role": "user", "content": "1"}, {"role": "user", "content": "2"}, {"role": "assistant", "content": "3"}]},
    {"messages": [{"role": "user", "content": "1"}, {"role": "gpt", "content": "2"}]},
    "{broken",
    {"prompt": "3+3=?", "completion": "1" * 40},
    {"prompt": "3" * 60, "completion": "6"},
    {"prompt": "4+4=?", "completion": "é"},
    {"prompt": "4+4=?", "completion": "8"},
]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("BREGMAN_CACHE", str(tmp_path / "cache"))
    lines = [row if isinstance(row, str) else json.dumps(row) for row in ROWS]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def recipe(**stage) -> Recipe:
    settings = {
        "name": "sft",
        "kind": "sft",
        "steps": 2,
        "tokens_per_step": 64,
        "max_length": 32,
        "on_bad_row": "skip",
        "too_long": "truncate",
        "sources": [{"kind": "jsonl", "path": "data.jsonl"}],
        "optimizer": {"kind": "adamw", "learning_rate": 0.01},
    }
    model = {"kind": "tiny_qwen3", "alphabet": "0123456789+=?"}
    return Recipe.model_validate(
        {"name": "r", "output_dir": "run", "model": model, "engine": {"max_model_len": 64}, "stages": [{**settings, **stage}]}
    )


def stores_of(made: Recipe, folder: Path):
    stage, tokenizer = made.stages[0], character_tokenizer("0123456789+=?")
    return [tokenised(source, folder, tokenizer, made.seed, stage.on_bad_row) for source in stage.sources]


def test_every_row_is_accounted_for(folder):
    made = recipe()
    stores = stores_of(made, folder)
    (stream,) = streams(made, made.stages[0], stores)
    counts = stream.facts
    assert counts == {"data/rows": 9, "data/used": 3, "data/truncated": 1, "data/too_long": 1, "data/skipped": 5}
    assert counts["data/rows"] == counts["data/used"] + counts["data/too_long"] + counts["data/skipped"]
    (text,) = losses(stores, stream)
    assert text.startswith("data.jsonl: 9 rows: 2 used whole, 1 truncated, 1 above max_length 32 skipped, 1 skipped: ")
    for reason in ("answer in turn N is empty", "turns N and N are both", "has the role", "is not valid JSON", "has no token"):
        assert reason in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"on_bad_row": "error"}, r"data.jsonl row 2: the assistant's answer in turn 1 is empty"),
        ({"too_long": "error"}, r"data.jsonl row 7: 7\d tokens, max_length is 32 \(2 of 4 conversations are longer\)"),
        ({"on_exhausted": "error"}, r"data.jsonl: its 3 rows are used up after 1 of 2 steps"),
    ],
)
def test_policies_that_stop(folder, changes, message):
    made = recipe(**changes)
    with pytest.raises(DataError, match=message):
        streams(made, made.stages[0], stores_of(made, folder))


def test_second_start_tokenises_nothing(folder, monkeypatch):
    made = recipe()
    first = stores_of(made, folder)
    monkeypatch.setattr(examples, "tokenize_conversations", None)
    second = stores_of(made, folder)
    assert [store.lengths.tolist() for store in first] == [store.lengths.tolist() for store in second]
    assert first[0][0].token_ids.tolist() == second[0][0].token_ids.tolist()


def test_phases_see_what_fits_them(folder):
    made = recipe(
        steps=None,
        max_length=None,
        too_long="skip",
        phases=[{"epochs": 1, "max_length": 32}, {"epochs": 1, "max_length": 128, "learning_rate": 0.005}],
    )
    first, second = streams(made, made.stages[0], stores_of(made, folder))
    assert [len(view.lengths) for stream in (first, second) for view in stream.sources] == [2, 4]
    assert second.rows.capacity == 64 and second.phase.learning_rate == 0.005
