"""The mixture repeats, starts anywhere, visits everything once per pass and keeps its weights."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from bregman.data.mixture import Mixture

SOURCES = [[f"a{index}" for index in range(7)], [f"b{index}" for index in range(100)], ["c0"]]


def draw(seed=0, count=10_000, start=0, weights=(1, 3, 0.5)):
    return list(islice(Mixture(SOURCES, weights, seed).examples(start), count))


def test_same_seed_same_stream():
    assert draw() == draw()
    assert draw() != draw(seed=1)


@pytest.mark.parametrize("start", [0, 1, 500, 4095, 4096, 4097, 9000])
def test_starts_anywhere(start):
    assert draw(start=start, count=1000) == draw(count=start + 1000)[start:]


def test_weights():
    counts = Counter(example[0] for example in draw(count=20_000))
    assert counts["a"] / 20_000 == pytest.approx(1 / 4.5, abs=0.015)
    assert counts["b"] / 20_000 == pytest.approx(3 / 4.5, abs=0.015)


@pytest.mark.parametrize(("letter", "length"), [("a", 7), ("b", 100), ("c", 1)])
def test_each_pass_visits_every_example_once_in_a_new_order(letter, length):
    drawn = [example for example in draw() if example[0] == letter]
    passes = [tuple(drawn[first : first + length]) for first in range(0, len(drawn) - length + 1, length)]
    assert all(len(set(order)) == length for order in passes)
    assert length == 1 or len(set(passes)) > 0.9 * len(passes[:50])
    assert length == 1 or passes[0] != passes[1]


def test_refuses_what_it_cannot_mix():
    for sources, weights in [([], []), ([[1]], [1, 2]), ([[1], []], [1, 1]), ([[1]], [0])]:
        with pytest.raises(ValueError, match="non-empty sources"):
            Mixture(sources, weights, 0)
