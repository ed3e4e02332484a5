"""One call of a reward function in TRL's signature, and the check of what it returns.

Owns the calling convention (as in TRL's `GRPOTrainer._calculate_rewards`, conversational data). Isolation is `rewards.pool`.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RESERVED = ("prompt", "prompts", "completion", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Arguments that are not data columns; a column of such a name is not passed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What a reward function may see of one response.

    Attributes:
        problem_id: for error messages.
        sample_index: place within its group, for error messages.
        prompt: the conversation before the response.
        completion: the text of the response.
        completion_ids: its token ids.
        columns: the problem's columns; every sample of a batch has the same keys, None where its data source lacks one.
    """

    problem_id: str
    sample_index: int
    prompt: tuple[Mapping[str, Any], ...]
    completion: str
    completion_ids: tuple[int, ...]
    columns: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a sample has no score: one line that names neither the reward nor the sample."""

    text: str


Outcome = float | None | Failure
"""A score, None for not applicable, or what went wrong."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """What a reward function takes.

    Attributes:
        required: columns it cannot do without.
        names: every parameter that can be passed by name.
        any_keyword: it has `**kwargs`.
    """

    required: tuple[str, ...]
    names: tuple[str, ...]
    any_keyword: bool

    def accepts(self, name: str) -> bool:
        return self.any_keyword or name in self.names


class BadResult(Exception):
    """A reward function returned something that is not one score per sample."""


def parameters_of(function: Callable[..., Any], args: Mapping[str, Any]) -> Parameters:
    """The parameters of `function` that are left once the recipe's `args` are bound."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C
        return Parameters(required=(), names=(), any_keyword=True)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return Parameters(
        required=tuple(p.name for p in named if p.default is p.empty and p.name not in RESERVED and p.name not in args),
        names=tuple(p.name for p in named),
        any_keyword=any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def call_reward(
    function: Callable[..., Any],
    samples: Sequence[Sample],
    args: Mapping[str, Any],
    parameters: Parameters,
    loop: asyncio.AbstractEventLoop,
) -> list[Outcome]:
    """The outcome of every sample from one call of `function`.

    `prompts` are lists of messages, `completions` lists of one assistant message; every column is a list. TRL's `trainer_state`
    is None, its `log_extra` and `log_metric` do nothing. Arguments that the function does not take are left out.

    Raises:
        BadResult: not a list of as many values as samples.
        BaseException: whatever the function raises.
    """
    columns = [key for key in samples[0].columns if key not in RESERVED]
    keywords: dict[str, Any] = {
        "prompts": [[dict(message) for message in sample.prompt] for sample in samples],
        "completions": [[{"role": "assistant", "content": sample.completion}] for sample in samples],
        "completion_ids": [list(sample.completion_ids) for sample in samples],
        "trainer_state": None,
        "log_extra": _ignore,
        "log_metric": _ignore,
        **{key: [sample.columns[key] for sample in samples] for key in columns},
        **args,
    }
    result = function(**{key: value for key, value in keywords.items() if parameters.accepts(key)})
    if inspect.isawaitable(result):
        result = loop.run_until_complete(_finish(result))
    if isinstance(result, str | bytes | Mapping) or not hasattr(result, "__len__") or not hasattr(result, "__iter__"):
        raise BadResult(f"returned {_shown(result)}, expected a list of {len(samples)} scores")
    if len(result) != len(samples):
        raise BadResult(f"returned {len(result)} scores for {len(samples)} samples")
    return [checked(value) for value in result]


async def _finish(result: Any) -> Any:
    return await result


def _ignore(*_: Any, **__: Any) -> None:
    """Stands in for TRL's logging callbacks."""


def checked(value: Any) -> Outcome:
    """What a function returned for one sample, as a score, None or a `Failure`."""
    if value is None:
        return None
    if isinstance(value, str | bytes):  # float("1") would pass
        return Failure(f"returned {_shown(value)}, expected a number or None")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return Failure(f"returned {_shown(value)}, expected a number or None")
    return number if math.isfinite(number) else Failure(f"returned {number}, expected a finite number or None")


def _shown(value: Any) -> str:
    try:
        text = " ".join(repr(value).split())
    except Exception:
        text = "?"
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
