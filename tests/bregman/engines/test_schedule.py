"""The learning rate at the corners of every schedule."""

from __future__ import annotations

import pytest

from bregman.engines.config import ScheduleConfig
from bregman.engines.schedule import learning_rate


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_warm_up_is_linear_and_reaches_the_peak(kind: str) -> None:
    schedule = ScheduleConfig(kind=kind, warmup_steps=4)
    assert [learning_rate(2.0, schedule, step, 20) for step in range(5)] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


@pytest.mark.parametrize(("kind", "middle", "last"), [("constant", 1.0, 1.0), ("linear", 0.6, 0.2), ("cosine", 0.6, 0.2)])
def test_decay_ends_at_the_final_ratio(kind: str, middle: float, last: float) -> None:
    schedule = ScheduleConfig(kind=kind, final_ratio=0.2)
    assert learning_rate(1.0, schedule, 0, 11) == pytest.approx(1.0)
    assert learning_rate(1.0, schedule, 5, 11) == pytest.approx(middle)
    assert learning_rate(1.0, schedule, 10, 11) == pytest.approx(last)
    assert learning_rate(1.0, schedule, 15, 11) == pytest.approx(last)


@pytest.mark.parametrize("total", [1, 2, 3])
def test_stages_shorter_than_their_warm_up(total: int) -> None:
    schedule = ScheduleConfig(warmup_steps=3)
    assert all(0 < learning_rate(1.0, schedule, step, total) <= 1.0 for step in range(total))
