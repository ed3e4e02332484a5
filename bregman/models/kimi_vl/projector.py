"""From encoded patches to vectors of the language model's width, one per merged block of patches (Kimi-VL report, sec. 2.1).

Owns the order in which patches are merged and `multi_modal_projector.*`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from bregman.models.kimi_vl.configuration import KimiVLConfig


class Projector(nn.Module):
    """LayerNorm of each patch, 2 x 2 neighbours side by side (pixel shuffle), then a two-layer MLP.

    Args:
        config: sizes of both sides.
    """

    def __init__(self, config: KimiVLConfig) -> None:
        super().__init__()
        rows, columns = config.vision.merge_kernel_size
        self._kernel = (int(rows), int(columns))
        width = config.vision.hidden_size
        self.pre_norm = nn.LayerNorm(width, eps=1e-5)
        self.linear_1 = nn.Linear(width * rows * columns, width * rows * columns)
        self.linear_2 = nn.Linear(width * rows * columns, config.text.hidden_size)

    def forward(self, patches: torch.Tensor, grids: Sequence[tuple[int, int]]) -> torch.Tensor:
        """[patches, vision width] -> [image tokens, language model width]."""
        merged = self.pre_norm(patches)[merge_order(grids, self._kernel).to(patches.device)].flatten(1)
        return self.linear_2(F.gelu(self.linear_1(merged)))


def merge_order(grids: Sequence[tuple[int, int]], kernel: tuple[int, int]) -> torch.Tensor:
    """Which patches each image token takes, in the order in which they are joined; int64 [image tokens, rows * columns of `kernel`].

    Raises:
        ValueError: a grid is not a multiple of the kernel.
    """
    orders, start = [], 0
    for rows, columns in grids:
        if rows % kernel[0] or columns % kernel[1] or not rows * columns:
            raise ValueError(f"an image of {rows} x {columns} patches cannot be merged {kernel[0]} x {kernel[1]}; pad it to a multiple")
        index = torch.arange(start, start + rows * columns).view(rows // kernel[0], kernel[0], columns // kernel[1], kernel[1])
        orders.append(index.transpose(1, 2).reshape(-1, kernel[0] * kernel[1]))
        start += rows * columns
    return torch.cat(orders)
