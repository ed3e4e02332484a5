"""The mixture repeats, starts anywhere, visits everything once per pass and keeps its weights or passes."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from bregman.data.mixture import Mixture

SIZES = [7, 100, 1]


def draw(seed=0, count=10_000, start=0, weights=(1, 3, 0.5), epochs=False):
    return list(islice(Mixture(SIZES, weights, seed, epochs=epochs).draws(start), count))


def test_same_seed_same_stream():
    assert draw() == draw()
    assert draw() != draw(seed=1)


@pytest.mark.parametrize("start", [0, 1, 500, 4095, 4096, 4097, 9000])
@pytest.mark.parametrize("epochs", [False, True])
def test_starts_anywhere(start, epochs):
    weights = (1, 3, 1) if epochs else (1, 3, 0.5)
    assert draw(start=start, count=1000, epochs=epochs, weights=weights) == draw(count=start + 1000, epochs=epochs, weights=weights)[start:]
    assert draw(start=start, count=1, epochs=epochs)[0].number == start


def test_weights():
    counts = Counter(drawn.source for drawn in draw(count=20_000))
    assert counts[0] / 20_000 == pytest.approx(1 / 4.5, abs=0.015)
    assert counts[1] / 20_000 == pytest.approx(3 / 4.5, abs=0.015)


@pytest.mark.parametrize("epochs", [False, True])
@pytest.mark.parametrize(("source", "length"), list(enumerate(SIZES)))
def test_each_pass_visits_every_row_once_in_a_new_order(source, length, epochs):
    drawn = [drawn.row for drawn in draw(epochs=epochs) if drawn.source == source]
    passes = [tuple(drawn[first : first + length]) for first in range(0, len(drawn) - length + 1, length)]
    assert all(len(set(order)) == length for order in passes)
    assert length == 1 or len(set(passes)) > 0.9 * len(passes[:50])
    assert length == 1 or passes[0] != passes[1]


def test_epochs_hold_each_source_exactly_as_often_as_it_has_passes():
    mixture = Mixture([7, 10_000, 5], [2, 1, 0.5], 0, epochs=True)
    assert (mixture.draws_in(1), mixture.draws_in(2)) == (14 + 10_000 + 2, 28 + 20_000 + 5)
    drawn = list(islice(mixture.draws(), mixture.draws_in(2)))
    first = Counter((one.source, one.row) for one in drawn[: mixture.draws_in(1)])
    assert all(first[0, row] == 2 for row in range(7)) and all(first[1, row] == 1 for row in range(10_000))
    assert sorted(one.row for one in drawn if one.source == 2) == [0, 1, 2, 3, 4]
    # mixed throughout, not one source after the other
    assert max(one.number for one in drawn[: mixture.draws_in(1)] if one.source == 0) > 5000


def test_where_it_runs_dry():
    mixture = Mixture([400, 6000], [1, 3], 0)
    draws, source = mixture.draws_until_dry()
    before = list(islice(mixture.draws(), draws + 1))
    assert source == before[-1].source == 0
    assert Counter(one.source for one in before)[0] == 401


def test_refuses_what_it_cannot_mix():
    for sizes, weights in [([], []), ([1], [1, 2]), ([1, 0], [1, 1]), ([1], [0])]:
        with pytest.raises(ValueError, match="non-empty sources"):
            Mixture(sizes, weights, 0)
