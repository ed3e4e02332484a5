"""The single-sample form of a reward: a function of one typed sample, marked by a decorator.

Owns the sample that users see, the mark, and calling such a function for every sample of a call. TRL's form is `rewards.call`.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from bregman.errors import RewardError
from rewards.call import Failure, Outcome, Parameters, Sample, checked
from rewards.loader import describe
from rewards.text import split_thinking

_MARK = "_bregman_single_sample"

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardSample:
    """One response to judge.

    Attributes:
        prompt: the conversation before the response, as messages.
        completion: the text of the response, thinking included.
        answer: the gold answer; None where the data has none.
        columns: every column of the problem's row, by name.
        images: the problem's images, in the order of their placeholders.
        completion_ids: the response's token ids.
    """

    prompt: tuple[Mapping[str, Any], ...]
    completion: str
    answer: Any = None
    columns: Mapping[str, Any]
    images: tuple[Any, ...] = ()
    completion_ids: tuple[int, ...] = ()

    @property
    def thinking(self) -> str:
        """What stands in the think block; empty if there is none."""
        return split_thinking(self.completion)[0]

    @property
    def final(self) -> str:
        """What follows the thinking; empty if the thinking was never closed."""
        return split_thinking(self.completion)[1]


def single_sample(function: F) -> F:
    """Mark `def reward(sample: RewardSample, **args) -> float | None` (or `async def`) as judging one response at a time.

    The recipe's `args` come as keyword arguments; everything about the problem is in the sample. The function itself is unchanged.
    """
    setattr(function, _MARK, True)
    return function


def is_single_sample(function: Callable[..., Any]) -> bool:
    return getattr(function, _MARK, False) is True


def sample_parameters(function: Callable[..., Any], args: Mapping[str, Any]) -> Parameters:
    """What a single-sample reward takes: every column, in its sample, and the recipe's `args` by name.

    Raises:
        RewardError: it has no parameter for the sample, or `args` lacks or has too many.
    """
    try:
        inspect.signature(function).bind(None, **args)
    except TypeError as error:
        own = [f"`{name}`" for name in list(inspect.signature(function).parameters)[1:]]
        fix = f"its args are {', '.join(own)}" if own else "it takes the sample and no args"
        where = f"reward `{getattr(function, '__name__', function)}`"
        raise RewardError(where, f"cannot be called with a sample and its args: {error}", fix) from None
    return Parameters(required=(), names=(), any_keyword=True)


def call_each(
    function: Callable[..., Any], samples: Sequence[Sample], args: Mapping[str, Any], file: str | None, loop: asyncio.AbstractEventLoop
) -> list[Outcome]:
    """The outcome of every sample, each judged on its own: a sample on which the function raises has failed, and no other.

    An `async` function judges all samples of a call side by side.

    Args:
        file: where the function is written, for messages.
    """
    if inspect.iscoroutinefunction(function):
        return loop.run_until_complete(_side_by_side(function, samples, args, file))
    pid = os.getpid()
    outcomes: list[Outcome] = []
    for sample in samples:
        try:
            outcomes.append(checked(function(_typed(sample), **args)))
        except Exception as error:
            outcomes.append(Failure(describe(error, file)))
        if os.getpid() != pid:  # the function forked and this is its child: the caller ends it
            break
    return outcomes


async def _side_by_side(
    function: Callable[..., Any], samples: Sequence[Sample], args: Mapping[str, Any], file: str | None
) -> list[Outcome]:
    results = await asyncio.gather(*(function(_typed(sample), **args) for sample in samples), return_exceptions=True)
    return [Failure(describe(result, file)) if isinstance(result, BaseException) else checked(result) for result in results]


def _typed(sample: Sample) -> RewardSample:
    return RewardSample(
        prompt=sample.prompt,
        completion=sample.completion,
        answer=sample.columns.get("answer"),
        columns=sample.columns,
        images=tuple(sample.columns.get("images") or ()),
        completion_ids=sample.completion_ids,
    )
