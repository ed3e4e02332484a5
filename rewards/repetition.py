"""Built-in `repetition_penalty`: a response that repeats itself loses reward. Says nothing about the answer being right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def repetition_penalty(completion_ids: Sequence[Sequence[int]], ngram: int = 4, free: float = 0.0, **_: Any) -> list[float]:
    """Minus the share of the response's n-grams that have occurred in it before, in [-1, 0].

    Counted over tokens, so that it needs no words and no language. 0 for a response shorter than one n-gram.

    Args:
        ngram: tokens of one n-gram.
        free: share of repeats that costs nothing, since long texts repeat some n-grams anyway; from there on linear to -1.

    Raises:
        ValueError: `ngram` is below 1, or `free` is not in [0, 1).
    """
    if ngram < 1 or not 0 <= free < 1:
        raise ValueError(f"ngram is {ngram} and free is {free}; expected ngram >= 1 and 0 <= free < 1")
    return [-max(0.0, repeated_share(ids, ngram) - free) / (1 - free) for ids in completion_ids]


def repeated_share(ids: Sequence[int], ngram: int) -> float:
    """Share of the n-grams of `ids` that are not the first of their kind; 0 if there is none."""
    total = len(ids) - ngram + 1
    if total < 1:
        return 0.0
    return 1.0 - len({tuple(ids[start : start + ngram]) for start in range(total)}) / total
