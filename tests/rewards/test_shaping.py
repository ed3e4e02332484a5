"""Shaping rewards: what repeats itself or comes near the token limit loses reward, linearly and between fixed ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from bregman.types import Group, Problem, Trajectory
from rewards.config import RewardsConfig
from rewards.overlong import overlong_penalty
from rewards.pool import RewardPool
from rewards.repetition import repetition_penalty
from rewards.scorer import Scorer


@pytest.mark.parametrize(
    ("ids", "ngram", "free", "penalty"),
    [
        ((), 2, 0.0, 0.0),
        ((1,), 2, 0.0, 0.0),  # shorter than one n-gram
        ((1, 2), 2, 0.0, 0.0),  # exactly one
        ((1, 2, 3, 4), 2, 0.0, 0.0),
        ((1, 2, 1, 2), 2, 0.0, -1 / 3),  # 12 21 12: one of three has been there
        ((7,) * 5, 2, 0.0, -3 / 4),
        ((7,) * 101, 1, 0.0, -100 / 101),
        ((1, 2, 1, 2), 1, 0.0, -1 / 2),
        ((1, 2, 1, 2), 2, 1 / 3, 0.0),  # all of it is free
        ((7,) * 5, 2, 0.5, -1 / 2),  # half of what is left beyond the free half
        ((7,) * 5, 2, 0.9, 0.0),
    ],
)
def test_repetition_penalty(ids: tuple[int, ...], ngram: int, free: float, penalty: float) -> None:
    assert repetition_penalty([ids], ngram=ngram, free=free) == [pytest.approx(penalty)]


def test_repetition_penalty_only_depends_on_what_is_equal() -> None:
    assert repetition_penalty([[5, 6, 5, 6, 5], [60, 50, 60, 50, 60]], ngram=2) == [-0.5, -0.5]


@pytest.mark.parametrize("settings", [{"ngram": 0}, {"free": 1.0}, {"free": -0.1}])
def test_repetition_penalty_refuses(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        repetition_penalty([[1, 2]], **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("length", "penalty"), [(0, 0.0), (75, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1.0), (101, -1.0), (1000, -1.0)]
)
def test_overlong_penalty(length: int, penalty: float) -> None:
    """DAPO Eq. 13 with L_max 100 and L_cache 20."""
    assert overlong_penalty([[0] * length], max_tokens=100, cache_tokens=20) == [pytest.approx(penalty)]


@pytest.mark.parametrize("cache", [0, -1, 101])
def test_overlong_penalty_refuses(cache: int) -> None:
    with pytest.raises(ValueError, match=f"cache_tokens is {cache} and max_tokens is 100"):
        overlong_penalty([[0]], max_tokens=100, cache_tokens=cache)


def test_parts_are_logged_by_name_and_add_up(tmp_path: Path) -> None:
    rewards = RewardsConfig.model_validate(
        {
            "functions": [
                {"function": "exact_answer"},
                {"function": "repetition_penalty", "weight": 0.5, "args": {"ngram": 1}},
                {"function": "overlong_penalty", "weight": 2.0, "args": {"max_tokens": 8, "cache_tokens": 4}},
            ]
        }
    )
    trajectory = Trajectory(
        problem_id="p", sample_index=0, token_ids=(1, 1, 2, 3, 4, 5), logprobs=(0.0,) * 6, segments=(), finish_reason="stop", text="9"
    )
    problem = Problem(id="p", messages=({"role": "user", "content": "?"},), prompt_ids=(1,), answer="9")
    with RewardPool(rewards, tmp_path) as pool:
        [group] = Scorer(rewards, pool.run).score([Group(problem=problem, trajectories=(trajectory,))])
    [scored] = group.trajectories
    assert scored.reward_parts == {
        "exact_answer": 1.0,
        "repetition_penalty": pytest.approx(-1 / 6),
        "overlong_penalty": pytest.approx(-0.5),
    }
    assert scored.reward == pytest.approx(1.0 - 0.5 / 6 - 2.0 * 0.5)
