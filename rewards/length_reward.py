"""Length reward of Kimi k1.5 (arXiv 2501.12599) sec. 2.3.3: within a group, short right answers are preferred and long wrong ones
penalised. Owns the formula and its warm-up; what is right was decided before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from bregman.types import Group, Trajectory
from rewards.config import LengthRewardConfig

PART = "length_reward"


def length_rewards(lengths: Sequence[int], rewards: Sequence[float]) -> list[float]:
    """Length reward of every response of one group, in [-0.5, 0.5].

    lambda_i = 0.5 - (len_i - min_len) / (max_len - min_len); a right response (r_i == 1) gets lambda_i, any other min(0, lambda_i).
    The minimum and maximum are over the whole group, right and wrong responses together; all zero if they are equal.

    Args:
        lengths: response lengths in tokens.
        rewards: r_i, 1 where the response is right.
    """
    if len(lengths) != len(rewards):
        raise ValueError(f"{len(lengths)} lengths but {len(rewards)} rewards")
    shortest, longest = min(lengths, default=0), max(lengths, default=0)
    if shortest == longest:
        return [0.0] * len(lengths)
    lambdas = [0.5 - (length - shortest) / (longest - shortest) for length in lengths]
    return [value if math.isclose(reward, 1.0) else min(0.0, value) for value, reward in zip(lambdas, rewards, strict=True)]


def add_length_reward(groups: Sequence[Group], config: LengthRewardConfig, iteration: int) -> list[Group]:
    """`groups` with the length reward logged as part `length_reward` and, after the warm-up, `weight` times it added to the reward.

    r_i is the primary reward (the first part), so that a weighted total or a format bonus does not blur what is right.
    A trajectory without a reward is left alone and does not count in the minimum and maximum.

    Args:
        iteration: RL iteration from 0; the weight is 0 while `iteration < config.warmup_iterations`.
    """
    weight = config.weight if iteration >= config.warmup_iterations else 0.0
    return [replace(group, trajectories=_with_length_reward(group.trajectories, weight)) for group in groups]


def _with_length_reward(trajectories: Sequence[Trajectory], weight: float) -> tuple[Trajectory, ...]:
    scored = [t for t in trajectories if t.reward is not None]
    values = iter(length_rewards([len(t.token_ids) for t in scored], [_correctness(t) for t in scored]))

    def add(trajectory: Trajectory) -> Trajectory:
        if trajectory.reward is None:
            return trajectory
        value = next(values)
        parts = {**trajectory.reward_parts, PART: value}
        return replace(trajectory, reward=trajectory.reward + weight * value, reward_parts=parts)

    return tuple(add(t) for t in trajectories)


def _correctness(trajectory: Trajectory) -> float:
    primary = next(iter(trajectory.reward_parts.values()), None)
    if primary is None:
        primary = trajectory.reward
    assert primary is not None  # only scored trajectories come here
    return primary
