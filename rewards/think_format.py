"""Built-in `think_format`: exactly one closed think block, then an answer. Says nothing about the answer being right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rewards.text import THINK_TAGS, completion_text


def think_format(completions: Sequence[Any], opened_by_prompt: bool = False, **_: Any) -> list[float]:
    """1.0 where the response is one closed think block followed by a non-empty answer, else 0.0.

    Args:
        opened_by_prompt: the chat template ends the prompt with the opening mark, so that the response lacks it.
    """
    return [float(_well_formed(completion_text(completion), opened_by_prompt)) for completion in completions]


def _well_formed(text: str, opened_by_prompt: bool) -> bool:
    for opening, closing in THINK_TAGS:
        whole = opening + text if opened_by_prompt else text.lstrip()
        if whole.startswith(opening) and whole.count(opening) == 1 and whole.count(closing) == 1:
            return bool(whole.partition(closing)[2].strip())
    return False
