"""Log-probabilities of the tokens of a pack.

Owns the step from hidden states or logits to log-probabilities, and its gradient, without ever holding the logits of a long pack.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

MAX_LOGITS = 2**24
"""Logits held at once (64 MiB in float32). A pack with more goes through the head block by block."""
CPU_BLOCK, GPU_BLOCK = (1024, 1024), (8192, 8192)
"""Tokens and columns of the vocabulary of a block. Square, since a block reads and writes both its tokens' hidden states and its
columns of the head; on a CPU it stays in the cache between the passes over it."""


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, boundaries: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Log-probability of each token given the tokens before it in its own sequence; float32 [T], 0 at first tokens.

    Args:
        logits: [T, vocabulary]; row t predicts token t + 1.
        token_ids: int64 [T].
        boundaries: int32 [S + 1], cumulative sequence lengths.
        temperature: logits are divided by it.
    """
    return aligned(_logprobs(logits, token_ids.roll(-1), temperature), boundaries)


def next_token_logprobs(hidden: torch.Tensor, head: nn.Linear, targets: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Log-probability of `targets[t]` under row t of `head(hidden) / temperature`; float32 [T], at most `MAX_LOGITS` logits in memory.

    On bfloat16 the logits are rounded to it, as the head's own output is; their sums are float32.

    Args:
        hidden: [T, width], output of the model's body.
        head: its weight [vocabulary, width].
        targets: int64 [T].
    """
    if hidden.shape[0] * head.weight.shape[0] <= MAX_LOGITS:
        return _logprobs(head(hidden), targets, temperature)
    weight = head.weight
    if head.bias is not None:
        hidden = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], 1)
        weight = torch.cat([weight, head.bias[:, None]], 1)
    logprobs: torch.Tensor = _BlockedLogprobs.apply(hidden, weight, targets, temperature)
    return logprobs


def aligned(next_logprobs: torch.Tensor, boundaries: torch.Tensor) -> torch.Tensor:
    """[T], row t about token t + 1, -> [T], row t about token t, with 0 where a sequence begins."""
    first = torch.zeros_like(next_logprobs, dtype=torch.bool)
    first[boundaries[:-1].long()] = True
    return next_logprobs.roll(1).masked_fill(first, 0.0)


def _logprobs(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = logits.float()
    return -cross_entropy(logits if temperature == 1.0 else logits / temperature, targets, reduction="none")


class _BlockedLogprobs(torch.autograd.Function):
    """log p_t = z[t, y_t] - log sum_v exp z[t, v] with z = hidden weight^T / temperature, in blocks of tokens x vocabulary.

    The forward pass keeps the logarithm of each sum. The backward pass computes a block of z again, turns it in place into the
    gradient g_t (1[v = y_t] - p[t, v]) of the logits, and adds that block's share to the gradients of hidden states and weight.
    Tokens without gradient (prompts, responses of no advantage) are left out of it.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
        chosen = torch.empty(len(hidden), device=hidden.device)
        log_sums = torch.empty_like(chosen)
        block_rows, block_columns = _block_size(hidden)
        for rows in _ranges(len(hidden), block_rows):
            states, wanted = hidden[rows], targets[rows]
            highest = torch.full((len(states),), -torch.inf, device=hidden.device)
            total = torch.zeros_like(highest)
            for columns in _ranges(len(weight), block_columns):
                logits = _logits(states, weight[columns], temperature)
                inside, local = _locate(wanted, columns)
                chosen[rows][inside] = logits[inside, local].float()
                higher = torch.maximum(highest, logits.amax(1))
                total = total * (highest - higher).exp() + _sum_exp(logits, higher)
                highest = higher
            log_sums[rows] = total.log() + highest
        ctx.save_for_backward(hidden, weight, targets, log_sums)
        ctx.temperature = temperature
        return chosen - log_sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        hidden, weight, targets, log_sums = ctx.saved_tensors
        used = gradient.nonzero()[:, 0]
        if len(used) < len(gradient):
            part = [tensor[used] for tensor in (hidden, targets, log_sums, gradient)]
        else:
            part = [hidden, targets, log_sums, gradient]
        for_part, for_weight = _gradients(part, weight, ctx.temperature, ctx.needs_input_grad[:2])
        for_hidden = for_part
        if for_part is not None and len(used) < len(gradient):
            for_hidden = torch.zeros_like(hidden).index_copy_(0, used, for_part)
        return for_hidden, for_weight, None, None


def _gradients(
    part: list[torch.Tensor], weight: torch.Tensor, temperature: float, needed: tuple[bool, ...]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of hidden states and weight. Sums over blocks are kept in float32."""
    hidden, targets, log_sums, gradient = part
    for_hidden = torch.zeros(hidden.shape, device=hidden.device) if needed[0] else None
    for_weight = torch.zeros_like(weight) if needed[1] else None
    block_rows, block_columns = _block_size(hidden)
    for rows in _ranges(len(hidden), block_rows):
        states, wanted, sums = hidden[rows], targets[rows], log_sums[rows]
        scale = gradient[rows] / temperature
        for columns in _ranges(len(weight), block_columns):
            block = _logits(states, weight[columns], temperature).float()
            block.sub_(sums[:, None]).exp_().mul_(-scale[:, None])
            inside, local = _locate(wanted, columns)
            block[inside, local] += scale[inside]
            block = block.to(weight.dtype)
            if for_hidden is not None:
                for_hidden[rows] += block @ weight[columns]
            if for_weight is not None:
                for_weight[columns] += block.T @ states
    return None if for_hidden is None else for_hidden.to(hidden.dtype), for_weight


def _logits(states: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = states @ weight.T
    return logits if temperature == 1.0 else logits.float().div_(temperature)


def _sum_exp(logits: torch.Tensor, highest: torch.Tensor) -> torch.Tensor:
    return logits.float().sub(highest[:, None]).exp_().sum(1)


def _locate(targets: torch.Tensor, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose target lies in a block, and the column of the block that it is."""
    inside = ((targets >= columns.start) & (targets < columns.stop)).nonzero()[:, 0]
    return inside, targets[inside] - columns.start


def _block_size(hidden: torch.Tensor) -> tuple[int, int]:
    return GPU_BLOCK if hidden.is_cuda else CPU_BLOCK


def _ranges(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
