"""Which model a run starts from.

Owns the `model:` section; building and loading live beside it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
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
    alphabet: str = Field(min_length=1, description="the characters of the vocabulary, besides newline, ChatML and think tokens")
    hidden_size: PositiveInt = 96
    num_layers: PositiveInt = 3
    num_heads: PositiveInt = 4
    num_kv_heads: PositiveInt = 4
    head_dim: Literal[32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512] = Field(32, description="a size vLLM's CPU attention has")
    intermediate_size: PositiveInt = 256
    max_length: PositiveInt = Field(512, description="positions of the model: tokens of prompt and response together")
    rope_theta: PositiveFloat = 10_000.0
    rms_norm_eps: PositiveFloat = 1e-6
    initializer_range: PositiveFloat = Field(0.02, description="standard deviation of the random weights")

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> TinyQwen3Config:
        twice = sorted({character for character in self.alphabet if self.alphabet.count(character) > 1})
        if twice:
            raise ValueError(f"alphabet has {twice[0]!r} more than once; list each character once")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        return self


ModelConfig = Annotated[HFModelConfig | TinyQwen3Config, Field(discriminator="kind")]
