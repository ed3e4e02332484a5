"""Groups in, scored groups out: builds what reward functions see and combines what they return.

Owns part names, weights and the policy on failures. Where the functions run is passed in: a `RewardPool` or remote workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from bregman.errors import RewardError
from bregman.types import Group, Problem, Trajectory
from rewards.call import Failure, Outcome, Sample
from rewards.config import RewardConfig, RewardsConfig

Runner = Callable[[Sequence[Sample]], list[list[Outcome]]]
"""`RewardPool.run` or something like it: outcomes as `[function][sample]`."""

NOT_SCORED = ("abort", "error")
"""Finish reasons of responses that are unfinished or lost: there is nothing to judge yet."""


class Scorer:
    """Implements `bregman.protocols.RewardScorer`.

    Args:
        rewards: the functions, their weights, and what a failure does.
        run: runs the functions; `RewardPool(rewards, folder).run`.

    Raises:
        RewardError: two functions have the same part name.
    """

    def __init__(self, rewards: RewardsConfig, run: Runner) -> None:
        self._rewards, self._run = rewards, run
        self.names = part_names(rewards)

    def score(self, groups: Sequence[Group]) -> list[Group]:
        """Groups with the rewards filled in.

        `reward_parts` has every function in the order of the recipe, the primary one first. The total is the weighted sum over
        the parts that apply; functions of weight 0 are metrics and count only where no function has a weight. Responses that
        are unfinished or lost (`abort`, `error`) are left as they are.

        A failure is in `reward_error`; by `on_failure`: `drop` leaves reward None, `zero` counts the part as 0. A failed metric
        is recorded and changes no reward.

        Raises:
            RewardError: a function cannot be run at all, or failed under `on_failure: stop`.
        """
        trajectories = [t for group in groups for t in group.trajectories if t.finish_reason not in NOT_SCORED]
        results = self._run(samples_of(groups))
        scored = {id(trajectory): self._combine(trajectory, outcomes) for trajectory, *outcomes in zip(trajectories, *results, strict=True)}
        return [replace(group, trajectories=tuple(scored.get(id(t), t) for t in group.trajectories)) for group in groups]

    def _combine(self, trajectory: Trajectory, outcomes: Sequence[Outcome]) -> Trajectory:
        parts: dict[str, float | None] = {}
        errors, dropped = [], False
        for config, name, outcome in zip(self._rewards.functions, self.names, outcomes, strict=True):
            if not isinstance(outcome, Failure):
                parts[name] = outcome
                continue
            who = f"reward `{name}`, problem `{trajectory.problem_id}`, sample {trajectory.sample_index}"
            if self._rewards.on_failure == "stop":
                raise RewardError(who, outcome.text, "mend the function, or let rewards.on_failure be drop or zero")
            errors.append(f"{who}: {outcome.text}")
            counts = self._counts(config)
            parts[name] = 0.0 if counts and self._rewards.on_failure == "zero" else None
            dropped |= counts and self._rewards.on_failure == "drop"
        total = None if dropped else self._total(parts)
        if total is None and not errors:
            errors.append(f"no reward applied to problem `{trajectory.problem_id}`, sample {trajectory.sample_index}")
        return replace(trajectory, reward=total, reward_parts=parts, reward_error="; ".join(errors))

    def _total(self, parts: dict[str, float | None]) -> float | None:
        values = [
            config.weight * value
            for config, name in zip(self._rewards.functions, self.names, strict=True)
            if (value := parts[name]) is not None and self._counts(config)
        ]
        return sum(values) if values else None

    def _counts(self, config: RewardConfig) -> bool:
        return config.weight != 0 or all(other.weight == 0 for other in self._rewards.functions)


def part_names(rewards: RewardsConfig) -> list[str]:
    """The name of every function in metrics and rollouts: its `name`, or what stands after the colon of its `function`.

    Raises:
        RewardError: a name occurs twice.
    """
    names = [config.name or config.function.rpartition(":")[2] for config in rewards.functions]
    for index, name in enumerate(names):
        if name in names[:index]:
            where = f"rewards.functions[{index}]"
            raise RewardError(where, f"a second reward named `{name}`", "give it a `name:` of its own")
    return names


def samples_of(groups: Sequence[Group]) -> list[Sample]:
    """What reward functions see, for every finished response in order.

    The gold answer is the column `answer` unless the data has one of that name; a problem's images are the column `images`. Every
    sample gets every column of the batch, so that which columns a function sees does not depend on how the batch is split.
    """
    columns = dict.fromkeys(key for group in groups for key in _row(group.problem))
    return [
        Sample(
            problem_id=group.problem.id,
            sample_index=trajectory.sample_index,
            prompt=group.problem.messages,
            completion=trajectory.text,
            completion_ids=trajectory.token_ids,
            columns=row,
        )
        for group in groups
        for row in [columns | _row(group.problem)]
        for trajectory in group.trajectories
        if trajectory.finish_reason not in NOT_SCORED
    ]


def _row(problem: Problem) -> dict[str, Any]:
    answer = {} if problem.answer is None else {"answer": problem.answer}
    images = {"images": list(problem.images)} if problem.images else {}
    return answer | dict(problem.columns) | images
