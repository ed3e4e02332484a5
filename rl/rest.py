"""ReST / rejection sampling (arXiv 2308.08998), the baseline of k1.5 Fig. 10: likelihood of right answers only.

Owns that loss; wrong answers get no negative gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bregman.types import PackedBatch
from rl.opmd import log_ratio_metrics, sequence_sums


def rest_loss(logprobs: Tensor, advantages: Tensor, loss_mask: Tensor, boundaries: Tensor, *, normalizer: float) -> Tensor:
    """-1/N sum_j A_j log pi_theta(y_j | x), with A_j = 1 for a right answer and 0 otherwise. Arguments as in `rl.opmd.opmd_loss`."""
    return -(advantages * sequence_sums(torch.where(loss_mask, logprobs, 0.0), boundaries)).sum() / normalizer


def rest_batch_loss(logprobs: Tensor, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """`rest_loss` over a packed batch, as a `LossFunction`."""
    value = rest_loss(logprobs, batch.advantages, batch.loss_mask, batch.boundaries, normalizer=batch.normalizer)
    return value, log_ratio_metrics(logprobs, batch.reference_logprobs, batch)  # type: ignore[arg-type]


def rest_advantages(rewards: Sequence[float]) -> list[float]:
    """1 for rewards of at least 1, else 0."""
    return [1.0 if reward >= 1.0 else 0.0 for reward in rewards]
