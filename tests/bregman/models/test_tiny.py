"""The tiny tokenizer is exact, and the folder made on the spot is what transformers would have made."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
from pydantic import ValidationError

from bregman.errors import DataError
from bregman.models.config import TinyQwen3Config
from bregman.models.tiny.make import make_tiny_qwen3
from bregman.models.tiny.tokenizer import END, PAD, ROLES, START, THINK_TAGS, UNKNOWN, character_tokenizer

ALPHABET = "0123456789+-*=?,yn ustermai'.\tÄ漢🙂"
CONFIG = TinyQwen3Config(alphabet=ALPHABET)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_qwen3(CONFIG, seed=3, folder=path)
    return path


def test_every_character_is_a_token_and_decoding_is_exact():
    tokenizer = character_tokenizer(ALPHABET)
    assert tokenizer.encode("1 + ?\n", add_special_tokens=False) == [tokenizer.convert_tokens_to_ids(c) for c in "1 + ?\n"]
    pieces = [*ALPHABET, "\n", START, END, PAD, *THINK_TAGS, *ROLES, "  ", " ' ", " ."]
    generator = random.Random(0)
    for _ in range(500):
        text = "".join(generator.choices(pieces, k=generator.randrange(30)))
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
        assert "".join(tokenizer.decode([token]) for token in ids) == text


def test_vocabulary_has_no_gaps_and_no_doubles():
    tokenizer = character_tokenizer("01\n")
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert len(tokenizer) == 6 + 3 + 3  # special and think tokens, roles, characters
    assert tokenizer.eos_token == END and tokenizer.pad_token == PAD and tokenizer.encode("2") == [tokenizer.unk_token_id]
    assert tokenizer.convert_tokens_to_ids(UNKNOWN) == tokenizer.unk_token_id


def test_role_names_are_single_tokens_in_headers_only():
    tokenizer = character_tokenizer(ALPHABET)
    header = tokenizer.tokenize(f"{START}user\nuser\nuser{END}")
    assert header == [START, "user", "\n", *"user\nuser", END]


def test_think_tags_survive_decoding_without_special_tokens():
    tokenizer = character_tokenizer(ALPHABET)
    ids = tokenizer.encode(f"<think>1</think>2{END}", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>1</think>2"


def test_saved_tokenizer_is_the_same(folder):
    from transformers import AutoTokenizer

    loaded, made = AutoTokenizer.from_pretrained(folder), character_tokenizer(ALPHABET)
    messages = [{"role": "user", "content": "1+1=? user\n"}, {"role": "assistant", "content": "<think>1\n</think>2"}]
    assert loaded.apply_chat_template(messages, tokenize=False) == made.apply_chat_template(messages, tokenize=False)
    assert loaded.apply_chat_template(messages)["input_ids"] == made.apply_chat_template(messages)["input_ids"]
    assert loaded.get_vocab() == made.get_vocab() and loaded.eos_token == END and loaded.is_fast
    assert loaded.decode(loaded.encode("1 , ?")) == "1 , ?" and loaded.model_max_length == CONFIG.max_length


@pytest.mark.parametrize(
    "config", [CONFIG, TinyQwen3Config(alphabet="01", num_layers=1, num_kv_heads=2, head_dim=64, initializer_range=0.1)]
)
def test_folder_is_what_transformers_would_make(config, tmp_path):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen3ForCausalLM

    make_tiny_qwen3(config, seed=0, folder=tmp_path / "model")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert isinstance(loaded, Qwen3ForCausalLM) and loaded.dtype == torch.float32
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert loaded.lm_head.weight.data_ptr() != loaded.model.embed_tokens.weight.data_ptr()
    fresh = Qwen3ForCausalLM(AutoConfig.from_pretrained(tmp_path / "model"))
    for (name, ours), (other, theirs) in zip(loaded.named_parameters(), fresh.named_parameters(), strict=True):
        assert name == other and ours.shape == theirs.shape
        if ours.dim() == 1:
            assert torch.equal(ours, theirs)
        else:
            assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.1)
    assert loaded.config.max_position_embeddings == config.max_length and loaded.config.rope_parameters["rope_theta"] == 10_000.0
    assert loaded.config.eos_token_id == loaded.generation_config.eos_token_id == 3
    assert torch.isfinite(loaded(torch.arange(5)[None]).logits).all()


def test_weights_depend_on_the_seed_only(folder, tmp_path):
    weights = []
    for name, seed in (("same", 3), ("other", 4)):
        make_tiny_qwen3(CONFIG, seed=seed, folder=tmp_path / name)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == (folder / "model.safetensors").read_bytes() != weights[1]


def test_making_imports_no_torch(tmp_path):
    code = (
        "import sys; from pathlib import Path; from bregman.models.config import TinyQwen3Config\n"
        "from bregman.models.tiny.make import make_tiny_qwen3\n"
        "assert 'transformers' not in sys.modules\n"
        f"make_tiny_qwen3(TinyQwen3Config(alphabet='01'), 0, Path({str(tmp_path / 'x')!r})); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


def test_existing_folder_is_left_alone(folder):
    before = sorted(os.listdir(folder.parent))
    with pytest.raises(DataError, match="already exists; remove it"):
        make_tiny_qwen3(CONFIG, seed=9, folder=folder)
    assert sorted(os.listdir(folder.parent)) == before


def test_nothing_is_left_behind_when_writing_fails(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(DataError, match="cannot be written .*No space left"):
        make_tiny_qwen3(CONFIG, seed=0, folder=tmp_path / "model")
    assert not os.listdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        make_tiny_qwen3(CONFIG, seed=0, folder=tmp_path / "file" / "model")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"alphabet": ""}, "at least 1 character"),
        ({"alphabet": "0120"}, "has '0' more than once"),
        ({"alphabet": "01", "num_heads": 4, "num_kv_heads": 3}, r"num_heads \(4\) must be a multiple of num_kv_heads \(3\)"),
        ({"alphabet": "01", "head_dim": 24}, "Input should be 32, 64"),
    ],
)
def test_bad_configs(fields, expected):
    with pytest.raises(ValidationError, match=expected):
        TinyQwen3Config(**fields)
