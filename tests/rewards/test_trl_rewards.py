"""TRL's own reward functions plug in unchanged."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from bregman.types import Group, Problem, Trajectory
from rewards.config import RewardConfig, RewardsConfig
from rewards.pool import RewardPool
from rewards.scorer import Scorer

pytestmark = pytest.mark.skipif(find_spec("trl") is None, reason="the extra `trl` is not installed")


def test_trl_functions(tmp_path: Path) -> None:
    (tmp_path / "cosine.py").write_text(
        "from trl.rewards import get_cosine_scaled_reward\ncosine = get_cosine_scaled_reward(max_len=100)\n"
    )
    texts = [r"<think>a</think>\boxed{\frac{1}{3}}", r"<think>a</think>\boxed{\frac{1}{2}}", r"<think>a \boxed{1/3}"]
    trajectories = tuple(
        Trajectory(problem_id="p", sample_index=i, token_ids=(1,) * 50, logprobs=(0.0,) * 50, segments=(), finish_reason="stop", text=text)
        for i, text in enumerate(texts)
    )
    problem = Problem(id="p", messages=({"role": "user", "content": "?"},), prompt_ids=(1,), columns={"solution": r"$\frac{1}{3}$"})
    functions = [
        "trl.rewards:think_format_reward",
        "trl.rewards:accuracy_reward",
        "trl.rewards:reasoning_accuracy_reward",
        "cosine.py:cosine",
    ]
    config = RewardsConfig(functions=[RewardConfig(function=function) for function in functions])
    with RewardPool(config, tmp_path) as pool:
        [group] = Scorer(config, pool.run).score([Group(problem=problem, trajectories=trajectories)])
    assert [t.reward_error for t in group.trajectories] == [""] * 3
    assert [list(t.reward_parts.values()) for t in group.trajectories] == [
        [1.0, 1.0, 1.0, 0.75],
        [1.0, 0.0, 0.0, -0.75],
        [0.0, 1.0, 0.0, 0.75],
    ]
