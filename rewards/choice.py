"""Built-in `choice`: the letter, letters or option text chosen after the thinking are the gold ones."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.exact import normal_text
from rewards.normal import plain_characters
from rewards.text import completion_text, split_thinking

LONGEST_TEXT = 2000
"""Characters at the end of a response in which the choice is looked for."""

_LETTERS = r"\(?\[?\b([A-Za-z])\b[)\].:]?"
_SEVERAL = re.compile(rf"{_LETTERS}(?:\s*(?:,|;|&|/|\band\b|\s)\s*(?:and\s+)?{_LETTERS})*", re.IGNORECASE)
_SAID = re.compile(
    r"(?:final\s+answers?|correct\s+(?:answers?|options?|choices?)|answers?|options?\s+chosen|choose|choice|select)"
    r"\s*(?:is|are|:|=|-)*\s*(?:the\s+)?(?:options?|choices?|letters?)?\s*[:*]*\s*",
    re.IGNORECASE,
)


def choice(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    answer: Sequence[Any],
    options: Sequence[Any] | None = None,
    letters: int = 10,
    **_: Any,
) -> list[float | None]:
    r"""1.0 where exactly the gold options are chosen, else 0.0; None where the data has no gold answer.

    Understood: `B`, `(b)`, `B.`, `B) its text`, `\boxed{B}`, `**B**`, "the answer is B", the text of the option, and for several
    options `A, C`, `AC`, `A and C`. The last choice that the answer states counts; naming a further option makes it wrong.

    Args:
        answer: a letter, several (`AC`, `A,C` or a list), an option's text, or its index from 0 as a number.
        options: the data column of that name: a list of texts, or a mapping from letter to text. Without it only letters count.
        letters: how many letters, from A, can be options where `options` is not given.
    """
    rows = options if options is not None else [None] * len(completions)

    def score(completion: Any, gold: Any, given: Any) -> float | None:
        texts = _options(given)
        allowed = set(texts) or {chr(ord("A") + index) for index in range(letters)}
        wanted = _gold(gold, texts, allowed)
        if not wanted:
            return None
        text = split_thinking(completion_text(completion))[1]
        return float(chosen(text, texts, allowed) == wanted)

    return [score(*row) for row in zip(completions, answer, rows, strict=True)]


def chosen(text: str, texts: Mapping[str, str], allowed: set[str]) -> frozenset[str]:
    """The letters that `text` chooses; empty if it does not say."""
    text = plain_characters(text[-LONGEST_TEXT:])
    boxed = re.findall(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}", text)
    if boxed:
        return _whole(boxed[-1], texts, allowed)
    if whole := _whole(text, texts, allowed):
        return whole
    for match in reversed(list(_SAID.finditer(text))):
        rest = text[match.end() :].split("\n")[0]
        if found := _whole(rest, texts, allowed) or _leading(rest, allowed):
            return found
    last = text.strip().split("\n")[-1]
    return _whole(last, texts, allowed)


def _whole(text: str, texts: Mapping[str, str], allowed: set[str]) -> frozenset[str]:
    """The options, where `text` is nothing but letters, or one option's letter and text, or its text."""
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|rm)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"[*_$`]+", "", text).strip()
    same = [letter for letter, option in texts.items() if normal_text(option) == normal_text(text) != ""]
    if len(same) == 1:
        return frozenset(same)
    bare = re.sub(r"^(?:options?|choices?)\s+", "", text, flags=re.IGNORECASE).rstrip(".! ")
    if _SEVERAL.fullmatch(bare):
        found = [letter.upper() for letter in re.findall(r"\b([A-Za-z])\b", bare)]
        return frozenset(found) if set(found) <= allowed else frozenset()
    if re.fullmatch("[A-Z]+", bare) and set(bare) <= allowed and len(set(bare)) == len(bare):
        return frozenset(bare)
    labelled = re.match(r"\(?([A-Za-z])(?:[).:]|\s+-)\s*(.+)", bare, re.DOTALL)
    if labelled and labelled[1].upper() in allowed:
        option = texts.get(labelled[1].upper())
        if option is not None and normal_text(option) == normal_text(labelled[2]):
            return frozenset([labelled[1].upper()])
        if not texts and not re.search(r"(?:^|\W)\(?[A-Z][).:]", labelled[2]):  # no second label
            return frozenset([labelled[1].upper()])
    return frozenset()


def _leading(text: str, allowed: set[str]) -> frozenset[str]:
    """The capital letters at the start of `text`, where no words of another choice follow."""
    text = re.sub(r"[*_$`]+", "", text)
    match = re.match(r"\(?\[?([A-Z])\b[)\].:]?(?:\s*(?:,\s*(?:and\s+)?|and\s+|&\s*)\(?([A-Z])\b\)?)*", text)
    if match is None or re.match(r"\s*(?:or|/|but)\b", text[match.end() :]):
        return frozenset()
    found = frozenset(re.findall(r"\b([A-Z])\b", match[0]))
    return found if found <= allowed else frozenset()


def _options(given: Any) -> dict[str, str]:
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return {str(letter).strip().upper(): str(text) for letter, text in given.items() if text is not None}
    return {chr(ord("A") + index): str(text) for index, text in enumerate(given)}


def _gold(gold: Any, texts: Mapping[str, str], allowed: set[str]) -> frozenset[str]:
    if gold is None:
        return frozenset()
    if isinstance(gold, int) and not isinstance(gold, bool):
        letter = chr(ord("A") + gold) if 0 <= gold < 26 else ""
        return frozenset([letter]) if letter in allowed else frozenset()
    if isinstance(gold, list | tuple):
        return frozenset().union(*(_gold(one, texts, allowed) for one in gold))
    text = plain_characters(str(gold)).strip()
    return _whole(text, texts, allowed) or _whole(text.upper(), texts, allowed)
