"""Kimi-VL: MoonViT, projector and a DeepSeek-V3 language model, with weights named as in published checkpoints.

Owns placing image features in a pack of sequences. Registers nothing by being imported: vLLM's processes need their own classes.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from transformers import DeepseekV3ForCausalLM, PreTrainedModel, initialization
from transformers.modeling_outputs import CausalLMOutput, MoeModelOutputWithPast

from bregman.models.kimi_vl.configuration import KimiVLConfig
from bregman.models.kimi_vl.moonvit import MoonViT, PositionEmbedding
from bregman.models.kimi_vl.projector import Projector


class KimiVLForConditionalGeneration(PreTrainedModel):
    """The whole model.

    Attributes:
        always_encode: run the vision part on a dummy image in a pack without images, also where no gradient is wanted. Needed
            where parts of it are gathered from other ranks one by one: every rank must take part.
    """

    config_class = KimiVLConfig
    base_model_prefix = ""
    input_modalities = ["image", "text"]  # noqa: RUF012 (transformers declares these per instance)
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeepseekV3DecoderLayer", "MoonViTBlock"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]  # noqa: RUF012

    def __init__(self, config: KimiVLConfig) -> None:
        super().__init__(config)
        self.vision_tower = MoonViT(config.vision)
        self.multi_modal_projector = Projector(config)
        self.language_model = DeepseekV3ForCausalLM(config.text)
        self.always_encode = False
        for layer in self.language_model.model.layers:
            # transformers builds these two with 1e-6; the published code and vLLM use the model's own eps (log-probs: 2e-5 nats)
            for norm in (layer.self_attn.kv_a_layernorm, layer.self_attn.q_a_layernorm):
                if norm is not None:
                    norm.variance_epsilon = config.text.rms_norm_eps
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.lm_head = value

    def body(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_grid: torch.Tensor | None = None,
        image_positions: torch.Tensor | None = None,
        image_rows: torch.Tensor | None = None,
        **arguments: Any,
    ) -> MoeModelOutputWithPast:
        """Everything but the output head.

        Args:
            input_ids: int64 [1, T].
            pixel_values: [patches, 3, patch, patch] of all distinct images; None for text. So are the next three.
            image_grid: int64 [images, 2], rows and columns of patches.
            image_positions: int64 [F], positions of `input_ids` that take image features.
            image_rows: int64 [F], which row of the features of all distinct images each of them takes.
            arguments: for the language model: position_ids, and boundaries or `context`.

        Returns:
            `last_hidden_state` [1, T, hidden].

        Raises:
            ValueError: image arguments do not fit one another.
        """
        embeddings = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            if image_grid is None or image_positions is None or image_rows is None:
                raise ValueError("pixel_values need image_grid, image_positions and image_rows")
            features = self.image_features(pixel_values, image_grid)
            shared = arguments.get("context") is not None  # the pack's tokens are spread over ranks: some features are for the others
            _check_counts(image_positions, image_rows, len(features), input_ids.shape[1], all_placed=not shared)
            placed = features[image_rows].to(embeddings.dtype)
            embeddings = embeddings[0].index_copy(0, image_positions, placed)[None]
        elif image_positions is not None:
            raise ValueError(f"{len(image_positions)} image placeholders but no pixel_values")
        elif self._dummy_needed():
            embeddings = embeddings + 0.0 * self._dummy_features().sum().to(embeddings.dtype)
        return self.language_model.model(inputs_embeds=embeddings, **arguments)

    def forward(self, input_ids: torch.Tensor, **arguments: Any) -> CausalLMOutput:
        """`body` and the head: logits [1, T, vocabulary]."""
        hidden = self.body(input_ids, **arguments).last_hidden_state
        return CausalLMOutput(logits=self.get_output_embeddings()(hidden))

    def image_features(self, pixel_values: torch.Tensor, image_grid: torch.Tensor) -> torch.Tensor:
        """Vectors that stand for images in the text; [image tokens, hidden].

        Raises:
            ValueError: the grids do not describe the patches, or cannot be merged.
        """
        grids = [(int(rows), int(columns)) for rows, columns in image_grid.tolist()]
        if (patches := sum(rows * columns for rows, columns in grids)) != len(pixel_values):
            raise ValueError(f"the image grids have {patches} patches, pixel_values {len(pixel_values)}")
        return self.multi_modal_projector(self.vision_tower(pixel_values, grids), grids)

    def _dummy_needed(self) -> bool:
        """Sharded gradients are reduced together: a rank whose packs have no images must have (zero) gradients for the same
        parameters as the others."""
        if self.always_encode:
            return True
        return torch.is_grad_enabled() and any(
            parameter.requires_grad for part in (self.vision_tower, self.multi_modal_projector) for parameter in part.parameters()
        )

    def _dummy_features(self) -> torch.Tensor:
        vision = self.config.vision
        rows, columns = vision.merge_kernel_size
        pixels = torch.zeros(rows * columns, 3, vision.patch_size, vision.patch_size, device=self.device)
        return self.image_features(pixels, torch.tensor([[rows, columns]]))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PositionEmbedding):
            initialization.normal_(module.weight, std=0.02)


def register() -> None:
    """Make transformers' Auto classes know Kimi-VL; does nothing where vLLM is loaded, which asserts configuration classes of its own."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    from bregman.models.kimi_vl import processor

    if "vllm" in sys.modules:
        return
    AutoConfig.register("kimi_vl", KimiVLConfig, exist_ok=True)
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        auto.register(KimiVLConfig, KimiVLForConditionalGeneration, exist_ok=True)
    processor.register(KimiVLConfig)


def _check_counts(positions: torch.Tensor, rows: torch.Tensor, num_features: int, num_tokens: int, *, all_placed: bool) -> None:
    if len(positions) != len(rows):
        raise ValueError(f"{len(positions)} image placeholders but {len(rows)} image tokens for them")
    needed, last = torch.stack([rows.max() + 1, positions.max()]).tolist() if len(rows) else (0, -1)
    if needed > num_features or (all_placed and needed < num_features):
        raise ValueError(f"image placeholders ask for {needed} image tokens, the images have {num_features}")
    if last >= num_tokens:
        raise ValueError(f"an image placeholder stands at position {last} of {num_tokens}")
