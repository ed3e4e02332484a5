"""Shortest rejection sampling and preference pairs, k1.5 sec. 2.4."""

from __future__ import annotations

import pytest
from fakes import problem

from bregman.types import Group, Segment, Trajectory
from sft.long2short import preference_pairs, shortest_right


def group(*samples: tuple[int, float | None, str] | tuple[int, float | None]) -> Group:
    """Samples as (length, primary reward, finish reason); token ids tell them apart."""
    trajectories = []
    for index, (length, reward, *reason) in enumerate(samples):
        trajectories.append(
            Trajectory(
                problem_id="p",
                sample_index=index,
                token_ids=tuple([index + 1] * length),
                logprobs=(0.0,) * length,
                segments=(Segment(policy_version=0, length=length),),
                finish_reason=reason[0] if reason else "stop",
                text="",
                reward=reward,
                reward_parts={"right": reward},
            )
        )
    return Group(problem=problem("p"), trajectories=tuple(trajectories))


def pairs(given: Group, **options: float) -> list[tuple[int, int]]:
    return [(chosen.sample_index, rejected.sample_index) for chosen, rejected in preference_pairs(given, **options)]


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([(5, 1.0), (3, 1.0), (4, 1.0)], 1),
        ([(5, 1.0), (3, 0.0)], 0),  # the shorter one is wrong
        ([(4, 1.0), (4, 1.0)], 0),  # the first of equals
        ([(2, 1.0, "length"), (6, 1.0)], 1),  # cut off is not an answer
        ([(2, 1.0, "repetition"), (6, 1.0)], 1),
        ([(2, None), (6, 1.0)], 1),  # its reward failed
        ([(2, 0.5), (6, 1.0)], 1),
        ([(2, 0.0), (3, None)], None),
    ],
)
def test_shortest_right(samples, expected):
    found = shortest_right(group(*samples))
    assert (found.sample_index if found else None) == expected


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([(10, 1.0), (4, 1.0), (5, 0.0)], [(1, 0), (1, 2)]),
        ([(4, 1.0), (6, 1.0), (7, 1.0)], [(0, 2)]),  # 6 is exactly 1.5 times as long: not more
        ([(4, 1.0), (2, 0.0), (9, 0.0, "length")], [(0, 1), (0, 2)]),
        ([(4, 1.0), (2, None), (3, 0.0, "error"), (3, 0.0, "abort")], []),  # says nothing about the answer
        ([(4, 0.0), (5, 0.0)], []),
        ([(4, 1.0)], []),
    ],
)
def test_preference_pairs(samples, expected):
    assert pairs(group(*samples)) == expected


def test_the_ratio_is_a_choice_and_equal_answers_count_once():
    assert pairs(group((4, 1.0), (7, 1.0)), longer=2.0) == []
    given = group((4, 1.0), (5, 0.0), (5, 0.0))
    same = given.trajectories[1].token_ids
    twice = Group(problem=given.problem, trajectories=tuple(t if i < 2 else type(t)(**{**{f: getattr(t, f) for f in t.__slots__}, "token_ids": same}) for i, t in enumerate(given.trajectories)))  # fmt: skip
    assert pairs(twice) == [(0, 1)]
