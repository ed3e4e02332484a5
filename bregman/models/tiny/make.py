"""Makes a small random model with its tokenizer as a Hugging Face folder, so that a run needs no download.

Owns architecture and initialisation of tiny models; the vocabulary lives in `bregman.models.tiny.tokenizer`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from bregman.errors import DataError
from bregman.models.config import TinyQwen3Config
from bregman.models.tiny.tokenizer import character_tokenizer


def make_tiny_qwen3(config: TinyQwen3Config, seed: int, folder: Path) -> None:
    """Write a random float32 Qwen3 with untied embeddings to `folder`: weights, config, tokenizer, generation config.

    The same `config` and `seed` give the same bytes of weights; the global random state is left as it was. The folder is
    written aside and renamed, so that it is complete if it exists.

    Raises:
        DataError: `folder` exists already, or cannot be written.
    """
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    if folder.exists():
        raise DataError(str(folder), "already exists", "remove it or choose another folder for the model")
    tokenizer = character_tokenizer(config.alphabet)
    tokenizer.model_max_length = config.max_length
    architecture = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_length,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rms_norm_eps=config.rms_norm_eps,
        initializer_range=config.initializer_range,
        tie_word_embeddings=False,  # weight sync into vLLM on a CPU is wrong with tied embeddings
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(architecture)
    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise DataError(str(folder), f"cannot be written ({error})", "choose another folder or free some space") from None
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        aside.chmod(0o755)  # mkdtemp makes it private
        os.replace(aside, folder)
    except OSError as error:
        raise DataError(str(folder), f"cannot be written ({error})", "choose another folder or free some space") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
