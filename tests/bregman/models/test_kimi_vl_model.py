"""Kimi-VL: the published layout round-trips bit for bit, packed equals alone, positions follow their formulas."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kimi_vl_cases import CONFIG, arguments, image, make_model, one_pack, sequence
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.core_model_loading import revert_weight_conversion

from bregman.errors import DataError
from bregman.models import attention
from bregman.models.config import TinyKimiVLConfig
from bregman.models.kimi_vl.configuration import KimiVLConfig
from bregman.models.kimi_vl.modeling import KimiVLForConditionalGeneration, register
from bregman.models.kimi_vl.moonvit import MoonViT, PositionEmbedding, rotary_2d, rotate
from bregman.models.kimi_vl.projector import merge_order
from bregman.models.loading import load_policy
from bregman.models.meta import meta_model
from bregman.models.policy import PolicyModel
from bregman.models.tiny.kimi_vl import shapes
from bregman.models.vision import load_image_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "kimi")


@pytest.fixture(scope="module")
def policy(folder: Path) -> PolicyModel:
    torch.set_num_threads(1)
    return load_policy(folder).requires_grad_(False)


# Layout -------------------------------------------------------------------------------------------------------------------------------

BLOCK = {
    "norm0.weight": (1152,),
    "norm0.bias": (1152,),
    "norm1.weight": (1152,),
    "norm1.bias": (1152,),
    "wqkv.weight": (3456, 1152),
    "wqkv.bias": (3456,),
    "wo.weight": (1152, 1152),
    "wo.bias": (1152,),
    "mlp.fc0.weight": (4304, 1152),
    "mlp.fc0.bias": (4304,),
    "mlp.fc1.weight": (1152, 4304),
    "mlp.fc1.bias": (1152,),
}
LAYER = {
    "input_layernorm.weight": (2048,),
    "post_attention_layernorm.weight": (2048,),
    "self_attn.q_proj.weight": (16 * 192, 2048),
    "self_attn.kv_a_proj_with_mqa.weight": (576, 2048),
    "self_attn.kv_a_layernorm.weight": (512,),
    "self_attn.kv_b_proj.weight": (16 * 256, 512),
    "self_attn.o_proj.weight": (2048, 2048),
}
EXPERTS = {
    "mlp.gate.weight": (64, 2048),
    "mlp.gate.e_score_correction_bias": (64,),
    "mlp.shared_experts.gate_proj.weight": (2816, 2048),
    "mlp.shared_experts.up_proj.weight": (2816, 2048),
    "mlp.shared_experts.down_proj.weight": (2048, 2816),
    **{f"mlp.experts.{e}.{side}_proj.weight": (1408, 2048) for e in range(64) for side in ("gate", "up")},
    **{f"mlp.experts.{e}.down_proj.weight": (2048, 1408) for e in range(64)},
}
FULL_SIZE = {
    "vision_tower.patch_embed.proj.weight": (1152, 3, 14, 14),
    "vision_tower.patch_embed.proj.bias": (1152,),
    "vision_tower.patch_embed.pos_emb.weight": (64, 64, 1152),
    "vision_tower.encoder.final_layernorm.weight": (1152,),
    "vision_tower.encoder.final_layernorm.bias": (1152,),
    **{f"vision_tower.encoder.blocks.{n}.{name}": shape for n in range(27) for name, shape in BLOCK.items()},
    "multi_modal_projector.pre_norm.weight": (1152,),
    "multi_modal_projector.pre_norm.bias": (1152,),
    "multi_modal_projector.linear_1.weight": (4608, 4608),
    "multi_modal_projector.linear_1.bias": (4608,),
    "multi_modal_projector.linear_2.weight": (2048, 4608),
    "multi_modal_projector.linear_2.bias": (2048,),
    "language_model.model.embed_tokens.weight": (163840, 2048),
    "language_model.model.norm.weight": (2048,),
    "language_model.lm_head.weight": (163840, 2048),
    **{f"language_model.model.layers.{n}.{name}": shape for n in range(27) for name, shape in LAYER.items()},
    **{f"language_model.model.layers.{n}.{name}": shape for n in range(1, 27) for name, shape in EXPERTS.items()},
    "language_model.model.layers.0.mlp.gate_proj.weight": (11264, 2048),
    "language_model.model.layers.0.mlp.up_proj.weight": (11264, 2048),
    "language_model.model.layers.0.mlp.down_proj.weight": (2048, 11264),
}
PUBLISHED_TEXT = {
    "vocab_size": 163840,
    "max_position_embeddings": 131072,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "routed_scaling_factor": 2.446,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "n_group": 1,
    "topk_group": 1,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 800000.0,
    "rope_scaling": None,
}
PUBLISHED_VISION = {
    "model_type": "moonvit",
    "patch_size": 14,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "init_pos_emb_height": 64,
    "init_pos_emb_width": 64,
    "merge_kernel_size": [2, 2],
}


def test_the_full_size_model_has_the_published_names_and_shapes() -> None:
    config = KimiVLConfig(text_config=PUBLISHED_TEXT, vision_config=PUBLISHED_VISION, auto_map={"AutoConfig": "remote.code"})
    with torch.device("meta"):
        model = KimiVLForConditionalGeneration(config)
    found = {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, model.state_dict()).items()}
    assert found == FULL_SIZE
    assert sum(p.numel() for p in model.language_model.parameters()) == 15_960_110_208 - 26 * 64  # without the correction biases
    assert not hasattr(config, "auto_map")
    written = config.to_dict()
    assert written["model_type"] == "kimi_vl" and written["media_placeholder_token_id"] == 163605
    assert {key: written["text_config"][key] for key in PUBLISHED_TEXT} == PUBLISHED_TEXT
    assert {key: written["vision_config"][key] for key in PUBLISHED_VISION} == PUBLISHED_VISION


def test_the_layout_round_trips_bit_for_bit(folder: Path, policy: PolicyModel, tmp_path: Path) -> None:
    policy.model.save_pretrained(tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert {name: tuple(tensor.shape) for name, tensor in before.items()} == dict(
        shapes(CONFIG, len(before["language_model.lm_head.weight"]))
    )
    old, new = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path))
    assert new["model_type"] == "kimi_vl" and new["architectures"] == ["KimiVLForConditionalGeneration"]
    for part in ("text_config", "vision_config"):
        changed = {key: new[part].get(key) for key, value in old[part].items() if new[part].get(key) != value}
        assert set(changed.values()) <= {None}  # what equals a default may be left out


def test_a_published_config_without_model_types_loads(folder: Path, tmp_path: Path, policy: PolicyModel) -> None:
    shutil.copytree(folder, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        del config[part]["model_type"]
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_kimi_vl.KimiVLForConditionalGeneration"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    batch = one_pack(sequence(image(2, 2)))
    assert torch.equal(load_policy(tmp_path / "m")(**arguments(batch)), policy(**arguments(batch)))


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("vision_config", {"num_attention_heads": 3}, r"hidden_size \(32\) is no multiple of 4 x num_attention_heads \(3\)"),
        ("vision_config", {"merge_kernel_size": [2]}, r"merge_kernel_size is \[2\], not \[rows, columns\]"),
        ("text_config", {"hidden_size": "wide"}, "'hidden_size' expected int, got str"),
        ("text_config", {"hidden_act": "none"}, "none"),
        ("text_config", None, "text_config is a list, not an object"),
        (None, None, "model_type"),
    ],
)
def test_malformed_configurations_are_one_line_errors(folder: Path, tmp_path: Path, part: str, changes: dict, message: str) -> None:
    shutil.copytree(folder, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    if part:
        config[part] = {**config[part], **changes} if changes else [1]
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(config if part else [config]))
    for load in (lambda: load_policy(file.parent), lambda: meta_model(file)):
        with pytest.raises(DataError, match=message) as error:
            load()
        assert "\n" not in str(error.value)
    assert part or load_image_encoder(file.parent) is None  # whoever loads the model says what is wrong


def test_auto_classes_know_the_model_where_vllm_does_not_need_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[str] = []
    for auto in (AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText):
        monkeypatch.setattr(auto, "register", lambda *_, auto=auto, **__: known.append(auto.__name__))
    monkeypatch.setitem(sys.modules, "vllm", None)
    register()
    assert known == []
    monkeypatch.delitem(sys.modules, "vllm")
    register()
    assert known == ["AutoConfig", "AutoModelForCausalLM", "AutoModelForImageTextToText"]


def test_missing_weights_are_not_made_up(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    del weights["vision_tower.encoder.blocks.0.wo.weight"]
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"1 weights are missing, vision_tower.encoder.blocks.0.wo.weight"):
        load_policy(tmp_path / "m")


def test_both_latent_norms_use_the_eps_of_the_model(policy: PolicyModel) -> None:
    norms = [m for m in policy.model.language_model.modules() if type(m).__name__ == "DeepseekV3RMSNorm"]
    assert {norm.variance_epsilon for norm in norms} == {CONFIG.rms_norm_eps}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nope_head_dim": 20}, "nope_head_dim"),
        ({"value_head_dim": 64}, "value_head_dim"),
        ({"experts_per_token": 9}, "experts_per_token"),
        ({"vision_heads": 3}, "vision_heads"),
        ({"hidden_size": 40}, "hidden_size"),
    ],
)
def test_sizes_that_vllm_does_not_have_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TinyKimiVLConfig(**settings)


def test_the_same_seed_makes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = make_model(tmp_path / "again")
    for name in ("model.safetensors", "config.json", "tiktoken.model", "preprocessor_config.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


# Packing ------------------------------------------------------------------------------------------------------------------------------

SHARED = image(4, 2, seed=9)
PACKS = {
    "text": [sequence(), sequence(text=12, seed=1)],
    "one image": [sequence(image(4, 6)), sequence(seed=1)],
    "two images of different sizes": [sequence(image(2, 8), image(6, 4)), sequence(image(2, 2), seed=1)],
    "images of the same size": [sequence(image(2, 4), image(2, 4, seed=1)), sequence(image(2, 4, seed=2), seed=1)],
    "a shared image": [sequence(SHARED), sequence(image(2, 2), SHARED, seed=1), sequence(SHARED, seed=2)],
}


@pytest.mark.parametrize("name", PACKS)
def test_packed_equals_alone(policy: PolicyModel, name: str) -> None:
    sequences = PACKS[name]
    together = policy(**arguments(one_pack(*sequences)))
    alone = torch.cat([policy(**arguments(one_pack(each))) for each in sequences])
    torch.testing.assert_close(together, alone, atol=3e-6, rtol=0)
    if name != "text":  # the images matter
        pixels = {"pixel_values": arguments(one_pack(*sequences))["pixel_values"].flip(0)}
        assert (policy(**arguments(one_pack(*sequences)) | pixels) - together).abs().max() > 1e-3


def test_a_shared_image_is_encoded_once(policy: PolicyModel) -> None:
    batch = one_pack(*PACKS["a shared image"])
    assert batch.image_grid is not None and batch.image_grid.tolist() == [[4, 2], [2, 2]]


def test_a_pack_of_text_does_not_touch_the_vision_part(policy: PolicyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(policy.model.vision_tower, "forward", lambda *_: calls.append(1))
    policy(**arguments(one_pack(sequence())))
    assert calls == []


def test_a_dummy_image_changes_no_bit(policy: PolicyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = arguments(one_pack(sequence()))
    plain = policy(**batch)
    monkeypatch.setattr(policy.model, "always_encode", True)
    assert torch.equal(policy(**batch), plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_rows": [0, 1]}, "3 image placeholders but 2 image tokens"),
        ({"image_rows": [0, 1, 1]}, "ask for 2 image tokens, the images have 3"),
        ({"image_rows": [0, 1, 3]}, "ask for 4 image tokens, the images have 3"),
        ({"image_positions": [1, 2, 90]}, "at position 90 of 11"),
        ({"image_grid": [[2, 4]]}, "have 8 patches, pixel_values 12"),
        ({"image_grid": [[3, 4]]}, "3 x 4 patches cannot be merged"),
        ({"pixel_values": None}, "3 image placeholders but no pixel_values"),
        ({"image_grid": None}, "need image_grid"),
        ({"image_positions": [], "image_rows": []}, "ask for 0 image tokens, the images have 3"),
    ],
)
def test_counts_that_do_not_fit_are_errors(policy: PolicyModel, change: dict, message: str) -> None:
    fields = {name: None if value is None else torch.tensor(value, dtype=torch.int64) for name, value in change.items()}
    batch = replace(one_pack(sequence(image(2, 6))), **fields)
    with pytest.raises(ValueError, match=message):
        policy(**arguments(batch))


def test_narrower_values_fit_the_flash_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel for GPUs wants values as wide as keys; a stand-in for it sees them padded, and the result is that of the CPU."""
    import torch.nn.attention.varlen as varlen

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, scale: float, **__: Any) -> torch.Tensor:
        assert query.shape == key.shape == value.shape
        each = (states.transpose(0, 1)[None] for states in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(*each, is_causal=True, scale=scale)[0].transpose(0, 1)

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    query, key, value = torch.randn(1, 2, 9, 12), torch.randn(1, 2, 9, 12), torch.randn(1, 2, 9, 8)
    ends = torch.tensor([0, 9], dtype=torch.int32)
    found = attention._flash(query, key, value, (ends, ends), (9, 9), 0.3, None)
    expected, _ = attention.varlen_attention(torch.nn.Module(), query, key, value, None, scaling=0.3, cu_seq_lens_q=ends, max_length_q=9)
    torch.testing.assert_close(found, expected)


# Positions ----------------------------------------------------------------------------------------------------------------------------


def cubic(distance: float, a: float = -0.75) -> float:
    x = abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resize_matrix(target: int, source: int) -> np.ndarray:
    matrix = np.zeros((target, source))
    for i in range(target):
        center = (i + 0.5) * source / target - 0.5
        for tap in range(math.floor(center) - 1, math.floor(center) + 3):
            matrix[i, min(max(tap, 0), source - 1)] += cubic(center - tap)
    return matrix


@pytest.mark.parametrize("grid", [(6, 5), (2, 2), (9, 4), (12, 16)])
def test_absolute_positions_are_interpolated_bicubically(grid: tuple[int, int]) -> None:
    embedding = PositionEmbedding(6, 5, 3)
    torch.nn.init.normal_(embedding.weight)
    rows, columns = resize_matrix(grid[0], 6), resize_matrix(grid[1], 5)
    expected = np.einsum("iy,jx,yxd->ijd", rows, columns, embedding.weight.detach().double().numpy()).reshape(-1, 3)
    found = embedding([(2, 2), grid])[4:]
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), atol=2e-6, rtol=1e-5)


def test_2d_rope_turns_even_pairs_with_the_column_and_odd_pairs_with_the_row() -> None:
    grids, heads, dim = [(2, 3), (4, 1)], 2, 8
    states = torch.randn(10, heads, dim)
    found = rotate(states, rotary_2d(grids, dim, torch.device("cpu")))
    places = [(row, column) for rows, columns in grids for row in range(rows) for column in range(columns)]
    expected = torch.empty_like(states)
    for patch, (row, column) in enumerate(places):
        for pair in range(dim // 2):
            angle = (row if pair % 2 else column) * 10000 ** (-4 * (pair // 2) / dim)
            x, y = states[patch, :, 2 * pair], states[patch, :, 2 * pair + 1]
            expected[patch, :, 2 * pair] = x * math.cos(angle) - y * math.sin(angle)
            expected[patch, :, 2 * pair + 1] = x * math.sin(angle) + y * math.cos(angle)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_moonvit_equals_attention_under_a_mask(policy: PolicyModel) -> None:
    """One block with a plain softmax over all patches of all images, those of other images masked."""
    tower: MoonViT = policy.model.vision_tower
    grids = [(2, 4), (4, 2), (2, 2)]
    lengths = [8, 8, 4]
    pixels = torch.randn(20, 3, 14, 14)
    hidden = tower.patch_embed(pixels, grids)
    convolved = tower.patch_embed.proj(pixels).flatten(1) + tower.patch_embed.pos_emb(grids)
    torch.testing.assert_close(hidden, convolved, atol=1e-5, rtol=1e-5)
    rotation = rotary_2d(grids, 16, pixels.device)
    owner = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    for block in tower.encoder.blocks:
        query, key, value = block.wqkv(block.norm0(hidden)).view(20, 3, 2, 16).unbind(1)
        scores = torch.einsum("qhd,khd->hqk", rotate(query, rotation), rotate(key, rotation)) / 4.0
        weights = scores.masked_fill(owner[:, None] != owner, -math.inf).softmax(-1)
        middle = hidden + block.wo(torch.einsum("hqk,khd->qhd", weights, value).flatten(1))
        expected = middle + block.mlp(block.norm1(middle))
        hidden = block(hidden, rotation, lengths)
        torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)


def test_neighbouring_patches_are_merged_row_by_row() -> None:
    assert merge_order([(2, 4)], (2, 2)).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert merge_order([(2, 2), (4, 2)], (2, 2)).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_fsdp_units_name_classes_that_exist(policy: PolicyModel) -> None:
    present = {type(module).__name__ for module in policy.model.modules()}
    assert set(policy.model._no_split_modules) == {"DeepseekV3DecoderLayer", "MoonViTBlock"} <= present
    assert re.fullmatch(
        r"vision_tower\.encoder\.blocks\.\d+", next(n for n, m in policy.model.named_modules() if type(m).__name__ == "MoonViTBlock")
    )
