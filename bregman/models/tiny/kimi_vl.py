"""Makes a small random Kimi-VL in the published layout, with its tokenizer and image processor, so that a run needs no download.

Owns architecture and initialisation. Weights are drawn here with numpy and configs as JSON, as for other tiny models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bregman.models.config import TinyKimiVLConfig
from bregman.models.tiny.make import new_folder

if TYPE_CHECKING:
    from bregman.models.kimi_vl.image_processing import ImageSettings

PATCH, MERGE = 14, 2


def make_tiny_kimi_vl(config: TinyKimiVLConfig, seed: int, folder: Path) -> None:
    """Write a random float32 Kimi-VL to `folder`: weights, config, tokenizer, image processor, generation config.

    The same `config` and `seed` give the same bytes of weights. The folder is written aside and renamed, so that it is
    complete if it exists.

    Raises:
        DataError: `folder` exists already, or cannot be written.
    """
    with new_folder(folder) as aside:
        _write(config, seed, aside)


def _write(config: TinyKimiVLConfig, seed: int, folder: Path) -> None:
    from safetensors.numpy import save_file

    from bregman.models.kimi_vl.image_processing import write_image_processor
    from bregman.models.kimi_vl.tokenizer import IMAGE_PLACEHOLDER, write_tiny_tokenizer

    tokenizer = write_tiny_tokenizer(folder, config.alphabet, config.max_length)
    write_image_processor(folder, image_settings(config))
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    placeholder = tokenizer.get_vocab()[IMAGE_PLACEHOLDER]
    architecture = architecture_json(config, len(tokenizer), placeholder, special)
    (folder / "config.json").write_text(json.dumps(architecture, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, **special}, indent=2) + "\n")
    random = np.random.default_rng(seed)
    weights = {name: _draw(random, name, shape, config.initializer_range) for name, shape in shapes(config, len(tokenizer))}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def image_settings(config: TinyKimiVLConfig) -> ImageSettings:
    """How images become patches of this model."""
    from bregman.models.kimi_vl.image_processing import ImageSettings

    return ImageSettings(patch_size=PATCH, merge_kernel_size=(MERGE, MERGE), in_token_limit=config.max_image_patches)


def architecture_json(config: TinyKimiVLConfig, vocabulary: int, placeholder: int, special: dict[str, Any]) -> dict[str, Any]:
    """`config.json` in the published layout.

    Args:
        config: sizes.
        vocabulary: number of tokens.
        placeholder: id of the token that stands for image features.
        special: `eos_token_id` and `pad_token_id`.
    """
    text = {
        "model_type": "deepseek_v3",
        "vocab_size": vocabulary,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": config.expert_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "n_shared_experts": config.shared_experts,
        "n_routed_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "routed_scaling_factor": config.routed_scaling,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "kv_lora_rank": config.kv_lora_rank,
        "q_lora_rank": None,
        "qk_nope_head_dim": config.nope_head_dim,
        "qk_rope_head_dim": config.rope_head_dim,
        "v_head_dim": config.value_head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "attention_bias": False,
        "num_nextn_predict_layers": 0,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        **special,
    }
    vision = {
        "model_type": "moonvit",
        "patch_size": PATCH,
        "num_attention_heads": config.vision_heads,
        "num_hidden_layers": config.vision_layers,
        "hidden_size": config.vision_hidden_size,
        "intermediate_size": config.vision_intermediate_size,
        "init_pos_emb_height": config.vision_positions,
        "init_pos_emb_width": config.vision_positions,
        "merge_kernel_size": [MERGE, MERGE],
    }
    return {
        "model_type": "kimi_vl",
        "architectures": ["KimiVLForConditionalGeneration"],
        "text_config": text,
        "vision_config": vision,
        "media_placeholder_token_id": placeholder,
        "ignore_index": -100,
        "tie_word_embeddings": False,
        "vocab_size": vocabulary,
        "dtype": "float32",
        **special,
    }


def shapes(config: TinyKimiVLConfig, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the published layout, as (name, shape)."""
    yield from _vision_shapes(config)
    width = config.hidden_size
    yield "language_model.model.embed_tokens.weight", (vocabulary, width)
    for layer in range(config.num_layers):
        prefix = f"language_model.model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (width,)
        query = config.nope_head_dim + config.rope_head_dim
        yield f"{prefix}.self_attn.q_proj.weight", (config.num_heads * query, width)
        yield f"{prefix}.self_attn.kv_a_proj_with_mqa.weight", (config.kv_lora_rank + config.rope_head_dim, width)
        yield f"{prefix}.self_attn.kv_a_layernorm.weight", (config.kv_lora_rank,)
        keys_and_values = config.num_heads * (config.nope_head_dim + config.value_head_dim)
        yield f"{prefix}.self_attn.kv_b_proj.weight", (keys_and_values, config.kv_lora_rank)
        yield f"{prefix}.self_attn.o_proj.weight", (width, config.num_heads * config.value_head_dim)
        yield f"{prefix}.post_attention_layernorm.weight", (width,)
        if layer == 0:
            yield from _mlp_shapes(f"{prefix}.mlp", width, config.intermediate_size)
            continue
        yield f"{prefix}.mlp.gate.weight", (config.num_experts, width)
        yield f"{prefix}.mlp.gate.e_score_correction_bias", (config.num_experts,)
        for expert in range(config.num_experts):
            yield from _mlp_shapes(f"{prefix}.mlp.experts.{expert}", width, config.expert_size)
        yield from _mlp_shapes(f"{prefix}.mlp.shared_experts", width, config.shared_experts * config.expert_size)
    yield "language_model.model.norm.weight", (width,)
    yield "language_model.lm_head.weight", (vocabulary, width)


def _mlp_shapes(prefix: str, width: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate_proj.weight", (inner, width)
    yield f"{prefix}.up_proj.weight", (inner, width)
    yield f"{prefix}.down_proj.weight", (width, inner)


def _vision_shapes(config: TinyKimiVLConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner = config.vision_hidden_size, config.vision_intermediate_size
    yield "vision_tower.patch_embed.pos_emb.weight", (config.vision_positions, config.vision_positions, width)
    yield "vision_tower.patch_embed.proj.weight", (width, 3, PATCH, PATCH)
    yield "vision_tower.patch_embed.proj.bias", (width,)
    for layer in range(config.vision_layers):
        prefix = f"vision_tower.encoder.blocks.{layer}"
        yield from _norm_shapes(f"{prefix}.norm0", width)
        yield from _norm_shapes(f"{prefix}.norm1", width)
        yield from _linear_shapes(f"{prefix}.wqkv", 3 * width, width)
        yield from _linear_shapes(f"{prefix}.wo", width, width)
        yield from _linear_shapes(f"{prefix}.mlp.fc0", inner, width)
        yield from _linear_shapes(f"{prefix}.mlp.fc1", width, inner)
    yield from _norm_shapes("vision_tower.encoder.final_layernorm", width)
    merged = MERGE * MERGE * width
    yield from _norm_shapes("multi_modal_projector.pre_norm", width)
    yield from _linear_shapes("multi_modal_projector.linear_1", merged, merged)
    yield from _linear_shapes("multi_modal_projector.linear_2", config.hidden_size, merged)


def _norm_shapes(prefix: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.weight", (width,)
    yield f"{prefix}.bias", (width,)


def _linear_shapes(prefix: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.weight", (rows, columns)
    yield f"{prefix}.bias", (rows,)


def _draw(random: np.random.Generator, name: str, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """Biases start at zero, norms at one, everything else is normal: transformers' initialisation."""
    if name.endswith("bias"):
        return np.zeros(shape, np.float32)
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    return random.standard_normal(shape, np.float32) * np.float32(scale)
