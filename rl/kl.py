"""KL to a fixed reference model, added to any policy loss.

Owns the penalty; the learner keeps the frozen model and fills in `fixed_logprobs`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bregman.protocols import LossFunction
from bregman.types import PackedBatch


def kl_penalty(logprobs: Tensor, fixed_logprobs: Tensor, loss_mask: Tensor, *, normalizer: float) -> Tensor:
    """1/N sum over response tokens of e^x - 1 - x, x = log pi_fixed - log pi_theta: the k3 estimator of KL(pi_theta || pi_fixed).

    Args:
        logprobs: float32 [T].
        fixed_logprobs: float32 [T], under the fixed reference, no gradient.
        loss_mask: bool [T].
        normalizer: N, the number of responses of the whole optimizer step.
    """
    difference = torch.where(loss_mask, fixed_logprobs - logprobs, 0.0)
    return (difference.exp() - 1.0 - difference).sum() / normalizer


def with_kl(logprobs: Tensor, batch: PackedBatch, *, loss: LossFunction, coefficient: float) -> tuple[Tensor, dict[str, Tensor]]:
    """`loss` plus `coefficient` times `kl_penalty`, as a `LossFunction`."""
    value, metrics = loss(logprobs, batch)
    penalty = kl_penalty(logprobs, batch.fixed_logprobs, batch.loss_mask, normalizer=batch.normalizer)  # type: ignore[arg-type]
    return value + coefficient * penalty, {**metrics, "policy/kl_fixed": penalty.detach()}
