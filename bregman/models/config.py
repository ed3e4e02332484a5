"""Which model a run starts from.

Owns the `model:` section; building and loading live beside it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from bregman.config import Config


class HFModelConfig(Config):
    """A checkpoint in Hugging Face format: a folder, or a hub id that is already in the local cache or can be fetched."""

    kind: Literal["hf"] = "hf"
    path: str = Field(description="folder or hub id")
    revision: str | None = None


class TinyQwen3Config(Config):
    """A small random Qwen3 with a character tokenizer, made on the spot."""

    kind: Literal["tiny_qwen3"] = "tiny_qwen3"
    alphabet: str = Field(description="the characters of the vocabulary, besides the ChatML and think tokens")
    hidden_size: PositiveInt = 96
    num_layers: PositiveInt = 3
    num_heads: PositiveInt = 4
    num_kv_heads: PositiveInt = 4
    head_dim: PositiveInt = 32
    intermediate_size: PositiveInt = 256
    max_length: PositiveInt = 512
    rope_theta: PositiveFloat = 10_000.0


ModelConfig = Annotated[HFModelConfig | TinyQwen3Config, Field(discriminator="kind")]
