"""Built-in `exact_answer`: the answer after the thinking equals the gold answer, or one of several, up to what the recipe lets pass."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from rewards.normal import plain_characters
from rewards.text import completion_text, split_thinking

LONGEST_NUMBER = 60
"""Characters of what is read as a number."""

_AROUND = " \"'`«»„‹›*_()[]{}「」『』【】《》"
_BEFORE = _AROUND + "¿¡"
_AFTER = _AROUND + ".,;:?、。"

_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?")


def exact_answer(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    answer: Sequence[Any],
    normalise: bool = False,
    last_number: bool = False,
    tolerance: float = 0.0,
    relative_tolerance: float = 0.0,
    **_: Any,
) -> list[float | None]:
    """1.0 where the answer is the gold one, else 0.0; None where the data has no gold answer.

    A gold answer that is a list holds the acceptable answers; an empty one is no gold answer. White space never counts.

    Args:
        normalise: case, sentence punctuation, quotes, brackets and markdown around the answer, articles and typographic characters
            do not count either, and digits of every script are digits. Other signs count (`C++`, `C#`, `$5`, `20°`, `5!`).
        last_number: the last number in the text is the answer, whatever stands around it.
        tolerance: greatest difference between two numbers; with either tolerance or `last_number`, numbers are compared by value.
        relative_tolerance: the same as a share of the gold number.
    """
    by_value = last_number or tolerance > 0 or relative_tolerance > 0

    def right(text: str, gold: Any) -> bool:
        if by_value and (wanted := number_in(_spaced(gold))) is not None:
            given = _last_number(text) if last_number else number_in(text)
            allowed = max(Decimal(str(tolerance)), abs(wanted) * Decimal(str(relative_tolerance)))
            return given is not None and abs(given - wanted) <= allowed
        return normal_text(text) == normal_text(_spaced(gold)) if normalise else _spaced(text) == _spaced(gold)

    def score(completion: Any, gold: Any) -> float | None:
        accepted = [one for one in (gold if isinstance(gold, list | tuple) else [gold]) if one is not None]
        text = split_thinking(completion_text(completion))[1]
        return float(any(right(text, one) for one in accepted)) if accepted else None

    return [score(completion, gold) for completion, gold in zip(completions, answer, strict=True)]


def number_in(text: str) -> Decimal | None:
    """The number that `text` is, in digits of any script, with or without thousands separators; None if it is anything else."""
    plain = plain_characters(text.strip()[: LONGEST_NUMBER + 1]).strip().rstrip(".")
    if len(plain) > LONGEST_NUMBER or not re.fullmatch(r"[-+]?(?:\d+|\d{1,3}(?:[, ]\d{3})+)?(?:\.\d+)?(?:[eE][-+]?\d{1,3})?", plain):
        return None
    try:
        return Decimal(re.sub("[, ]", "", plain))
    except InvalidOperation:  # nothing but a sign
        return None


def normal_text(text: str) -> str:
    """`text` in lower case, with plain characters, no sentence punctuation at its ends, and no English article before it."""
    plain = _spaced(unicodedata.normalize("NFKC", plain_characters(text))).casefold()
    return re.sub(r"^(?:the|an?)\s+(?=\S)", "", _without_ends(plain))


def _without_ends(text: str) -> str:
    """`text` without what belongs to the sentence around it; as it is where nothing else is there."""
    kept = text.lstrip(_BEFORE).rstrip(_AFTER)
    word = kept.rstrip(_AFTER + "!")
    if len(word) > 1 and word[-2:].isalpha():  # after a word an exclamation mark is punctuation; `5!` and `n!` are factorials
        kept = word
    return kept or text


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(plain_characters(text[-1000:]))
    return number_in(found[-1]) if found else None


def _spaced(text: Any) -> str:
    return " ".join(str(text).split())
