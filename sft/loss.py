"""The supervised loss: negative log-likelihood of trained tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from bregman.types import PackedBatch


def nll_loss(logprobs: Tensor, loss_mask: Tensor, *, normalizer: float) -> Tensor:
    """-1/N sum of log-probabilities over trained tokens.

    Args:
        logprobs: float32 [T], log-probability of each token.
        loss_mask: bool [T], True on trained tokens.
        normalizer: N, the number of trained tokens of the whole optimizer step.
    """
    return -torch.where(loss_mask, logprobs, 0.0).sum() / normalizer


def sft_loss(logprobs: Tensor, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """`nll_loss` over a packed batch, as a `LossFunction`."""
    return nll_loss(logprobs, batch.loss_mask, normalizer=batch.normalizer), {}
