"""Prompt templates: where their words go, and that the prompt ids follow."""

import pytest

from bregman.data.chat import render_prompt
from bregman.data.templates import PromptTemplate, asked_with, templated
from bregman.models.tiny.tokenizer import character_tokenizer
from bregman.types import Problem

USER, SYSTEM = {"role": "user", "content": "2+2"}, {"role": "system", "content": "be"}
TEMPLATE = PromptTemplate(system="sys", user="1-{question}=?")


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (PromptTemplate(), [USER], [USER]),
        (TEMPLATE, [USER], [{"role": "system", "content": "sys"}, {"role": "user", "content": "1-2+2=?"}]),
        (TEMPLATE, [SYSTEM, USER], [{"role": "system", "content": "sys\n\nbe"}, {"role": "user", "content": "1-2+2=?"}]),
        (
            PromptTemplate(user="A{question}B"),
            [USER, {"role": "assistant", "content": "4"}, {"role": "user", "content": [{"type": "image"}]}],
            [
                USER,
                {"role": "assistant", "content": "4"},
                {"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "image"}, {"type": "text", "text": "B"}]},
            ],
        ),
    ],
    ids=["plain", "system", "both systems", "last turn, image"],
)
def test_templated(template, messages, expected):
    assert list(templated(template, tuple(messages))) == expected


def test_prompt_ids_follow_and_the_rest_stays():
    tokenizer = character_tokenizer("0123456789+-=?")
    plain = Problem(id="p", messages=(USER,), prompt_ids=tuple(render_prompt(tokenizer, [USER])), answer="4", columns={"a": 1})
    asked = asked_with(PromptTemplate(user="1-{question}=?", prefill="<think>"), tokenizer, None)(plain)
    assert tokenizer.decode(asked.prompt_ids) == tokenizer.decode(plain.prompt_ids).replace("2+2", "1-2+2=?") + "<think>"
    assert (asked.id, asked.answer, asked.columns) == ("p", "4", {"a": 1})
    assert asked_with(PromptTemplate(), tokenizer, None)(plain) is plain
