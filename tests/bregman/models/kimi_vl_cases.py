"""What the tests of Kimi-VL share: a tiny model with weights large enough to see rounding, drawn images, sequences that show them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from bregman.data.packing import pack
from bregman.models.config import TinyKimiVLConfig
from bregman.models.tiny.kimi_vl import make_tiny_kimi_vl
from bregman.types import ImagePatches, PackedBatch, Sequence

SMALL = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "num_experts": 4, "expert_size": 32}
CONFIG = TinyKimiVLConfig(**SMALL, vision_hidden_size=32, vision_intermediate_size=48, vision_positions=6, initializer_range=0.15)


def make_model(folder: Path, config: TinyKimiVLConfig = CONFIG) -> Path:
    make_tiny_kimi_vl(config, 0, folder)
    return folder


def image(rows: int, columns: int, seed: int = 0) -> ImagePatches:
    """Noise of that many patches."""
    pixels = np.random.default_rng([rows, columns, seed]).standard_normal((rows * columns, 3, 14, 14), np.float32)
    return ImagePatches(pixels=pixels, grid=(rows, columns), num_tokens=rows * columns // 4)


def sequence(*images: ImagePatches, text: int = 7, seed: int = 0) -> Sequence:
    """Random tokens; the tokens of each image stand after one of text."""
    rng = np.random.default_rng([seed, len(images)])
    positions, length = [], 0
    for shown in images:
        positions.append(np.arange(length + 1, length + 1 + shown.num_tokens))
        length += 1 + shown.num_tokens
    length += text
    loss_mask = np.arange(length) >= length - text + 1
    places = np.concatenate(positions) if images else None
    return Sequence(token_ids=rng.integers(0, 256, length), loss_mask=loss_mask, images=images, image_positions=places)


def one_pack(*sequences: Sequence) -> PackedBatch:
    (batch,) = pack(sequences, token_budget=10_000, normalizer=5.0)
    return batch


def arguments(batch: PackedBatch) -> dict[str, Any]:
    """What `PolicyModel.forward` takes."""
    names = ("pixel_values", "image_grid", "image_positions", "image_rows")
    images = {name: value for name in names if (value := getattr(batch, name)) is not None}
    return {"token_ids": batch.token_ids, "position_ids": batch.position_ids, "boundaries": batch.boundaries, **images}


def nll_loss(logprobs: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return -logprobs[batch.loss_mask].sum() / batch.normalizer, {"tokens": batch.loss_mask.sum()}
