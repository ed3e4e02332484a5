"""Built-in `math`: the final answer is mathematically equal to the gold one, in whatever form it is written (math-verify).

Relies on the main thread of a process (math-verify's own time limits are alarms) and on the reward pool as a backstop.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

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
    is missing or is not mathematics.

    Args:
        parse_seconds: limit for parsing one expression; whole seconds, since alarms count those.
        verify_seconds: limit for one comparison.
    """

    def score(completion: Any, gold: Any) -> float | None:
        parsed_gold = None if gold is None else _parse_gold(str(gold).strip(), parse_seconds)
        if not parsed_gold:
            return None
        text = split_thinking(completion_text(completion))[1]
        boxed = last_boxed(text)
        if boxed is None and require_boxed:
            return 0.0
        if boxed is not None and len(boxed) > max(LONGEST_ANSWER, 4 * len(str(gold))):
            return 0.0
        # Without a box only the end of the text can hold the final answer.
        prediction = text[-4 * LONGEST_ANSWER :] if boxed is None else f"\\boxed{{{boxed.strip().rstrip('.')}}}"
        parsed = parse(prediction, parsing_timeout=parse_seconds)
        return float(bool(parsed) and verify(list(parsed_gold), parsed, timeout_seconds=verify_seconds))

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


@lru_cache(maxsize=4096)  # the same gold answer comes once per sample of its group
def _parse_gold(gold: str, seconds: int) -> tuple[Any, ...]:
    return tuple(parse(gold if "$" in gold or "\\boxed" in gold else f"${gold}$", parsing_timeout=seconds))
