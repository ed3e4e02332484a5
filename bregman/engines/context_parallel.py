"""Context parallelism: one pack of sequences over several ranks, each with a part of its tokens and all of its keys and values.

Owns which tokens a rank takes and the exchange of keys, values and log-probabilities with its backward pass. Attention on the
parts is in `bregman.models.attention`, sharding of the weights (over all ranks) in `sharding`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from bregman.models.attention import Piece


class ContextShard:
    """This rank's part of one pack; implements `bregman.models.attention.Context`.

    The pack, with a few tokens of filler at its end, is cut into 2n equal parts, of which rank r takes parts r and 2n - 1 - r: the
    later a token lies in its sequence, the more keys it sees, and so ranks have about the same work (Llama 3, arXiv 2407.21783
    sec. 3.3.2).

    Args:
        boundaries: int32 [S + 1], cumulative sequence lengths of the pack.
        group: the n ranks.

    Attributes:
        lengths: of the sequences, and of the filler as one more.
        pieces: the runs of this rank's tokens that lie in one sequence each, in order.
    """

    def __init__(self, boundaries: torch.Tensor, group: dist.ProcessGroup) -> None:
        self._group, self._size = group, dist.get_world_size(group)
        self._num_tokens = int(boundaries[-1])
        self._part = -(-self._num_tokens // (2 * self._size))
        self._filler = 2 * self._size * self._part - self._num_tokens
        self.lengths: list[int] = boundaries.diff().tolist() + ([self._filler] if self._filler else [])
        rank = dist.get_rank(group)
        self._starts = (rank * self._part, (2 * self._size - 1 - rank) * self._part)
        self.pieces = [piece for start in self._starts for piece in _pieces(self.lengths, start, start + self._part)]

    def take(self, values: torch.Tensor) -> torch.Tensor:
        """This rank's values of one per token, [T, ...] -> [2 part, ...]; 0 for filler."""
        filler = values.new_zeros(self._filler, *values.shape[1:])
        padded = torch.cat([values, filler])
        return torch.cat([padded[start : start + self._part] for start in self._starts])

    def take_images(self, images: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Image arguments of a model for this rank: all images, but only those of their features that fall on its tokens."""
        if not images:
            return images
        place = torch.full((sum(self.lengths),), -1, device=images["image_positions"].device)
        for index, start in enumerate(self._starts):
            place[start : start + self._part] = torch.arange(self._part, device=place.device) + index * self._part
        positions = place[images["image_positions"]]
        mine = positions >= 0
        return {**images, "image_positions": positions[mine], "image_rows": images["image_rows"][mine]}

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """One value per token of this rank, [2 part], -> those of the whole pack, [T]. For a loss that every rank of the group
        computes on all of them: each rank's gradient is that of its own tokens, so that the ranks' gradients add up to the whole."""
        return self._in_order(_Gather.apply(values, self._group, False))[: self._num_tokens]

    def gather_keys(self, keys: torch.Tensor) -> torch.Tensor:
        """[1, heads, 2 part, dim] of this rank -> [1, heads, all tokens, dim]. Every rank uses all keys for tokens of its own, so
        the gradient of a key is the sum over the ranks."""
        return self._in_order(_Gather.apply(keys.transpose(0, 2).contiguous(), self._group, True)).transpose(0, 2)

    def _in_order(self, gathered: torch.Tensor) -> torch.Tensor:
        """From rank after rank to the order of the pack."""
        parts = gathered.split(self._part)
        return torch.cat([*parts[::2], *parts[::-2]])


def _pieces(lengths: list[int], start: int, end: int) -> Iterator[Piece]:
    """The runs of tokens `start` .. `end` - 1 of a pack."""
    begin = 0
    for sequence, length in enumerate(lengths):
        first, last = max(begin, start), min(begin + length, end)
        if first < last:
            yield Piece(sequence=sequence, queries=last - first, keys=last - begin)
        begin += length


class _Gather(torch.autograd.Function):
    """Concatenation of all ranks' tensors along the first dimension. Its gradient is this rank's slice: of the sum over the ranks
    if `summed`, else of this rank's own."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, group: dist.ProcessGroup, summed: bool) -> torch.Tensor:
        ctx.group, ctx.summed, ctx.rows = group, summed, len(own)
        gathered = own.new_empty(len(own) * dist.get_world_size(group), *own.shape[1:])
        dist.all_gather_single(gathered, own.contiguous(), group=group)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if not ctx.summed:
            return gradient.narrow(0, dist.get_rank(ctx.group) * ctx.rows, ctx.rows), None, None
        own = gradient.new_empty(ctx.rows, *gradient.shape[1:])
        dist.reduce_scatter_single(own, gradient.contiguous(), group=ctx.group)
        return own, None, None
