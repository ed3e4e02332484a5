"""Attention over a pack of sequences whose cost is the sum of their squared lengths, never the square of the pack.

Owns the attention function that packed models run with. Boundaries reach it as transformers' own flash-attention arguments
(`cu_seq_lens_q`, `max_length_q`), so that models which need them elsewhere (linear attention) see them too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "bregman_varlen"
UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # extras of some models' attention that would be dropped silently


def boundary_arguments(boundaries: torch.Tensor) -> dict[str, Any]:
    """Keyword arguments that tell a model's forward where the sequences of its pack lie; `boundaries` int32 [S + 1]."""
    longest = int(boundaries.diff().max())
    return {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": longest, "max_length_k": longest}


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sequence of a pack, with transformers' calling convention.

    Dropout is never applied: it would make log-ratios of a policy to itself random.

    Args:
        query: [1, heads, T, head_dim].
        key: [1, key-value heads, T, head_dim]; heads is a multiple of key-value heads.
        value: [1, key-value heads, T, value_dim].
        attention_mask: must be None.
        sliding_window: a token sees this many tokens, itself included; None for all.
        cu_seq_lens_q: int32 [S + 1], cumulative lengths.
        max_length_q: the longest of them.

    Returns:
        [1, T, heads, value_dim], and None for the attention weights.

    Raises:
        ValueError: the model wants something of its attention that is not computed here.
    """
    extras = [name for name in UNSUPPORTED if others.get(name) is not None]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if cu_seq_lens_q is None or attention_mask is not None or query.shape[0] != 1 or not causal or extras:
        given = f"boundaries given: {cu_seq_lens_q is not None}, mask: {attention_mask is not None}, causal: {causal}, extras: {extras}"
        raise ValueError(f"{type(module).__name__} cannot run on packed sequences ({given}, batch of {query.shape[0]})")
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] == value.shape[-1]:
        return _flash(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    return _one_by_one(query, key, value, cu_seq_lens_q.diff().tolist(), scaling, sliding_window), None


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    longest: int,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    window = (sliding_window - 1 if sliding_window else -1, 0)
    gqa = query.shape[1] != key.shape[1]
    output = varlen_attn(query, key, value, boundaries, boundaries, longest, longest, scale=scaling, window_size=window, enable_gqa=gqa)
    assert isinstance(output, torch.Tensor)
    return output[None]


def _one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], scaling: float | None, sliding_window: int | None
) -> torch.Tensor:
    """One call per sequence. On a CPU this beat padding, in one or more groups of similar length, but for many very short sequences."""
    gqa = query.shape[1] != key.shape[1]
    outputs = [
        scaled_dot_product_attention(q, k, v, **_causal(q.shape[2], sliding_window, q.device), scale=scaling, enable_gqa=gqa)
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat([output.transpose(1, 2) for output in outputs], 1)


def _causal(length: int, sliding_window: int | None, device: torch.device) -> dict[str, Any]:
    if sliding_window is None or length <= sliding_window:
        return {"is_causal": True}
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return {"attn_mask": (distance >= 0) & (distance < sliding_window)}


AttentionInterface.register(NAME, varlen_attention)
