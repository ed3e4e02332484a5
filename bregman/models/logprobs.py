"""Log-probabilities of the tokens of a pack.

Owns the step from hidden states or logits to log-probabilities, without ever holding the float32 logits of a long pack.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**24
"""Logits held at once (64 MiB in float32); a pack with more is taken in chunks whose logits the backward pass recomputes."""


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, boundaries: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Log-probability of each token given the tokens before it in its own sequence; float32 [T], 0 at first tokens.

    Args:
        logits: [T, vocabulary]; row t predicts token t + 1.
        token_ids: int64 [T].
        boundaries: int32 [S + 1], cumulative sequence lengths.
        temperature: logits are divided by it.
    """
    return _aligned(_next_logprobs(logits[:-1], token_ids[1:], temperature), boundaries)


def chunked_token_logprobs(
    hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    vocabulary: int,
    token_ids: torch.Tensor,
    boundaries: torch.Tensor,
    temperature: float = 1.0,
) -> torch.Tensor:
    """`token_logprobs(head(hidden), ...)` with at most `MAX_LOGITS` logits in memory.

    Args:
        hidden: [T, width], output of the model's body.
        head: [n, width] -> [n, vocabulary].
    """
    if hidden.shape[0] * vocabulary <= MAX_LOGITS:
        return token_logprobs(head(hidden), token_ids, boundaries, temperature)

    def part(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return _next_logprobs(head(states), targets, temperature)

    size = max(MAX_LOGITS // vocabulary, 1)
    pieces = zip(hidden[:-1].split(size), token_ids[1:].split(size), strict=True)
    return _aligned(torch.cat([checkpoint(part, *piece, use_reentrant=False) for piece in pieces]), boundaries)


def _next_logprobs(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = logits.float()
    return -cross_entropy(logits if temperature == 1.0 else logits / temperature, targets, reduction="none")


def _aligned(next_logprobs: torch.Tensor, boundaries: torch.Tensor) -> torch.Tensor:
    """[T - 1] log-probabilities of tokens 1 .. T - 1 -> [T], with 0 where a sequence begins."""
    logprobs = torch.cat([next_logprobs.new_zeros(1), next_logprobs])
    first = torch.zeros_like(logprobs, dtype=torch.bool)
    first[boundaries[:-1].long()] = True
    return logprobs.masked_fill(first, 0.0)
