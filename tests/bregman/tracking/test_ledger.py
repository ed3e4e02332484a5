"""Every response in exactly one bin, and the bins add up."""

from __future__ import annotations

import json
import random

import pytest
from fake_run import make_groups, make_trajectory

from bregman.tracking.ledger import SampleLedger
from bregman.types import Fate, Group, Problem

PROBLEM = Problem(id="p0", messages=(), prompt_ids=())


def group(*fates: Fate | None) -> Group:
    return Group(problem=PROBLEM, trajectories=tuple(make_trajectory(index, fate=fate) for index, fate in enumerate(fates)))


def test_counts_every_fate_and_keeps_totals() -> None:
    ledger = SampleLedger()
    metrics = ledger.record([group(*Fate), group(Fate.TRAINED)], expected=8)
    assert metrics == {f"ledger/{fate}": 2.0 if fate == Fate.TRAINED else 1.0 for fate in Fate}
    ledger.record([group(Fate.TRAINED, Fate.STALE)], expected=1)  # one was carried over as unfinished
    assert (ledger.totals[Fate.TRAINED], ledger.totals[Fate.STALE], ledger.totals.total()) == (3, 2, 10)


@pytest.mark.parametrize(
    ("groups", "expected", "message"),
    [
        ([group(Fate.TRAINED, None)], 2, r"1 responses have no fate, the first is p0\[1\]"),
        ([group(Fate.TRAINED)], 2, r"2 were asked for and 0 carried over, but 1 came back \(1 trained\)"),
        ([group(Fate.TRAINED, Fate.STALE)], 1, "but 2 came back"),
        ([], 1, "but 0 came back"),
    ],
)
def test_a_ledger_that_does_not_add_up_is_a_bug(groups: list[Group], expected: int, message: str) -> None:
    ledger = SampleLedger()
    with pytest.raises(RuntimeError, match=message):
        ledger.record(groups, expected=expected)
    assert ledger.totals.total() == 0


def test_unfinished_responses_are_expected_back() -> None:
    ledger = SampleLedger()
    ledger.record([group(Fate.UNFINISHED, Fate.TRAINED)], expected=2)
    assert ledger.carried == 1
    with pytest.raises(RuntimeError, match="1 carried over"):
        ledger.record([group(Fate.TRAINED, Fate.TRAINED)], expected=2)
    ledger.record([group(Fate.TRAINED, Fate.TRAINED, Fate.TRAINED)], expected=2)
    assert ledger.carried == 0


def test_state_survives_a_checkpoint_as_json() -> None:
    ledger, resumed = SampleLedger(), SampleLedger()
    ledger.record([*make_groups(3, 4, 0.5, random.Random(1)), group(Fate.UNFINISHED)], expected=13)
    resumed.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert (resumed.totals, resumed.carried) == (ledger.totals, 1)
    assert all(isinstance(fate, Fate) for fate in resumed.totals)
