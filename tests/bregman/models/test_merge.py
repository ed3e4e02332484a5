"""Merging is the plain weighted average, whatever the files; models that differ are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from kimi_vl_cases import CONFIG
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from bregman.errors import DataError
from bregman.models.kimi_vl.tokenizer import IMAGE_PLACEHOLDER
from bregman.models.loading import load_policy
from bregman.models.merge import merge_models
from bregman.models.tiny.kimi_vl import make_tiny_kimi_vl
from bregman.models.vision import load_image_encoder
from recipes.models import load_tokenizer


def make(folder: Path, seed: int, *, dtype: torch.dtype = torch.float32, shard: str = "1GB", width: int = 16) -> Path:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 31, "hidden_size": width, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False)).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("first", "second"), [("1GB", "1GB"), ("8KB", "1GB"), ("1GB", "8KB")])
def test_is_the_weighted_average(tmp_path: Path, dtype: torch.dtype, first: str, second: str) -> None:
    folders = [make(tmp_path / "a", 0, dtype=dtype, shard=first), make(tmp_path / "b", 1, dtype=dtype, shard=second)]
    (folders[0] / "tokenizer.json").write_text("{}")
    (folders[0] / "pytorch_model.bin").write_text("the weights of the first alone")
    count = merge_models(folders, [3.0, 1.0], tmp_path / "out")
    a, b, merged = (tensors(folder) for folder in (*folders, tmp_path / "out"))
    assert count == len(merged) == len(a)
    for name, tensor in merged.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, (0.75 * a[name].double() + 0.25 * b[name].double()).to(dtype)), name
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in merged.items())


def test_a_model_merged_with_itself_is_itself(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", 0)
    merge_models([folder, folder, folder], [1.0, 1.0, 1.0], tmp_path / "out")
    assert all(torch.allclose(tensor, tensors(folder)[name], rtol=1e-7, atol=0) for name, tensor in tensors(tmp_path / "out").items())


def test_integers_are_the_first_models(tmp_path: Path) -> None:
    for index, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        save_file({"w": torch.ones(2) * index, "steps": torch.tensor([index + 5])}, tmp_path / name / "model.safetensors")
    merge_models([tmp_path / "a", tmp_path / "b"], [1.0, 1.0], tmp_path / "out")
    merged = tensors(tmp_path / "out")
    assert merged["w"].tolist() == [0.5, 0.5]
    assert merged["steps"].tolist() == [5]


def test_a_merged_kimi_vl_opens_like_one(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        make_tiny_kimi_vl(CONFIG, seed, folder)
        weights = load_file(folder / "model.safetensors")
        weights["language_model.model.layers.1.mlp.gate.e_score_correction_bias"].fill_(seed)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    merge_models(folders, [1.0, 3.0], tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {file.name for file in folders[0].iterdir()}
    router = load_policy(tmp_path / "out").model.language_model.model.layers[1].mlp.gate
    assert router.e_score_correction_bias.tolist() == [0.75] * CONFIG.num_experts
    tokenizer, encoder = load_tokenizer(tmp_path / "out"), load_image_encoder(tmp_path / "out")
    assert encoder is not None and tokenizer.get_vocab()[IMAGE_PLACEHOLDER] == encoder.placeholder_id


@pytest.mark.parametrize("case", ["width", "missing", "folder", "broken", "index"])
def test_refuses_by_name(tmp_path: Path, case: str) -> None:
    first, second = make(tmp_path / "a", 0), make(tmp_path / "b", 1, width=24 if case == "width" else 16)
    expected = {
        "width": "`lm_head.weight` has shape [31, 24], in ",
        "missing": "has no tensor `model.norm.weight`",
        "folder": "no model.safetensors in it",
        "broken": "not a safetensors file",
        "index": "not an index of safetensors files",
    }[case]
    if case == "missing":
        kept = tensors(second)
        del kept["model.norm.weight"]
        save_file(kept, second / "model.safetensors")
    elif case == "folder":
        second = tmp_path / "nowhere"
    elif case == "broken":
        (second / "model.safetensors").write_bytes(b"x" * 40)
    elif case == "index":
        (second / "model.safetensors.index.json").write_text(json.dumps([1]))
    with pytest.raises(DataError) as error:
        merge_models([first, second], [1.0, 1.0], tmp_path / "out")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
