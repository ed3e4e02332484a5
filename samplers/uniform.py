"""Uniform sampling: shuffled passes over the eligible problems, and the base of the samplers that weigh them.

Owns which problems come next and the state that makes a resumed run draw the same ones. Token sampling belongs to the engine.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from bregman.types import Group, Problem


class UniformSampler:
    """Every problem once per pass, in an order shuffled anew for each pass.

    Args:
        problems: the training problems.
        seed: of the order.
    """

    def __init__(self, problems: Sequence[Problem], seed: int) -> None:
        self._problems = list(problems)
        self._random = random.Random(f"sampler {seed}")
        self._queue: list[int] = []

    def next_problems(self, count: int, iteration: int) -> list[Problem]:
        """`count` problems; none twice within one call unless there are fewer than `count`."""
        chosen: list[int] = []
        while len(chosen) < count:
            if not self._queue:
                fresh = list(range(len(self._problems)))
                self._random.shuffle(fresh)
                # `pop` takes from the end: what this call has already drawn comes last in the new pass.
                self._queue = [i for i in fresh if i in chosen] + [i for i in fresh if i not in chosen]
            chosen.append(self._queue.pop())
        return [self._problems[index] for index in chosen]

    def observe(self, groups: Sequence[Group]) -> None:
        """Uniform sampling learns nothing from results."""

    def state_dict(self) -> dict[str, Any]:
        return {"random": _to_json(self._random.getstate()), "queue": list(self._queue)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._random.setstate(_from_json(state["random"]))
        self._queue = list(state["queue"])


def _to_json(state: tuple[Any, ...]) -> list[Any]:
    version, words, gauss = state
    return [version, list(words), gauss]


def _from_json(state: Sequence[Any]) -> tuple[Any, ...]:
    version, words, gauss = state
    return version, tuple(words), gauss
