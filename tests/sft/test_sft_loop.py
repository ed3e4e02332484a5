"""The supervised loop on fakes: it learns, normalises over trained tokens, extends until its gate passes, and resumes exactly."""

import copy
from itertools import islice

import numpy as np
import pytest
import torch
from fakes import BigramLearner, ListTracker

from bregman.data.mixture import Mixture
from bregman.errors import GateError
from bregman.types import Sequence
from sft.config import SFTConfig
from sft.loop import Draw, Parts, next_minibatch, train


def sequence(*tokens: int) -> Sequence:
    return Sequence(token_ids=np.asarray(tokens, dtype=np.int64), loss_mask=np.arange(len(tokens)) >= 2)


SOURCES = [[sequence(1, 2, 3, 3, 0), sequence(1, 2, 3, 0), sequence(1, 3, 4, 5, 3, 0)], [sequence(1, 4, 2, 0), sequence(1, 4, 2, 2, 0)]]
EVALUATION = {
    "problems": {"kind": "python", "path": "unused.py:unused"},
    "sampling": {"max_tokens": 4},
    "rewards": {"functions": [{"function": "unused"}]},
}


def config(**changes) -> SFTConfig:
    settings = {
        "steps": 12,
        "tokens_per_step": 30,
        "max_length": 10,
        "sources": [{"kind": "python", "path": "unused.py:unused"}],
        "optimizer": {"kind": "adamw", "learning_rate": 0.05},
        "schedule": {"kind": "linear", "warmup_steps": 2, "final_ratio": 0.1},
    }
    return SFTConfig.model_validate({**settings, **changes})


class Run:
    def __init__(self, gate=lambda step: 0.0) -> None:
        self.learner, self.tracker, self.gate, self.saved = BigramLearner(), ListTracker(), gate, {}

    def train(self, settings: SFTConfig, first: int = 0, state=None) -> "Run":
        mixture = Mixture(SOURCES, [1.0, 1.0], seed=0)
        parts = Parts(learner=self.learner, tracker=self.tracker, examples=mixture.examples, save=self._save, gate=self.gate)
        train(settings, parts, tokens_per_micro_batch=12, first=first, state=state)
        return self

    def _save(self, step, state):
        self.saved[step] = (dict(state), copy.deepcopy(self.learner.table.data), copy.deepcopy(self.learner.optimizer.state_dict()))


def test_loss_falls():
    run = Run().train(config(steps=40))
    losses = [row["loss"] for _, row in run.tracker.rows]
    assert losses[-1] < losses[0] - 0.3


def test_steps_hold_whole_examples_within_the_budget_and_are_normalised_by_trained_tokens():
    run = Run().train(config())
    for minibatch in run.learner.steps:
        assert sum(batch.num_tokens for batch in minibatch) <= 30
        trained = sum(int(batch.loss_mask.sum()) for batch in minibatch)
        assert {batch.normalizer for batch in minibatch} == {float(trained)}


def test_a_longer_example_than_the_budget_still_gets_its_step():
    long = sequence(*range(6), *range(6))
    draw = Draw(iter([long, sequence(1, 2, 3), sequence(1, 2, 3)]), 0)
    assert sum(batch.num_tokens for batch in next_minibatch(draw, 5, 5, 1)) == 12
    assert draw.count == 1


def test_learning_rate_warms_up_and_decays():
    rates = [row["learning_rate"] for _, row in Run().train(config()).tracker.rows]
    assert rates[0] == pytest.approx(0.025)
    assert max(rates) == pytest.approx(0.05)
    assert rates[-1] == pytest.approx(0.005)


class TestGate:
    GATE = {"metric": "accuracy", "at_least": 0.5, "extend_steps": 4, "max_extensions": 2, "evaluation": EVALUATION}

    def test_passing_at_once_ends_the_stage(self):
        run = Run(lambda step: 0.6).train(config(gate=self.GATE))
        assert len(run.learner.steps) == 12
        assert "passed" in run.tracker.notes[0]

    def test_training_goes_on_until_it_passes(self):
        run = Run(lambda step: step / 32).train(config(gate=self.GATE))
        assert len(run.learner.steps) == 16
        assert run.tracker.warnings == ["step 12: gate `accuracy` is 0.375, wanted at least 0.5; training 4 more steps"]
        rates = [row["learning_rate"] for _, row in run.tracker.rows]
        assert rates[12:] == pytest.approx([0.025, 0.05, 0.05, 0.005])

    def test_never_passing_ends_with_a_clear_error(self):
        with pytest.raises(GateError, match=r"gate: after 20 steps gate `accuracy` is 0.100, wanted at least 0.5; train longer"):
            Run(lambda step: 0.1).train(config(gate=self.GATE))

    def test_at_most(self):
        gate = {**self.GATE, "at_least": None, "at_most": 0.2}
        assert len(Run(lambda step: 0.1).train(config(gate=gate)).learner.steps) == 12


@pytest.mark.parametrize("stop", [1, 5, 14])
def test_resume_repeats_the_undisturbed_run_exactly(stop):
    gate = {**TestGate.GATE}
    whole = Run(lambda step: step / 32).train(config(gate=gate))
    resumed = Run(lambda step: step / 32)
    state, table, optimizer = whole.saved[stop]
    resumed.learner.table.data.copy_(table)
    resumed.learner.optimizer.load_state_dict(optimizer)
    resumed.train(config(gate=gate), first=stop, state=state)
    assert torch.equal(whole.learner.table, resumed.learner.table)


def test_draw_counts_what_was_taken_not_what_was_seen():
    draw = Draw(iter(islice(SOURCES[0], 3)), 7)
    draw.peek()
    assert draw.count == 7
    draw.take()
    draw.peek()
    assert draw.count == 8
