"""Built-in `exact_answer`: the answer after the thinking equals the gold answer up to white space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rewards.text import completion_text, split_thinking


def exact_answer(prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float | None]:
    """1.0 where the answer is the gold one, else 0.0; None where the data has no gold answer."""
    texts = [split_thinking(completion_text(completion))[1] for completion in completions]
    return [None if gold is None else float(_normal(text) == _normal(gold)) for text, gold in zip(texts, answer, strict=True)]


def _normal(text: Any) -> str:
    return " ".join(str(text).split())
