"""Rows are full on long-tailed lengths, nobody waits for long, and a filler goes on exactly where another stopped."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest

from bregman.data.mixture import Mixture
from bregman.data.rows import LOOK_AHEAD, RowFiller, best_subset

SHAPES = {  # (median, sigma of the logarithm, longest, capacity)
    "short": (60, 0.6, 500, 2048),
    "chat": (400, 1.0, 8192, 8192),
    "long tail at 32K": (1500, 1.6, 32_768, 32_768),
    "few per row": (9000, 1.0, 32_768, 32_768),
    "long tail at 128K": (4000, 1.8, 131_072, 131_072),
}


def lengths_of(shape: str, count: int, seed: int = 0) -> tuple[np.ndarray, int]:
    median, sigma, longest, capacity = SHAPES[shape]
    drawn = np.random.default_rng(seed).lognormal(np.log(median), sigma, count).astype(int)
    return np.clip(drawn, 8, longest), capacity


def filler_of(lengths, **options) -> RowFiller:
    mixture = Mixture([len(lengths)], [1.0], 0, epochs=True)
    return RowFiller(mixture.draws, lambda draw: int(lengths[draw.row]), **options)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_full_on_long_tailed_lengths(shape):
    lengths, capacity = lengths_of(shape, 6000)
    filler = filler_of(lengths)
    rows = [row for _ in range(20) for row in filler.step(capacity, 4)]
    fills = np.asarray([lengths[[draw.row for draw in row]].sum() for row in rows]) / capacity
    assert len(rows) == 80 and fills.max() <= 1
    assert fills.mean() >= 0.995 and np.quantile(fills, 0.05) >= 0.99


@pytest.mark.parametrize("shape", SHAPES)
def test_an_epoch_takes_every_example_once_and_none_waits_long(shape):
    lengths, capacity = lengths_of(shape, 1000)
    filler = filler_of(lengths, limit=1000)
    taken, order = [], []
    while step := filler.step(capacity, 3):
        for row in step:
            order += [draw.number for draw in row]
            taken.append(len(order))
    assert sorted(order) == list(range(1000))
    assert filler.step(capacity, 3) == []
    # when example n is taken, at most the look-ahead of others behind it have gone before
    assert all(sum(other > number for other in order[:place]) <= LOOK_AHEAD * 8 for place, number in enumerate(order))
    rows = np.searchsorted(taken, np.argsort(order), side="right")  # the row each example is in, by draw
    assert (np.maximum.accumulate(rows) - rows).max() <= LOOK_AHEAD


@pytest.mark.parametrize("stop", [1, 7, 30])
def test_goes_on_where_another_stopped(stop):
    lengths, capacity = lengths_of("chat", 500)
    whole, first = filler_of(lengths), filler_of(lengths)
    steps = [whole.step(capacity, 2) for _ in range(stop + 20)]
    for _ in range(stop):
        first.step(capacity, 2)
    state = json.loads(json.dumps(first.state_dict()))
    assert len(state["waiting"]) <= LOOK_AHEAD
    second = filler_of(lengths, state=state)
    assert [second.step(capacity, 2) for _ in range(20)] == steps[stop:]


def test_order_stays_close_to_the_draws():
    lengths, capacity = lengths_of("chat", 3000)
    filler = filler_of(lengths)
    order = [draw.number for _ in range(50) for row in filler.step(capacity, 1) for draw in row]
    moved = np.abs(np.asarray(order) - np.arange(len(order)))
    assert np.median(moved) < LOOK_AHEAD


def test_longer_than_the_capacity_gets_its_own_row():
    filler = filler_of(np.asarray([5, 50, 5, 50]), limit=4)
    rows = filler.step(20, 10)
    assert sorted(sorted(draw.row for draw in row) for row in rows) == [[0, 2], [1], [3]]


def test_best_subset_is_the_best():
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths, room = rng.integers(1, 40, 9).tolist(), int(rng.integers(1, 120))
        best = max(
            (total for size in range(10) for some in combinations(lengths, size) if (total := sum(some)) <= room),
        )
        assert sum(lengths[index] for index in best_subset(lengths, room)) == best


def test_best_subset_prefers_the_oldest():
    assert best_subset([4, 4, 4, 8], 8) == {0, 1}
