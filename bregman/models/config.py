"""Which model a run starts from.

Owns the `model:` section; building and loading live beside it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field, PositiveFloat, PositiveInt

from bregman.config import Config

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Sizes of attention heads that vLLM has on a CPU."""


class HFModelConfig(Config):
    """A checkpoint in Hugging Face format: a folder, or a hub id that is already in the local cache or can be fetched."""

    kind: Literal["hf"] = "hf"
    path: str = Field(description="folder or hub id")
    revision: str | None = None
    config: str | None = Field(
        None, description="a config.json, relative to the recipe, that `check` plans memory with where the model itself is not at hand"
    )


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


class TinyKimiVLConfig(Config):
    """A small random Kimi-VL (MoonViT, projector, DeepSeek-V3 with latent attention and experts), made on the spot.

    The head sizes are the smallest that vLLM's CPU attention and the expert sizes that its CPU expert kernel take.
    """

    kind: Literal["tiny_kimi_vl"] = "tiny_kimi_vl"
    alphabet: str = Field("", description="characters beyond ASCII that are one token each; every byte is a token anyway")
    hidden_size: PositiveInt = Field(96, multiple_of=32)
    num_layers: PositiveInt = Field(3, description="the first is dense, the others have experts")
    num_heads: PositiveInt = 4
    nope_head_dim: PositiveInt = Field(16, description="part of a query and key without rotation")
    rope_head_dim: PositiveInt = Field(16, multiple_of=2, description="rotated part of a query and key")
    value_head_dim: PositiveInt = 32
    kv_lora_rank: PositiveInt = Field(32, description="width of the latent that keys and values are made of")
    intermediate_size: PositiveInt = Field(256, description="of the dense layer")
    num_experts: PositiveInt = 8
    experts_per_token: PositiveInt = 2
    shared_experts: PositiveInt = 1
    expert_size: PositiveInt = Field(64, multiple_of=32)
    routed_scaling: PositiveFloat = Field(2.446, description="Kimi-VL-A3B")
    vision_layers: PositiveInt = 2
    vision_hidden_size: PositiveInt = 64
    vision_heads: PositiveInt = 2
    vision_intermediate_size: PositiveInt = 128
    vision_positions: PositiveInt = Field(16, description="side of the grid of learned positions (64 in Kimi-VL)")
    max_image_patches: PositiveInt = Field(256, description="patches of 14 x 14 pixels to which larger images are scaled down")
    max_length: PositiveInt = Field(512, description="positions of the model: tokens of prompt and response together")
    rope_theta: PositiveFloat = 10_000.0
    rms_norm_eps: PositiveFloat = Field(1e-5, description="Kimi-VL-A3B")
    initializer_range: PositiveFloat = Field(0.02, description="standard deviation of the random weights")

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> TinyKimiVLConfig:
        query = self.nope_head_dim + self.rope_head_dim
        if query not in CPU_HEAD_SIZES:
            raise ValueError(f"nope_head_dim + rope_head_dim is {query}; vLLM's CPU attention has {', '.join(map(str, CPU_HEAD_SIZES))}")
        if self.value_head_dim > query:
            raise ValueError(f"value_head_dim ({self.value_head_dim}) must be <= nope_head_dim + rope_head_dim ({query})")
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"experts_per_token ({self.experts_per_token}) must be <= num_experts ({self.num_experts})")
        if self.vision_hidden_size % (4 * self.vision_heads):
            raise ValueError(
                f"vision_hidden_size ({self.vision_hidden_size}) must be a multiple of 4 * vision_heads ({4 * self.vision_heads})"
            )
        return self


ModelConfig = Annotated[HFModelConfig | TinyQwen3Config | TinyKimiVLConfig, Field(discriminator="kind")]
