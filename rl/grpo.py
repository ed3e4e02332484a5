"""GRPO (DeepSeekMath, arXiv 2402.03300, Eq. 3): group-normalised advantages, clipped token ratios.

Owns that loss only; shows what adding an algorithm takes: a loss, its advantages, and a line in `rl.algorithms`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from bregman.types import PackedBatch
from rl.opmd import log_ratio_metrics, sequence_sums


def grpo_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    boundaries: Tensor,
    *,
    clip: float,
    normalizer: float,
) -> Tensor:
    """-1/N sum_j 1/|y_j| sum_t min(rho_t A_j, clip(rho_t, 1 - clip, 1 + clip) A_j), rho_t = pi_theta / pi_i of token t.

    Arguments as in `rl.opmd.opmd_loss`.
    """
    lengths = boundaries.diff().long()
    per_token = torch.repeat_interleave(advantages, lengths)
    ratio = torch.where(loss_mask, logprobs - reference_logprobs, 0.0).exp()
    gain = torch.minimum(ratio * per_token, ratio.clamp(1.0 - clip, 1.0 + clip) * per_token)
    response_lengths = sequence_sums(loss_mask.to(logprobs.dtype), boundaries).clamp(min=1.0)
    return -(sequence_sums(torch.where(loss_mask, gain, 0.0), boundaries) / response_lengths).sum() / normalizer


def grpo_batch_loss(logprobs: Tensor, batch: PackedBatch, *, clip: float) -> tuple[Tensor, dict[str, Tensor]]:
    """`grpo_loss` over a packed batch, as a `LossFunction`."""
    reference = cast(Tensor, batch.reference_logprobs)  # filled in by Learner.begin_iteration
    value = grpo_loss(
        logprobs,
        reference,
        batch.advantages,
        batch.loss_mask,
        batch.boundaries,
        clip=clip,
        normalizer=batch.normalizer,
    )
    return value, log_ratio_metrics(logprobs, reference, batch)


def grpo_advantages(rewards: Sequence[float], *, scale: bool) -> list[float]:
    """(r_j - mean) / (std + 1e-4) within one group, std with k - 1 as TRL computes it; without `scale` only the mean is taken off."""
    mean = sum(rewards) / len(rewards)
    if max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    deviation = (sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1)) ** 0.5 if scale else 1.0 - 1e-4
    return [(reward - mean) / (deviation + 1e-4) for reward in rewards]
