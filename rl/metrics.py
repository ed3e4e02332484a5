"""What an iteration reports about its groups and optimizer steps.

Owns metric names and the look at the start policy; writing them is the tracker's.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from bregman.protocols import Tracker
from bregman.types import Group, StepStats
from evals.evaluate import part_means
from rl.batches import has_signal


def group_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Rewards, lengths, and the share of groups that carry a signal."""
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    rewards = [t.reward for t in trajectories if t.reward is not None]
    lengths = [len(t.token_ids) for t in trajectories]
    return {
        "reward/mean": fmean(rewards) if rewards else 0.0,
        "accuracy": fmean(t.primary or 0.0 for t in trajectories),
        "groups_with_signal": fmean(has_signal(group) for group in groups),
        "response_tokens/mean": fmean(lengths),
        "response_tokens/max": float(max(lengths)),
        "truncated": fmean(t.finish_reason == "length" for t in trajectories),
        **{f"reward/{name}": mean for name, mean in part_means(trajectories).items()},
    }


def step_metrics(steps: Sequence[StepStats]) -> dict[str, float]:
    """Means over the optimizer steps of an iteration; log-ratios are those of the last step, the furthest from pi_i."""
    if not steps:
        return {"optimizer_steps": 0.0}
    return {
        "optimizer_steps": float(len(steps)),
        "loss": fmean(step.loss for step in steps),
        "grad_norm": fmean(step.grad_norm for step in steps),
        "learning_rate": steps[-1].learning_rate,
        **steps[-1].metrics,
    }


def warn_without_signal(groups: Sequence[Group], iteration: int, tracker: Tracker) -> None:
    """At the start, say how the start policy does; at any time, say plainly when there is nothing to learn from."""
    metrics = group_metrics(groups)
    rate, signal = metrics["accuracy"], metrics["groups_with_signal"]
    look = f"pass rate {rate:.2f}, {signal:.0%} of the groups have any signal"
    if signal == 0:
        reason = "every response is right" if rate == 1 else "no response is right" if rate == 0 else "within each group all are equal"
        if all(t.reward is None for group in groups for t in group.trajectories):
            reason = "every reward failed"
        tracker.warn(f"iteration {iteration}: nothing to learn from: {look} ({reason})")
    elif iteration == 0 and signal < 0.1:
        tracker.warn(f"start policy: {look}; RL will learn slowly: use easier problems, more samples, or more SFT first")
    elif iteration == 0:
        tracker.note(f"start policy: {look}")
