"""Makes a small random model with its tokenizer as a Hugging Face folder, so that a run needs no download.

Owns architecture and initialisation of tiny models; the vocabulary lives in `bregman.models.tiny.tokenizer`. Weights are drawn
here with numpy and configs as JSON: importing the model class would cost the start of a laptop run seven seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bregman.errors import DataError
from bregman.models.config import TinyQwen3Config
from bregman.models.tiny.tokenizer import character_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def make_tiny_qwen3(config: TinyQwen3Config, seed: int, folder: Path) -> None:
    """Write a random float32 Qwen3 with untied embeddings to `folder`: weights, config, tokenizer, generation config.

    The same `config` and `seed` give the same bytes of weights. The folder is written aside and renamed, so that it is
    complete if it exists.

    Raises:
        DataError: `folder` exists already, or cannot be written.
    """
    with new_folder(folder) as aside:
        _write(config, seed, aside)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write a model into, renamed to `folder` at the end of the block, or removed if the block fails.

    Raises:
        DataError: `folder` exists already, or cannot be written.
    """
    if folder.exists():
        raise DataError(str(folder), "already exists", "remove it or choose another folder for the model")
    aside: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
        yield aside
        aside.chmod(0o755)  # mkdtemp makes it private
        os.replace(aside, folder)
    except OSError as error:
        raise DataError(str(folder), f"cannot be written ({error})", "choose another folder or free some space") from None
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def _write(config: TinyQwen3Config, seed: int, folder: Path) -> None:
    from safetensors.numpy import save_file

    tokenizer = character_tokenizer(config.alphabet)
    tokenizer.model_max_length = config.max_length
    tokenizer.save_pretrained(folder)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    architecture = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": len(tokenizer),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": False,  # weight sync into vLLM on a CPU is wrong with tied embeddings
        "dtype": "float32",
        **special,
    }
    (folder / "config.json").write_text(json.dumps(architecture, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, **special}, indent=2) + "\n")
    random = np.random.default_rng(seed)
    weights = {
        # norm weights start at one, everything else is normal: transformers' initialisation of Qwen3
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else random.standard_normal(shape, np.float32) * np.float32(config.initializer_range)
        for name, shape in _shapes(config, tokenizer)
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _shapes(config: TinyQwen3Config, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every parameter of `Qwen3ForCausalLM`, as (name, shape)."""
    width, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_heads * head, config.num_kv_heads * head
    yield "model.embed_tokens.weight", (len(tokenizer), width)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (width,)
        yield f"{prefix}.self_attn.q_proj.weight", (queries, width)
        yield f"{prefix}.self_attn.k_proj.weight", (keys, width)
        yield f"{prefix}.self_attn.v_proj.weight", (keys, width)
        yield f"{prefix}.self_attn.o_proj.weight", (width, queries)
        yield f"{prefix}.self_attn.q_norm.weight", (head,)
        yield f"{prefix}.self_attn.k_norm.weight", (head,)
        yield f"{prefix}.post_attention_layernorm.weight", (width,)
        yield f"{prefix}.mlp.gate_proj.weight", (inner, width)
        yield f"{prefix}.mlp.up_proj.weight", (inner, width)
        yield f"{prefix}.mlp.down_proj.weight", (width, inner)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (len(tokenizer), width)
