"""Attention over a pack of sequences whose cost is the sum of their squared lengths, never the square of the pack.

Owns the attention function that packed models run with. Boundaries reach it as transformers' own flash-attention arguments
(`cu_seq_lens_q`, `max_length_q`), so that models which need them elsewhere (linear attention) see them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "bregman_varlen"
UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # extras of some models' attention that would be dropped silently

MASK_SIZE = 2**24
"""Largest attention mask made at once, in elements; queries that need more are taken in turns."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of one sequence that one rank computes.

    Attributes:
        sequence: index in the pack.
        queries: how many tokens.
        keys: how many tokens of the sequence the last of them sees, itself included.
    """

    sequence: int
    queries: int
    keys: int


class Context(Protocol):
    """What attention needs to know where a pack is spread over several ranks; `bregman.engines.context_parallel` implements it."""

    @property
    def lengths(self) -> Sequence[int]:
        """Of all sequences of the pack."""

    @property
    def pieces(self) -> Sequence[Piece]:
        """This rank's tokens, in the order in which it holds them."""

    def take(self, values: torch.Tensor) -> torch.Tensor:
        """One value per token of the pack -> one per token of this rank."""

    def take_images(self, images: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`IMAGE_ARGUMENTS` of the pack -> those of this rank."""

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """One value per token of this rank -> one per token of the pack, on every rank."""

    def gather_keys(self, keys: torch.Tensor) -> torch.Tensor:
        """[1, heads, tokens of this rank, dim] -> [1, heads, tokens of the pack, dim]."""


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
    context: Context | None = None,
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
        context: given instead of lengths where T are this rank's tokens of a pack that several ranks share.

    Returns:
        [1, T, heads, value_dim], and None for the attention weights.

    Raises:
        ValueError: the model wants something of its attention that is not computed here.
    """
    extras = [name for name in UNSUPPORTED if others.get(name) is not None]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if (cu_seq_lens_q is None and context is None) or attention_mask is not None or query.shape[0] != 1 or not causal or extras:
        given = f"boundaries given: {cu_seq_lens_q is not None}, mask: {attention_mask is not None}, causal: {causal}, extras: {extras}"
        raise ValueError(f"{type(module).__name__} cannot run on packed sequences ({given}, batch of {query.shape[0]})")
    flash = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] >= value.shape[-1]
    if context is not None:
        key, value = context.gather_keys(torch.cat([key, value], -1)).split([key.shape[-1], value.shape[-1]], -1)
        if flash:
            return _flash_pieces(query, key, value, context, scaling, sliding_window), None
        return _one_by_one(query, key, value, context.lengths, context.pieces, scaling, sliding_window), None
    assert cu_seq_lens_q is not None
    if flash:
        return _flash(query, key, value, (cu_seq_lens_q, cu_seq_lens_q), (max_length_q, max_length_q), scaling, sliding_window), None
    lengths = cu_seq_lens_q.diff().tolist()
    pieces = [Piece(index, length, length) for index, length in enumerate(lengths)]
    return _one_by_one(query, key, value, lengths, pieces, scaling, sliding_window), None


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """`boundaries` and `longest` of the queries and of the keys; the last query of a sequence sees the last of its keys."""
    from torch.nn.attention.varlen import varlen_attn

    value_dim = value.shape[-1]
    value = pad(value, (0, query.shape[-1] - value_dim))  # latent attention has narrower values; the kernel wants one width
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    window = (sliding_window - 1 if sliding_window else -1, 0)
    gqa = query.shape[1] != key.shape[1]
    output = varlen_attn(query, key, value, *boundaries, *longest, scale=scaling, window_size=window, enable_gqa=gqa)
    assert isinstance(output, torch.Tensor)
    return output[None, ..., :value_dim]


def _flash_pieces(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context, scaling: float | None, sliding_window: int | None
) -> torch.Tensor:
    pieces = context.pieces
    sizes = [[piece.queries for piece in pieces], [piece.keys for piece in pieces]]
    ends = [torch.tensor([0, *size], device=query.device).cumsum(0, dtype=torch.int32) for size in sizes]
    key, value = (torch.cat(_keys_of(tensor, context.lengths, pieces), 2) for tensor in (key, value))
    return _flash(query, key, value, (ends[0], ends[1]), (max(sizes[0]), max(sizes[1])), scaling, sliding_window)


def _one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    pieces: Sequence[Piece],
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """One call per sequence. On a CPU this beat padding, in one or more groups of similar length, but for many very short sequences."""
    outputs = []
    queries = query.split([piece.queries for piece in pieces], 2)
    for q, k, v in zip(queries, _keys_of(key, lengths, pieces), _keys_of(value, lengths, pieces), strict=True):
        turn = q.shape[2] if q.shape[2] == k.shape[2] and sliding_window is None else max(MASK_SIZE // k.shape[2], 1)
        for start in range(0, q.shape[2], turn):
            part = q[:, :, start : start + turn]
            seen = k.shape[2] - q.shape[2] + start + part.shape[2]
            outputs.append(_causal(part, k[:, :, :seen], v[:, :, :seen], scaling, sliding_window))
    return torch.cat([output.transpose(1, 2) for output in outputs], 1)


def _keys_of(keys: torch.Tensor, lengths: Sequence[int], pieces: Sequence[Piece]) -> list[torch.Tensor]:
    """The keys that each piece sees. Split first: the gradient of a slice of the whole pack would be as long as the pack."""
    sequences = keys.split(list(lengths), 2)
    return [sequences[piece.sequence][:, :, : piece.keys] for piece in pieces]


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, sliding_window: int | None) -> torch.Tensor:
    """Attention of tokens that end where their keys end."""
    keys, queries = key.shape[2], query.shape[2]
    gqa = query.shape[1] != key.shape[1]
    if queries == keys and (sliding_window is None or keys <= sliding_window):
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=gqa)
    positions = torch.arange(keys, device=query.device)
    distance = positions[keys - queries :, None] - positions
    mask = (distance >= 0) & (distance < (sliding_window or keys))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=gqa)


AttentionInterface.register(NAME, varlen_attention)
