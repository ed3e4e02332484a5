"""Built-in `mmmu`, `mathvision` and `mathvista`: the scores of those benchmarks, by rules.

Owns which rule applies to which question, and MathVista's rounding. Finding letters is `choice`'s, mathematics is `math`'s; the
columns are those that a source with the `format` of the same name gives.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any

from rewards.choice import choice, chosen
from rewards.exact import normal_text
from rewards.math_answer import last_boxed, math_answer
from rewards.normal import plain_characters
from rewards.text import completion_text, split_thinking

LONGEST_ANSWER = 300
"""Characters of a final answer that are looked at."""

_SAID = re.compile(r"(?:final\s+answer|answer|result)\s*(?:is|are|:|=)+\s*", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+)?(?:[eE][-+]?\d{1,3})?")
_FRACTION = re.compile(r"(\d*)\s*\\[dt]?frac\s*\{?(-?\d+)\}?\s*\{?(\d+)\}?")
_UNIT_POWER = re.compile(r"(?<=[A-Za-z}])\s*\^\s*\{?\s*-?\d+\s*\}?|(?<=[A-Za-z])(?<!\d[eE])[23](?![\d.])")
"""The powers in `cm^2`, `\\text{m}^{3}`, `s^{-1}` and `cm2`, but not the exponents of numbers."""


def mmmu(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    answer: Sequence[Any],
    options: Sequence[Any],
    question_type: Sequence[Any],
    **_: Any,
) -> list[float | None]:
    """1.0 where MMMU's question is answered rightly, else 0.0.

    Multiple choice: as `choice`. Open: the final answer is one of the gold ones; numbers after rounding to two decimals, texts
    where the final answer holds the gold one as whole words, as MMMU's own evaluation has it.
    """

    def score(completion: Any, gold: Any, given: Any, kind: Any) -> float | None:
        if kind != "open":
            return choice([None], [completion], [gold], options=[given])[0]
        said = final_answer(completion)
        accepted = gold if isinstance(gold, list | tuple) else [gold]
        return float(any(_open_equal(said, str(one)) for one in accepted))

    return [score(*row) for row in zip(completions, answer, options, question_type, strict=True)]


def mathvision(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], options: Sequence[Any], **_: Any
) -> list[float | None]:
    """1.0 where MATH-Vision's question is answered rightly, else 0.0: as `choice` where it has options, else as `math`."""

    def score(completion: Any, gold: Any, given: Any) -> float | None:
        if given:
            return choice([None], [completion], [gold], options=[given])[0]
        return math_answer([None], [completion], [gold])[0]

    return [score(*row) for row in zip(completions, answer, options, strict=True)]


def mathvista(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    answer: Sequence[Any],
    options: Sequence[Any],
    answer_type: Sequence[Any],
    precision: Sequence[Any],
    **_: Any,
) -> list[float | None]:
    """1.0 where MathVista's question is answered rightly, else 0.0.

    Multiple choice: the chosen option's text is the gold one. Free form, by `answer_type`: an integer after cutting decimals off,
    a float after rounding to `precision` decimals, a list element by element, a text up to case and punctuation. Units after a
    number do not count. A final answer that names no option is wrong, where MathVista's own script takes the most similar one.
    """

    def score(completion: Any, gold: Any, given: Any, kind: Any, decimals: Any) -> float | None:
        if given:
            texts = {chr(ord("A") + index): str(text) for index, text in enumerate(given)}
            letters = chosen(split_thinking(completion_text(completion))[1], texts, set(texts))
            return float(len(letters) == 1 and texts[next(iter(letters))] == str(gold))
        return float(_free_form_equal(final_answer(completion), str(gold), str(kind), decimals))

    return [score(*row) for row in zip(completions, answer, options, answer_type, precision, strict=True)]


def final_answer(completion: Any) -> str:
    r"""What a response gives as its answer: the last `\boxed{}`, else what follows the last "answer is", else its last line."""
    text = split_thinking(completion_text(completion))[1]
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed[:LONGEST_ANSWER]
    said = list(_SAID.finditer(text))
    rest = text[said[-1].end() :].strip() if said else ""
    if rest:
        return rest.split("\n")[0][:LONGEST_ANSWER]
    return text.strip().split("\n")[-1][-LONGEST_ANSWER:]


def number(text: str) -> float | None:
    """The number that `text` is, with or without a unit (`12 cm^2`); of an equation its right side; `3\\frac{1}{2}` is 3.5. None if
    there is none, or several."""
    text = plain_characters(text).split("=")[-1].replace("\\,", "").replace("\\!", "")
    text = _FRACTION.sub(lambda match: repr(int(match[1] or 0) + int(match[2]) / int(match[3])) if int(match[3]) else "", text)
    text = _UNIT_POWER.sub("", text)
    found = [match[0] for match in _NUMBER.finditer(text) if re.search(r"\d", match[0])]
    slash = re.fullmatch(r"\s*\$?\s*(-?\d+)\s*/\s*(\d+)\s*\$?\s*", text)
    if slash and int(slash[2]):
        return int(slash[1]) / int(slash[2])
    if len(found) != 1:
        return None
    value = float(found[0].replace(",", ""))
    return value if abs(value) < 1e300 else None


def _open_equal(said: str, gold: str) -> bool:
    wanted, given = number(gold) if _is_number(gold) else None, number(said)
    if wanted is not None:
        return given is not None and round(given, 2) == round(wanted, 2)
    needle, hay = normal_text(gold), normal_text(said)
    return bool(needle) and re.search(rf"(?<!\w){re.escape(needle)}(?!\w)", hay) is not None


def _free_form_equal(said: str, gold: str, kind: str, decimals: Any) -> bool:
    if kind == "list":
        wanted, given = _numbers(gold), _numbers(said)
        return wanted is not None and wanted == given
    if kind not in ("integer", "float"):
        return normal_text(said) == normal_text(gold) != ""
    wanted_number, given_number = number(gold), number(said)
    if wanted_number is None or given_number is None:
        return False
    if kind == "integer":
        return int(given_number) == int(wanted_number)
    return round(given_number, int(decimals)) == round(wanted_number, int(decimals))


def _numbers(text: str) -> list[Any] | None:
    match = re.search(r"\[[^\[\]]*\]", text)
    try:
        return list(ast.literal_eval(match[0])) if match else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _is_number(text: str) -> bool:
    return re.fullmatch(_NUMBER, text.strip()) is not None and bool(re.search(r"\d", text))
