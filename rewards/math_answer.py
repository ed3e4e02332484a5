"""Built-in `math`: the final answer is mathematically equal to the gold one, in whatever form it is written.

Owns finding the answer and the verdict: our own text rules (`rewards.math_text`, `rewards.math_units`) before math-verify. Relies on
the main thread of a process (math-verify's own time limits are alarms) and on the reward pool, which kills, as a backstop.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

from rewards.math_text import buried, costly, key, normal_form, sides, without_name
from rewards.math_units import split_unit
from rewards.normal import latex_characters
from rewards.text import completion_text, split_thinking

LONGEST_ANSWER = 500
"""Characters; a longer final answer than this and than four times the gold one is wrong without being parsed."""

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # a hostile answer is not worth a log line


def math_answer(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    answer: Sequence[Any],
    require_boxed: bool = False,
    parse_seconds: int = 2,
    verify_seconds: int = 3,
    **_: Any,
) -> list[float | None]:
    r"""1.0 where the answer is equivalent to the gold one, else 0.0 (k1.5 sec. 2.3.5).

    The answer is the last `\boxed{}` after the thinking; without one, math-verify looks for an expression in the text after the
    thinking (`require_boxed` makes that wrong). What cannot be parsed or compared in time is wrong. None where the gold answer
    is missing or is not mathematics. Verdicts are kept by gold answer and answer.

    Args:
        parse_seconds: limit for parsing one expression; whole seconds, since alarms count those.
        verify_seconds: limit for one comparison.
    """

    def score(completion: Any, gold: Any) -> float | None:
        if gold is None or not str(gold).strip():
            return None
        text = split_thinking(completion_text(completion))[1]
        boxed = last_boxed(text)
        if boxed is None and require_boxed:
            return 0.0
        if boxed is None:  # only the end of the text can hold the final answer
            return _verdict(str(gold).strip(), text[-4 * LONGEST_ANSWER :], False, parse_seconds, verify_seconds)
        if len(boxed) > max(LONGEST_ANSWER, 4 * len(str(gold))):
            return 0.0
        return _verdict(str(gold).strip(), boxed, True, parse_seconds, verify_seconds)

    return [score(completion, gold) for completion, gold in zip(completions, answer, strict=True)]


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}`, braces balanced; None if there is none or it is never closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, first = 0, start + len("\\boxed")
    for position in range(first, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[first + 1 : position]
    return None


@lru_cache(maxsize=65536)
def _verdict(gold: str, answer: str, boxed: bool, parse_seconds: int, verify_seconds: int) -> float | None:
    wanted = normal_form(gold)
    if not key(wanted):
        return None
    if boxed:
        given = normal_form(answer)
        return 1.0 if key(given) == key(wanted) else _compared(wanted, given, parse_seconds, verify_seconds)
    if key(normal_form(answer)) == key(wanted):
        return 1.0
    if costly(wanted) or buried(answer):
        return 0.0
    # The expression is somewhere in the text, so that only its characters can be made plain.
    parsed_gold = _parse_gold(split_unit(wanted)[0], parse_seconds)
    parsed = parse(latex_characters(answer), parsing_timeout=parse_seconds) if parsed_gold else []
    if not parsed_gold:
        return None
    return float(bool(parsed) and verify(list(parsed_gold), parsed, timeout_seconds=verify_seconds))


def _compared(gold: str, answer: str, parse_seconds: int, verify_seconds: int) -> float | None:
    """The verdict on two answers in normal form that differ as text."""
    if costly(gold) or (costly(answer) and _parse_gold(gold, parse_seconds)):
        return 0.0
    gold_number, gold_unit = split_unit(gold)
    number, unit = split_unit(answer)
    if gold_unit and unit:
        if gold_unit.dimension != unit.dimension:
            return 0.0
        scale = gold_unit.factor / unit.factor
        if scale != 1:
            gold_number = rf"\frac{{{scale.numerator}}}{{{scale.denominator}}} \cdot ({gold_number})"
    if "=" in gold_number and "(" in gold_number.partition("=")[0] and "," not in gold_number:  # a function may go by any name
        gold_number, number = without_name(gold_number), without_name(number)
    if not _parse_gold(gold_number, parse_seconds):
        return None
    values = sides(number) if "=" not in gold_number else [number]
    return float(all(_equal(gold_number, value, parse_seconds, verify_seconds) for value in values))


def _equal(gold: str, answer: str, parse_seconds: int, verify_seconds: int) -> bool:
    def same(wanted: str, given: str) -> bool:
        parsed = parse(f"\\boxed{{{given}}}", parsing_timeout=parse_seconds)
        parsed_gold = list(_parse_gold(wanted, parse_seconds))
        return bool(parsed) and verify(parsed_gold, parsed, allow_set_relation_comp=True, timeout_seconds=verify_seconds)

    if same(gold, answer):
        return True
    percents = [text.removesuffix("%").removesuffix("\\") for text in (gold, answer)]
    return (gold.endswith("%") != answer.endswith("%")) and same(*percents)  # what percentage? 12.5


@lru_cache(maxsize=4096)  # the same gold answer comes once per sample of its group
def _parse_gold(gold: str, seconds: int) -> tuple[Any, ...]:
    return tuple(parse(gold if "$" in gold or "\\boxed" in gold else f"${gold}$", parsing_timeout=seconds))
