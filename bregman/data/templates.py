"""Asking a problem in other words: prompt templates around a problem's question.

Owns what a template is and how the problem it gives is rendered. The templates themselves belong to the stages that use them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pydantic import field_validator

from bregman.config import Config
from bregman.protocols import ImageEncoder
from bregman.types import Message, Problem

QUESTION = "{question}"


class PromptTemplate(Config):
    """How a problem is asked. The empty one asks it as it is.

    Attributes:
        system: a system turn before the problem's own turns; joined to its system turn if it has one.
        user: what becomes of the text of the last user turn; `{question}` stands for that text.
        prefill: how the response begins; the policy goes on from there.
    """

    system: str = ""
    user: str = QUESTION
    prefill: str = ""

    @field_validator("user")
    @classmethod
    def _has_one_place(cls, value: str) -> str:
        if value.count(QUESTION) != 1:
            raise ValueError(f"needs `{QUESTION}` once, where the question stands")
        return value

    @property
    def is_plain(self) -> bool:
        return not self.system and not self.prefill and self.user == QUESTION


def asked_with(template: PromptTemplate, tokenizer: Any, encoder: ImageEncoder | None) -> Callable[[Problem], Problem]:
    """A function that gives a problem with the messages and prompt ids of `template`; everything else stays.

    The function raises `DataError` where the chat template or the tokenizer refuses the text.
    """
    if template.is_plain:
        return lambda problem: problem
    from bregman.data.chat import expand_images, render_prompt

    prefill = tuple(tokenizer(template.prefill, add_special_tokens=False)["input_ids"]) if template.prefill else ()

    def ask(problem: Problem) -> Problem:
        messages, where = templated(template, problem.messages), f"problem {problem.id} in its template"
        prompt = render_prompt(tokenizer, messages, where, images=len(problem.images))
        ids, positions, _ = expand_images(prompt, problem.patches, encoder, where)
        places = () if positions is None else tuple(positions.tolist())
        return replace(problem, messages=messages, prompt_ids=(*ids.tolist(), *prefill), image_positions=places)

    return ask


def templated(template: PromptTemplate, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """`messages` as `template` asks them; images stay where they are in the question."""
    before, _, after = template.user.partition(QUESTION)
    last = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=None)
    turns = [_wrapped(before, message, after) if index == last else message for index, message in enumerate(messages)]
    if template.system and turns and turns[0]["role"] == "system":
        turns[0] = _wrapped(f"{template.system}\n\n", turns[0], "")
    elif template.system:
        turns.insert(0, {"role": "system", "content": template.system})
    return tuple(turns)


def _wrapped(before: str, message: Message, after: str) -> Message:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": f"{before}{content}{after}"}
    texts = [[{"type": "text", "text": text}] if text else [] for text in (before, after)]
    return {**message, "content": [*texts[0], *content, *texts[1]]}
