"""Configuration of Kimi-VL as its published `config.json` lays it out.

Owns sizes and defaults; what they mean lives in `moonvit`, `projector` and `modeling`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import DeepseekV3Config, PreTrainedConfig


@strict
class MoonViTConfig(PreTrainedConfig):
    """The vision encoder; the defaults are those of Kimi-VL-A3B (SigLIP-SO-400M's shape)."""

    model_type = "moonvit"
    base_config_key = "vision_config"

    patch_size: int = 14
    init_pos_emb_height: int = 64
    init_pos_emb_width: int = 64
    num_attention_heads: int = 16
    num_hidden_layers: int = 27
    hidden_size: int = 1152
    intermediate_size: int = 4304
    merge_kernel_size: tuple[int, int] | list[int] = (2, 2)

    def validate_architecture(self) -> None:
        """Raise ValueError on sizes that do not fit one another; called once all are known."""
        if self.hidden_size % (4 * self.num_attention_heads):
            found = f"vision_config.hidden_size ({self.hidden_size}) is no multiple of 4 x num_attention_heads ({self.num_attention_heads})"
            raise ValueError(f"{found}, which rotation in two dimensions needs")
        if len(self.merge_kernel_size) != 2 or min(self.merge_kernel_size) < 1:
            raise ValueError(f"vision_config.merge_kernel_size is {self.merge_kernel_size}, not [rows, columns]")


@strict
class KimiVLConfig(PreTrainedConfig):
    """Vision encoder, projector and language model.

    `text_config` is read as DeepSeek-V3's, the architecture of the published checkpoints, whatever model type it names.
    """

    model_type = "kimi_vl"
    sub_configs: ClassVar = {"text_config": DeepseekV3Config, "vision_config": MoonViTConfig}

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    media_placeholder_token_id: int = 163605
    ignore_index: int = -100
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for name, part in (("text_config", self.text_config), ("vision_config", self.vision_config)):
            if not isinstance(part, dict | PreTrainedConfig | None):
                raise ValueError(f"{name} is a {type(part).__name__}, not an object")
        if not isinstance(self.text_config, PreTrainedConfig):
            settings = {key: value for key, value in (self.text_config or {}).items() if key != "model_type"}
            self.text_config = DeepseekV3Config(**settings)
        if not isinstance(self.vision_config, PreTrainedConfig):
            settings = {key: value for key, value in (self.vision_config or {}).items() if key != "model_type"}
            self.vision_config = MoonViTConfig(**settings)
        kwargs.pop("auto_map", None)  # it points at code that comes with a checkpoint; this package is that code
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """With `rope_theta` and `rope_scaling` where readers of published checkpoints look for them too."""
        result = super().to_dict()
        rope = dict(self.text.rope_parameters or {})
        scaled = rope.get("rope_type", "default") != "default"
        result["text_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope if scaled else None}
        return result

    @property
    def vision(self) -> MoonViTConfig:
        assert isinstance(self.vision_config, MoonViTConfig)
        return self.vision_config

    @property
    def text(self) -> DeepseekV3Config:
        assert isinstance(self.text_config, DeepseekV3Config)
        return self.text_config
