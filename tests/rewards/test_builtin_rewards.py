"""Built-in rewards that need no library: thinking and answer apart, exact answer, think format."""

from __future__ import annotations

import pytest

from rewards.exact import exact_answer
from rewards.text import completion_text, split_thinking
from rewards.think_format import think_format


def said(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        ("<think>a b</think> 9", "a b", "9"),
        ("<think>\na\n</think>\n\n9\n", "a", "9"),
        ("a b</think>9", "a b", "9"),  # the template opened the block
        ("<think>never closed 9", "never closed 9", ""),
        ("no thinking, 9", "", "no thinking, 9"),
        ("<think>a</think>8<think>b</think>9", "a</think>8<think>b", "9"),
        ("<think></think>", "", ""),
        ("◁think▷a◁/think▷9", "a", "9"),
        ("◁think▷a", "a", ""),
        ("", "", ""),
    ],
)
def test_split_thinking(text: str, thinking: str, answer: str) -> None:
    assert split_thinking(text) == (thinking, answer)


def test_completion_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    assert completion_text("plain") == "plain"
    assert completion_text([{"role": "assistant", "content": "one"}, {"role": "assistant", "content": None}]) == "one"
    assert completion_text([{"role": "assistant", "content": parts}]) == "ab"


@pytest.mark.parametrize(
    ("text", "gold", "score"),
    [
        ("<think>8? no</think>9", "9", 1.0),
        ("<think>9</think>8", "9", 0.0),
        ("9", "9", 1.0),
        ("  6 + 1\n = 7 ", "6 + 1 = 7", 1.0),
        ("6+1", "6 + 1", 0.0),
        ("<think>9", "9", 0.0),
        ("9", 9, 1.0),
        ("a", "A", 0.0),
        ("9", None, None),
        ("", "", 1.0),
    ],
)
def test_exact_answer(text: str, gold: object, score: float | None) -> None:
    assert exact_answer([[]], said(text), answer=[gold], anything="else") == [score]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>a</think>9", 1.0),
        (" \n<think>\na\n</think>\n9", 1.0),
        ("<think></think>9", 1.0),
        ("<think>a</think>", 0.0),
        ("<think>a</think>  \n ", 0.0),
        ("<think>a 9", 0.0),
        ("a</think>9", 0.0),
        ("9", 0.0),
        ("well <think>a</think>9", 0.0),
        ("<think>a</think>9<think>b</think>9", 0.0),
        ("<think>a<think>b</think>9", 0.0),
        ("<think>a</think></think>9", 0.0),
        ("</think>a<think>9", 0.0),
        ("◁think▷a◁/think▷9", 1.0),
        ("", 0.0),
    ],
)
def test_think_format(text: str, score: float) -> None:
    assert think_format(completions=said(text), prompts=[[]]) == [score]


def test_think_format_when_the_prompt_opens_the_block() -> None:
    texts = ["a</think>9", "<think>a</think>9", "a 9", "a</think>"]
    assert think_format(completions=said(*texts), opened_by_prompt=True) == [1.0, 0.0, 0.0, 0.0]
