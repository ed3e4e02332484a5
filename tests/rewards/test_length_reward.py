"""Length reward of k1.5 sec. 2.3.3 against numbers worked out by hand."""

from __future__ import annotations

import pytest

from bregman.types import Group, Problem, Trajectory
from rewards.config import LengthRewardConfig
from rewards.length_reward import add_length_reward, length_rewards

BY_HAND = [
    # lengths, r -> length reward; lambda = 0.5 - (len - min) / (max - min)
    ([10, 20, 30], [1, 1, 1], [0.5, 0.0, -0.5]),
    ([10, 20, 30], [0, 0, 0], [0.0, 0.0, -0.5]),
    ([10, 15, 20, 30], [1, 0, 0, 1], [0.5, 0.0, 0.0, -0.5]),
    ([100, 300, 200, 150], [1, 0, 1, 0], [0.5, -0.5, 0.0, 0.0]),
    # The misreading takes min and max over the right answers only: 20 and 30 would then give [0.5, -0.5] to the right ones.
    ([10, 20, 30, 50], [0, 1, 1, 0], [0.0, 0.25, 0.0, -0.5]),
    ([10, 20], [0.5, 0.99], [0.0, -0.5]),  # partly right is not right
    ([7, 7, 7], [1, 0, 1], [0.0, 0.0, 0.0]),
    ([7], [1], [0.0]),
    ([], [], []),
    ([0, 4], [1, 1], [0.5, -0.5]),
]


@pytest.mark.parametrize(("lengths", "rewards", "expected"), BY_HAND)
def test_by_hand(lengths: list[int], rewards: list[float], expected: list[float]) -> None:
    assert length_rewards(lengths, rewards) == pytest.approx(expected)


def test_unequal_lists() -> None:
    with pytest.raises(ValueError, match="2 lengths but 1 rewards"):
        length_rewards([1, 2], [1.0])


def group_of(*responses: tuple[int, float | None, dict[str, float | None]]) -> Group:
    trajectories = tuple(
        Trajectory(
            problem_id="p",
            sample_index=i,
            token_ids=tuple(range(length)),
            logprobs=(0.0,) * length,
            segments=(),
            finish_reason="stop",
            text="",
            reward=reward,
            reward_parts=parts,
        )
        for i, (length, reward, parts) in enumerate(responses)
    )
    return Group(problem=Problem(id="p", messages=(), prompt_ids=(1,)), trajectories=trajectories)


def test_weight_and_warm_up() -> None:
    group = group_of((10, 1.0, {"right": 1.0}), (20, 1.0, {"right": 1.0}), (30, 0.0, {"right": 0.0}))
    config = LengthRewardConfig(weight=0.2, warmup_iterations=3)
    for iteration, weight in [(0, 0.0), (2, 0.0), (3, 0.2), (9, 0.2)]:
        [after] = add_length_reward([group], config, iteration)
        assert [t.reward_parts["length_reward"] for t in after.trajectories] == pytest.approx([0.5, 0.0, -0.5])
        assert [t.reward for t in after.trajectories] == pytest.approx([1 + 0.5 * weight, 1.0, -0.5 * weight])
    assert "length_reward" not in group.trajectories[0].reward_parts


def test_the_primary_part_says_what_is_right() -> None:
    parts = {"right": 1.0, "format": 0.5}, {"right": 0.0, "format": 1.0}
    [after] = add_length_reward([group_of((10, 1.5, parts[0]), (20, 1.0, parts[1]), (4, 1.0, parts[1]))], LengthRewardConfig(weight=1), 0)
    assert [t.reward for t in after.trajectories] == pytest.approx([1.5 + 0.125, 1.0 - 0.5, 1.0])
    assert list(after.trajectories[0].reward_parts) == ["right", "format", "length_reward"]


def test_a_response_without_reward_is_left_alone_and_does_not_count() -> None:
    group = group_of((1, None, {"right": None}), (10, 1.0, {"right": 1.0}), (30, 1.0, {"right": 1.0}), (900, None, {}))
    [after] = add_length_reward([group], LengthRewardConfig(weight=1.0), 0)
    assert after.trajectories[0] == group.trajectories[0]
    assert after.trajectories[3] == group.trajectories[3]
    assert [t.reward for t in after.trajectories[1:3]] == pytest.approx([1.5, 0.5])
    [nothing] = add_length_reward([group_of((3, None, {}))], LengthRewardConfig(weight=1.0), 0)
    assert nothing.trajectories[0].reward is None
