"""Muon: momentum whose matrix is orthogonalised before it is applied (Moonlight, arXiv 2502.16982; Jordan et al. 2024).

Owns the Newton-Schulz iteration and how a sharded matrix is orthogonalised. Which parameters take it is `optimizer`'s business.
`torch.optim.Muon` is not used: it takes 2-D parameters only (no stacked experts), always rounds to bfloat16, and orthogonalises
every matrix on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration: singular values end between about 0.7 and 1.2 after five steps."""
EPSILON = 1e-7
"""Least norm that a matrix is divided by."""


def newton_schulz(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """U V^T of the singular value decomposition of each matrix, approximately: Moonlight Eq. (2).

    Args:
        matrix: [..., rows, columns]; computed in its own dtype.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPSILON)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def muon_directions(
    directions: Mapping[str, torch.Tensor], rows: Mapping[str, int], group: dist.ProcessGroup | None, *, steps: int
) -> dict[str, torch.Tensor]:
    """The update of each matrix for a learning rate of 1: 0.2 sqrt(max(rows, columns)) times its orthogonalised momentum,
    which has the root mean square of an AdamW update (Moonlight Eq. (4)).

    Stacked experts are sharded by expert, each of them a matrix of its own, and need no communication. The other matrices go
    round: each is gathered on one rank, orthogonalised there, and its shards return, so that ranks share the work.

    Args:
        directions: this rank's rows (2-D) or experts (3-D) of each momentum, by parameter name, the same names on every rank.
        rows: rows of each whole matrix.
        group: the ranks that share the parameters; None for one rank.
        steps: of the iteration.
    """
    updates: dict[str, torch.Tensor] = {}
    whole = [name for name, local in directions.items() if local.ndim == 2 and group is not None and dist.get_world_size(group) > 1]
    for name, local in directions.items():
        if name not in whole:
            updates[name] = _orthogonalised(local, steps) if local.numel() else local
    if whole:
        assert group is not None
        size = dist.get_world_size(group)
        for start in range(0, len(whole), size):
            updates |= _share_out(whole[start : start + size], directions, rows, group, steps)
    return updates


def _share_out(
    names: Sequence[str], directions: Mapping[str, torch.Tensor], rows: Mapping[str, int], group: dist.ProcessGroup, steps: int
) -> dict[str, torch.Tensor]:
    """One matrix per rank: gathered, orthogonalised, scattered."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    mine: torch.Tensor | None = None
    for owner, name in enumerate(names):
        padded = _padded(directions[name], -(-rows[name] // size))
        parts = [torch.empty_like(padded) for _ in range(size)] if rank == owner else None
        dist.gather(padded, parts, group=group, group_dst=owner)
        if parts is not None:
            mine = _orthogonalised(torch.cat(parts)[: rows[name]], steps)
    updates = {}
    for owner, name in enumerate(names):
        chunk = -(-rows[name] // size)
        received = directions[name].new_empty(chunk, directions[name].shape[1])
        parts = None
        if rank == owner:
            assert mine is not None
            parts = list(_padded(mine, chunk * size).split(chunk))
        dist.scatter(received, parts, group=group, group_src=owner)
        updates[name] = received[: len(directions[name])]
    return updates


def _padded(local: torch.Tensor, rows: int) -> torch.Tensor:
    """`local` with rows of zeros up to `rows`: collectives want equal sizes, and the last shard may be smaller."""
    return torch.cat([local, local.new_zeros(rows - len(local), local.shape[1])]) if len(local) < rows else local.contiguous()


def _orthogonalised(momentum: torch.Tensor, steps: int) -> torch.Tensor:
    # bfloat16 is what Moonlight runs on a GPU; CPUs are no faster in it
    compute = momentum.to(torch.bfloat16) if momentum.is_cuda else momentum
    return newton_schulz(compute, steps).to(momentum.dtype) * (0.2 * math.sqrt(max(momentum.shape[-2:])))
