"""Built-in `overlong_penalty`: soft overlong punishment of DAPO (arXiv 2503.14476, Eq. 13). Says nothing about the answer being right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def overlong_penalty(completion_ids: Sequence[Sequence[int]], max_tokens: int, cache_tokens: int, **_: Any) -> list[float]:
    """0 up to `max_tokens - cache_tokens` tokens, from there linear to -1 at `max_tokens`, -1 beyond.

    Args:
        max_tokens: L_max, where the penalty is full; in general the rollout's `max_tokens`.
        cache_tokens: L_cache, the stretch before it over which the penalty grows.

    Raises:
        ValueError: not 0 < cache_tokens <= max_tokens.
    """
    if not 0 < cache_tokens <= max_tokens:
        raise ValueError(f"cache_tokens is {cache_tokens} and max_tokens is {max_tokens}; expected 0 < cache_tokens <= max_tokens")
    return [-min(1.0, max(0.0, (len(ids) - (max_tokens - cache_tokens)) / cache_tokens)) for ids in completion_ids]
