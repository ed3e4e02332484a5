"""Preference pairs become the token ids that every other stage uses, and TRL trains on them for real."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bregman.config import parse
from bregman.data.chat import tokenize_conversation
from bregman.data.config import JsonlSource, PythonSource
from bregman.errors import DataError, RecipeError
from bregman.models.config import TinyQwen3Config
from bregman.models.tiny.make import make_tiny_qwen3
from bregman.models.tiny.tokenizer import character_tokenizer
from sft.dpo import PreferencePair, read_pairs, train
from sft.dpo_config import DPOConfig

TOKENIZER = character_tokenizer("0123456789+ab")


def write(folder: Path, *rows: dict[str, Any]) -> PythonSource:
    (folder / "task.py").write_text(f"def pairs(*, seed):\n    yield from {list(rows)!r}\n")
    return PythonSource(path="task.py:pairs")


def read(folder: Path, *rows: dict[str, Any], max_length: int = 64) -> list[PreferencePair]:
    return read_pairs(write(folder, *rows), folder, TOKENIZER, 0, max_length)


def test_ids_are_those_of_a_conversation(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "1+1"}]
    message = [{"role": "assistant", "content": "2"}]
    as_text, as_messages = read(
        tmp_path, {"prompt": chat, "chosen": "2", "rejected": "33"}, {"prompt": chat, "chosen": message, "rejected": "33"}
    )
    assert as_text == as_messages
    whole = tokenize_conversation(TOKENIZER, [*chat, *message]).token_ids.tolist()
    ids = as_text.prompt_ids + as_text.chosen_ids
    assert whole[: len(ids)] == ids
    assert TOKENIZER.decode(as_text.chosen_ids) == "2<|im_end|>"  # without the newline that the template adds
    assert TOKENIZER.decode(as_text.rejected_ids) == "33<|im_end|>"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "1", "chosen": "2"}, "needs `rejected`"),
        ({"prompt": "", "chosen": "2", "rejected": "3"}, "needs `prompt`"),
        ({"prompt": "1", "chosen": "2", "rejected": " "}, "`rejected` is not a text"),
        ({"prompt": "1", "chosen": "2", "rejected": ["3"]}, "`rejected` is not a text"),
        ({"prompt": "1", "chosen": "2", "rejected": "2"}, "`chosen` and `rejected` are the same"),
        ({"prompt": "1", "chosen": "2", "rejected": "3" * 70}, "set max_length"),
        ({"prompt": "1", "chosen": "x", "rejected": "3"}, "no token for 'x'"),
        ({"prompt": "1", "chosen": "2", "rejected": "3", "images": ["a.png"]}, "has images"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError) as error:
        read(tmp_path, {"prompt": "1", "chosen": "2", "rejected": "3"}, row)
    assert expected in str(error.value)
    assert "row 1" in str(error.value)


def test_batches_are_whole_micro_batches() -> None:
    with pytest.raises(RecipeError, match=r"batch_size \(8\) must be a multiple of micro_batch_size \(3\)"):
        pairs = {"kind": "jsonl", "path": "x"}
        parse(DPOConfig, {"pairs": pairs, "max_length": 9, "learning_rate": 1e-3, "batch_size": 8, "micro_batch_size": 3}, "recipe")


def test_training_moves_probability_to_the_chosen_answer(tmp_path: Path) -> None:
    make_tiny_qwen3(
        TinyQwen3Config(alphabet="0123456789+ab", hidden_size=32, num_layers=1, num_heads=1, num_kv_heads=1), 0, tmp_path / "model"
    )
    rows = [{"prompt": f"{i}+1", "chosen": "a", "rejected": "b" * (1 + i % 3)} for i in range(24)]
    config = DPOConfig(pairs=JsonlSource(path="-"), max_length=64, learning_rate=3e-3, batch_size=8, micro_batch_size=4, epochs=3)
    history = train(config, tmp_path / "model", tmp_path / "stage" / "model", read(tmp_path, *rows), seed=0, on_gpu=False)
    assert len(history) == 9
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # the policy is its own reference
    assert history[-1]["rewards/accuracies"] == 1.0
    assert history[-1]["rewards/margins"] > 0.3
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "stage" / "model").config.hidden_size == 32
    assert (tmp_path / "stage" / "model" / "tokenizer.json").exists()
    assert [path.name for path in (tmp_path / "stage").iterdir()] == ["model"]  # TRL's own checkpoints are gone


def test_a_run_that_was_cut_off_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import trl

    make_tiny_qwen3(
        TinyQwen3Config(alphabet="0123456789+ab", hidden_size=32, num_layers=1, num_heads=1, num_kv_heads=1), 0, tmp_path / "model"
    )
    pairs = read(tmp_path, *({"prompt": f"{i}+1", "chosen": "a", "rejected": "b" * (1 + i % 3)} for i in range(24)))
    config = DPOConfig(pairs=JsonlSource(path="-"), max_length=64, learning_rate=3e-3, batch_size=4, micro_batch_size=4)
    whole = train(config, tmp_path / "model", tmp_path / "whole" / "model", pairs, seed=0, on_gpu=False)

    step, dies_at = trl.DPOTrainer.training_step, 4
    calls: list[int] = []

    def dying(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(self.state.global_step)
        if len(calls) == dies_at:
            raise KeyboardInterrupt
        return step(self, *arguments, **options)

    monkeypatch.setattr(trl.DPOTrainer, "training_step", dying)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "model", tmp_path / "cut" / "model", pairs, seed=0, on_gpu=False)
    resumed = train(config, tmp_path / "model", tmp_path / "cut" / "model", pairs, seed=0, on_gpu=False)
    assert calls[dies_at] == 3, "it goes on after the last saved step"
    assert [row["loss"] for row in resumed] == [row["loss"] for row in whole]
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
