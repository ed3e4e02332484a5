"""The examples in docs/rewards.md work as printed."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from bregman.config import parse
from bregman.types import Group, Problem, Trajectory
from rewards.config import RewardsConfig
from rewards.pool import RewardPool
from rewards.scorer import Scorer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "rewards.md"


def test_example(tmp_path: Path) -> None:
    blocks = dict(reversed(re.findall(r"```(python|yaml)\n(.*?)```", PAGE.read_text(), re.DOTALL)))  # the first of each
    (tmp_path / "sums.py").write_text(blocks["python"])
    rewards = parse(RewardsConfig, yaml.safe_load(blocks["yaml"])["rewards"], "docs/rewards.md")
    texts = ["<think>3+4</think>7", "<think>3+4</think>8", "<think>3+4</think>seven", "7"]
    trajectories = tuple(
        Trajectory(problem_id="p", sample_index=i, token_ids=(1,), logprobs=(0.0,), segments=(), finish_reason="stop", text=text)
        for i, text in enumerate(texts)
    )
    problem = Problem(id="p", messages=({"role": "user", "content": "3+4?"},), prompt_ids=(1,), columns={"numbers": [3, 4]})
    with RewardPool(rewards, tmp_path) as pool:
        [group] = Scorer(rewards, pool.run).score([Group(problem=problem, trajectories=trajectories)])
    assert [t.reward for t in group.trajectories] == [1.0, 0.1, 0.0, 1.0]
    assert [t.reward_parts["think_format"] for t in group.trajectories] == [1.0, 1.0, 1.0, 0.0]


def test_single_sample_example(tmp_path: Path) -> None:
    section = PAGE.read_text().partition("## One response at a time")[2].partition("\n## ")[0]
    blocks = dict(re.findall(r"```(python|yaml)\n(.*?)```", section, re.DOTALL))
    (tmp_path / "colours.py").write_text(blocks["python"])
    rewards = parse(RewardsConfig, {"functions": yaml.safe_load(blocks["yaml"])}, "docs/rewards.md")
    texts = ["<think>sky</think>blue", "<think>sky</think>light blue", "red"]
    trajectories = tuple(
        Trajectory(problem_id="p", sample_index=i, token_ids=(1,), logprobs=(0.0,), segments=(), finish_reason="stop", text=text)
        for i, text in enumerate(texts)
    )
    columns = {"shades": {"light blue": 0.9}}
    problem = Problem(id="p", messages=({"role": "user", "content": "?"},), prompt_ids=(1,), answer="blue", columns=columns)
    with RewardPool(rewards, tmp_path) as pool:
        [group] = Scorer(rewards, pool.run).score([Group(problem=problem, trajectories=trajectories)])
    assert [t.reward for t in group.trajectories] == [1.0, 0.9, 0.1]
