"""Do learner and rollout engine hold the same policy? A probe after every weight sync.

Owns the comparison of log-probabilities of the sampled tokens; a difference means a broken sync, a stale cache or a model
that the two sides compute differently, and RL on it would train on the wrong distribution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bregman.errors import ParityError
from bregman.protocols import MiniBatch


def logprob_difference(minibatches: Sequence[MiniBatch]) -> dict[str, float]:
    """Largest and mean |learner - engine| over all response tokens, nats."""
    differences = [
        (batch.reference_logprobs - batch.rollout_logprobs)[batch.loss_mask].abs()  # type: ignore[operator]
        for minibatch in minibatches
        for batch in minibatch
        if batch.loss_mask.any()
    ]
    values = torch.cat(differences)
    return {"parity/logprob_diff_max": values.max().item(), "parity/logprob_diff_mean": values.mean().item()}


def require_parity(difference: float, bound: float, iteration: int) -> None:
    """Raises ParityError when `difference` (nats) is above `bound`, or is not a number."""
    if not difference <= bound:
        raise ParityError(
            f"iteration {iteration}",
            f"learner and rollout engine differ by {difference:.3g} nats on a sampled token (parity_bound {bound:g})",
            "nothing was trained on it; check the weight sync and dtypes, or raise parity_bound if low precision explains it",
        )
