"""MoonViT: images of any size, packed into one sequence of patches, to one vector per patch (Kimi-VL report, sec. 2.1).

Owns the encoder with parameters named as in published checkpoints (`vision_tower.*`). Merging patches is the projector's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from bregman.models.kimi_vl.configuration import MoonViTConfig

ROPE_BASE = 10_000.0
Grid = tuple[int, int]


class MoonViT(nn.Module):
    """The encoder.

    Args:
        config: sizes.
    """

    def __init__(self, config: MoonViTConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(config)
        self.encoder = Encoder(config)

    def forward(self, pixels: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Encode all images at once; none sees another.

        Args:
            pixels: [patches of all images, 3, patch, patch], row by row, normalised.
            grids: (rows, columns) of patches of each image.

        Returns:
            [patches, hidden_size].
        """
        return self.encoder(self.patch_embed(pixels, grids), grids)


class PatchEmbed(nn.Module):
    """Pixels of a patch -> vector, plus the absolute position."""

    def __init__(self, config: MoonViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size)
        self.pos_emb = PositionEmbedding(config.init_pos_emb_height, config.init_pos_emb_width, config.hidden_size)

    def forward(self, pixels: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        weight = self.proj.weight.flatten(1)  # kernel and stride are the patch: the convolution is a matrix product
        return F.linear(pixels.flatten(1).to(weight.dtype), weight, self.proj.bias) + self.pos_emb(grids).to(weight.dtype)


class PositionEmbedding(nn.Module):
    """Learnable [height, width, hidden] grid, interpolated bicubically to the grid of each image."""

    def __init__(self, height: int, width: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(height, width, hidden_size))

    def forward(self, grids: Sequence[Grid]) -> torch.Tensor:
        """[patches of all grids, hidden_size], float32."""
        source = self.weight.float()
        sizes = {grid: self._interpolated(source, grid) for grid in set(grids)}
        return torch.cat([sizes[grid] for grid in grids])

    @staticmethod
    def _interpolated(source: torch.Tensor, grid: Grid) -> torch.Tensor:
        if grid == tuple(source.shape[:2]):
            return source.flatten(0, 1)
        return F.interpolate(source.permute(2, 0, 1)[None], size=grid, mode="bicubic")[0].permute(1, 2, 0).flatten(0, 1)


class Encoder(nn.Module):
    """Pre-norm transformer over patches."""

    def __init__(self, config: MoonViTConfig) -> None:
        super().__init__()
        self._head_dim = config.hidden_size // config.num_attention_heads
        self.blocks = nn.ModuleList([MoonViTBlock(config) for _ in range(config.num_hidden_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size)

    def forward(self, hidden: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        rotation = rotary_2d(grids, self._head_dim, hidden.device)
        lengths = [rows * columns for rows, columns in grids]
        for block in self.blocks:
            hidden = block(hidden, rotation, lengths)
        return self.final_layernorm(hidden)


class MoonViTBlock(GradientCheckpointingLayer):
    """One layer; the unit of activation checkpointing and of sharding."""

    def __init__(self, config: MoonViTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.norm0 = nn.LayerNorm(width)
        self.norm1 = nn.LayerNorm(width)
        self.mlp = MLP(width, config.intermediate_size)
        self.wqkv = nn.Linear(width, 3 * width)
        self.wo = nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor, rotation: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """hidden [patches, width], rotation complex [patches, 1, head_dim / 2], lengths: patches of each image."""
        query, key, value = self.wqkv(self.norm0(hidden)).view(len(hidden), 3, self.num_heads, -1).unbind(1)
        attended = image_attention(rotate(query, rotation), rotate(key, rotation), value, lengths)
        hidden = hidden + self.wo(attended.flatten(1))
        return hidden + self.mlp(self.norm1(hidden))


class MLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc0 = nn.Linear(width, inner)
        self.fc1 = nn.Linear(inner, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.fc1(F.gelu(self.fc0(hidden), approximate="tanh"))


def rotary_2d(grids: Sequence[Grid], head_dim: int, device: torch.device) -> torch.Tensor:
    """Rotations of the patches of all grids; complex64 [patches, 1, head_dim / 2].

    Pair 2i turns with the column, pair 2i + 1 with the row, both at base ** (-4 i / head_dim).
    """
    frequencies = ROPE_BASE ** (-torch.arange(0, head_dim, 4, dtype=torch.float32, device=device) / head_dim)
    sizes = {}
    for rows, columns in set(grids):
        row = torch.arange(rows, dtype=torch.float32, device=device).repeat_interleave(columns)
        column = torch.arange(columns, dtype=torch.float32, device=device).repeat(rows)
        angles = torch.stack([column[:, None] * frequencies, row[:, None] * frequencies], -1).flatten(1)
        sizes[rows, columns] = torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([sizes[grid] for grid in grids])


def rotate(states: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """[patches, heads, head_dim] with neighbouring dimensions as the parts of complex numbers, turned by `rotation`."""
    pairs = torch.view_as_complex(states.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation).flatten(-2).to(states.dtype)


def image_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Full attention within each image.

    Args:
        query: [patches, heads, head_dim]; so are `key`, `value` and the result.
        lengths: patches of each image.
    """
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.varlen import varlen_attn

        ends = F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0)).to(query.device)
        output = varlen_attn(query, key, value, ends, ends, max(lengths), max(lengths))
        assert isinstance(output, torch.Tensor)
        return output
    if len(set(lengths)) == 1:  # one call for all images
        stacked = (states.unflatten(0, (len(lengths), lengths[0])).transpose(1, 2) for states in (query, key, value))
        return F.scaled_dot_product_attention(*stacked).transpose(1, 2).flatten(0, 1)
    each = zip(*(states.transpose(0, 1).split(lengths, 1) for states in (query, key, value)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1) for q, k, v in each])
