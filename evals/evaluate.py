"""Sampled accuracy on held-out problems: avg@k, pass@k and response lengths.

Owns how scored groups become an `Evaluation`; sampling and scoring are the engine's and the rewards'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from bregman.errors import DataError
from bregman.protocols import RewardScorer, RolloutEngine
from bregman.types import Evaluation, Group, Problem, Trajectory
from evals.config import EvalConfig


def evaluate(
    engine: RolloutEngine, scorer: RewardScorer, problems: Sequence[Problem], config: EvalConfig
) -> tuple[Evaluation, list[Group]]:
    """Sample answers with the weights that `engine` holds and score them.

    Returns:
        The summary, and the scored groups it came from.

    Raises:
        DataError: there is no problem to evaluate.
    """
    if not problems:
        raise DataError("evaluation.problems", "no problems", "check the source and its filters")
    groups = scorer.score(engine.rollout(problems, config.sampling, seed=config.seed))
    return summarise(groups), groups


def summarise(groups: Sequence[Group]) -> Evaluation:
    """Means over all samples. A sample whose primary reward failed counts as wrong."""
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    right = [[t.primary or 0.0 for t in group.trajectories] for group in groups]
    return Evaluation(
        accuracy=fmean(score for scores in right for score in scores),
        pass_at_k=fmean(max(scores) >= 1.0 for scores in right),
        mean_tokens=fmean(len(t.token_ids) for t in trajectories),
        num_problems=len(groups),
        samples_per_problem=max(len(group.trajectories) for group in groups),
        truncated=fmean(t.finish_reason == "length" for t in trajectories),
        metrics=part_means(trajectories),
    )


def part_means(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Mean of every reward and metric over the trajectories to which it applied; those that applied to none are left out."""
    means = {}
    for name in dict.fromkeys(name for trajectory in trajectories for name in trajectory.reward_parts):
        values = [value for trajectory in trajectories if (value := trajectory.reward_parts.get(name)) is not None]
        if values:
            means[name] = fmean(values)
    return means


def warn_about_failures(groups: Sequence[Group], where: str, warn: Callable[[str], None]) -> None:
    """Say how many responses had a failed reward, and what the first of them said."""
    errors = [trajectory.reward_error for group in groups for trajectory in group.trajectories if trajectory.reward_error]
    if errors:
        warn(f"{where}: {len(errors)} responses with a failed reward, the first: {errors[0]}")
