"""Online policy mirror descent, Kimi k1.5 sec. 2.3.2: the loss as a pure function, and the baselines of its advantages.

Owns Eq. (3). Does not know about iterations, optimizers, packing or ranks: the normaliser is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from bregman.types import PackedBatch


def opmd_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    boundaries: Tensor,
    *,
    tau: float,
    normalizer: float,
) -> Tensor:
    """Minus the surrogate whose gradient is k1.5 Eq. (3):  -1/N sum_j [ A_j S_j - tau/2 S_j^2 ].

    S_j = sum over response tokens of log pi_theta - log pi_i is the log-ratio of the whole **sequence**, A_j = r_j - baseline. It
    equals (A - tau S)^2 / (2 tau) up to a constant, but stays finite at tau = 0 and does not scale the step with 1/tau.

    Args:
        logprobs: float32 [T], log pi_theta of each token.
        reference_logprobs: float32 [T], log pi_i of each token, no gradient.
        advantages: float32 [S].
        loss_mask: bool [T], True on response tokens.
        boundaries: int [S + 1], cumulative sequence lengths.
        tau: weight of KL(pi_theta || pi_i) in Eq. (2).
        normalizer: N, the number of responses of the whole optimizer step.

    Returns:
        float32 scalar.
    """
    log_ratio = sequence_sums(torch.where(loss_mask, logprobs - reference_logprobs, 0.0), boundaries)
    return -(advantages * log_ratio - 0.5 * tau * log_ratio.square()).sum() / normalizer


def opmd_token_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    boundaries: Tensor,
    *,
    tau: float,
    normalizer: float,
) -> Tensor:
    """`opmd_loss` with each token's own log-ratio squared, which drops the cross terms of S^2: **not** Eq. (3)."""
    log_ratio = torch.where(loss_mask, logprobs - reference_logprobs, 0.0)
    policy = advantages * sequence_sums(log_ratio, boundaries)
    return -(policy.sum() - 0.5 * tau * log_ratio.square().sum()) / normalizer


def sequence_sums(values: Tensor, boundaries: Tensor) -> Tensor:
    """Sum of `values` [T] over each sequence of a pack: [S]."""
    lengths = boundaries.diff()
    index = torch.repeat_interleave(torch.arange(len(lengths), device=values.device), lengths.long())
    return values.new_zeros(len(lengths)).index_add(0, index, values)


def opmd_batch_loss(logprobs: Tensor, batch: PackedBatch, *, tau: float, level: str) -> tuple[Tensor, dict[str, Tensor]]:
    """`opmd_loss` over a packed batch, as a `LossFunction`."""
    loss = opmd_loss if level == "sequence" else opmd_token_loss
    reference = cast(Tensor, batch.reference_logprobs)  # filled in by Learner.begin_iteration
    value = loss(
        logprobs,
        reference,
        batch.advantages,
        batch.loss_mask,
        batch.boundaries,
        tau=tau,
        normalizer=batch.normalizer,
    )
    return value, log_ratio_metrics(logprobs, reference, batch)


def log_ratio_metrics(logprobs: Tensor, reference_logprobs: Tensor, batch: PackedBatch) -> dict[str, Tensor]:
    """How far pi_theta has moved from pi_i on the sampled responses, in nats per response, as sums over N."""
    token_ratio = torch.where(batch.loss_mask, (logprobs - reference_logprobs).detach(), 0.0)
    log_ratio = sequence_sums(token_ratio, batch.boundaries)
    # k3 estimator of KL(pi_i || pi_theta), (e^x - 1 - x) per token: samples come from pi_i (Schulman 2020).
    kl = (token_ratio.exp() - 1.0 - token_ratio).sum()
    return {"policy/log_ratio_abs": log_ratio.abs().sum() / batch.normalizer, "policy/kl": kl / batch.normalizer}


def opmd_advantages(rewards: Sequence[float], *, baseline: str, tau: float) -> list[float]:
    """A_j = r_j - baseline within one group.

    `mean` is rbar, what k1.5 uses; `logavgexp` is tau log(1/k sum_j exp(r_j/tau)), the estimate of tau log Z. A group whose rewards
    are all equal has advantages of exactly 0 with either.
    """
    highest = max(rewards)
    if highest == min(rewards):
        return [0.0] * len(rewards)
    if baseline == "mean":
        level = sum(rewards) / len(rewards)
    else:
        level = highest + tau * math.log(sum(math.exp((reward - highest) / tau) for reward in rewards) / len(rewards))
    return [reward - level for reward in rewards]
