"""Splitting a response into its thinking and its answer. Owns no scoring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

THINK_TAGS = (("<think>", "</think>"), ("◁think▷", "◁/think▷"))
"""Opening and closing marks of a think block: ChatML models, Kimi-VL."""


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a completion in either form that TRL uses: plain, or a list of messages with text or content parts."""
    if isinstance(completion, str):
        return completion
    contents = [message.get("content") or "" for message in completion]
    return "".join(c if isinstance(c, str) else "".join(part.get("text") or "" for part in c) for c in contents)


def split_thinking(text: str) -> tuple[str, str]:
    """`(thinking, answer)`.

    The answer is what follows the last closing mark. A block that was opened and never closed leaves no answer; a text without
    marks is all answer. The opening mark may be missing, since some chat templates put it into the prompt.
    """
    for opening, closing in THINK_TAGS:
        if closing in text:
            thinking, _, answer = text.rpartition(closing)
            return thinking.strip().removeprefix(opening).strip(), answer.strip()
        if opening in text:
            return text.partition(opening)[2].strip(), ""
    return "", text.strip()
