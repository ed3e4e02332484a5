"""The supervised loop on fakes: it learns, normalises over trained tokens, extends until its gate passes, and resumes exactly."""

import copy
import json

import numpy as np
import pytest
import torch
from fakes import BigramLearner, ListTracker

from bregman.errors import DataError, GateError
from bregman.types import Sequence
from sft.config import SFTConfig
from sft.loop import Parts, next_step, train
from sft.stream import plan_stream


def sequence(*tokens: int) -> Sequence:
    return Sequence(token_ids=np.asarray(tokens, dtype=np.int64), loss_mask=np.arange(len(tokens)) >= 2)


SOURCES = [[sequence(1, 2, 3, 3, 0), sequence(1, 2, 3, 0), sequence(1, 3, 4, 5, 3, 0)], [sequence(1, 4, 2, 0), sequence(1, 4, 2, 2, 0)]]


class Listed:
    """`sft.stream.Examples` of a list."""

    def __init__(self, examples, name="listed") -> None:
        self.name, self.examples = name, examples
        self.lengths = np.asarray([len(example.token_ids) for example in examples])

    def __getitem__(self, row: int) -> Sequence:
        return self.examples[row]


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


def planned(settings: SFTConfig, sources=SOURCES):
    return [
        plan_stream(
            phase,
            [Listed(examples) for examples in sources],
            [1.0] * len(sources),
            seed=number,
            on_exhausted=settings.on_exhausted,
            tokens_per_micro_batch=12,
            num_ranks=1,
        )
        for number, phase in enumerate(settings.plan)
    ]


class Run:
    def __init__(self, gate=lambda step: 0.0) -> None:
        self.learner, self.tracker, self.gate, self.saved = BigramLearner(), ListTracker(), gate, {}

    def train(self, settings: SFTConfig, first: int = 0, state=None) -> "Run":
        parts = Parts(learner=self.learner, tracker=self.tracker, save=self._save, gate=self.gate)
        train(planned(settings), parts, gate=settings.gate, first=first, state=state)
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
    (stream,) = planned(config(tokens_per_step=5, epochs=1, steps=None), [[sequence(*range(6), *range(6)), sequence(1, 2, 3)]])
    filler = stream.filler()
    steps = [next_step(stream, filler, 1).minibatch for _ in range(stream.steps)]
    assert sorted(sum(batch.num_tokens for batch in step) for step in steps) == [3, 12]


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


PHASES = {
    "steps": None,
    "max_length": None,
    "schedule": {"kind": "cosine", "final_ratio": 0.1},
    "phases": [
        {"epochs": 8, "max_length": 10},
        {"steps": 3, "max_length": 20, "tokens_per_step": 36, "learning_rate": 0.02, "schedule": {"kind": "linear", "warmup_steps": 1}},
        {"epochs": 5, "max_length": 20},
    ],
}


def drawn_by(run: Run) -> list[list[list[int]]]:
    """Per step, the examples."""
    return [
        [batch.token_ids[start:end].tolist() for batch in step for start, end in zip(batch.boundaries, batch.boundaries[1:], strict=False)]
        for step in run.learner.steps
    ]


class TestPhases:
    def test_each_has_its_own_rate_rows_and_length(self):
        settings = config(**PHASES)
        streams = planned(settings)
        run = Run().train(settings)
        steps = [stream.steps for stream in streams]
        assert len(run.learner.steps) == sum(steps) and steps[1] == 3
        rates = [row["learning_rate"] for _, row in run.tracker.rows]
        assert rates[steps[0] - 1] == pytest.approx(0.005)  # cosine to a tenth
        assert rates[steps[0] : steps[0] + 3] == pytest.approx([0.02, 0.02, 0.002])  # warmed up again
        assert rates[sum(steps[:2])] == pytest.approx(0.05)
        assert [note.split(":")[0] for note in run.tracker.notes] == [f"step {steps[0]}", f"step {sum(steps[:2])}"]

    def test_an_epoch_is_every_example_once(self):
        settings = config(**PHASES)
        (first, *_) = planned(settings)
        drawn = [tuple(example) for step in drawn_by(Run().train(settings))[: first.steps] for example in step]
        expected = [tuple(example.token_ids.tolist()) for source in SOURCES for example in source] * 8
        assert sorted(drawn) == sorted(expected)

    @pytest.mark.parametrize("stop", [1, 4, 7, 8, 9, 11, 12, 13])
    def test_resume_repeats_the_undisturbed_run_exactly(self, stop):
        whole = Run().train(config(**PHASES))
        assert len(whole.learner.steps) > 13
        resumed = Run()
        state, table, optimizer = whole.saved[stop]
        resumed.learner.table.data.copy_(table)
        resumed.learner.optimizer.load_state_dict(optimizer)
        resumed.train(config(**PHASES), first=stop, state=json.loads(json.dumps(state)))
        assert drawn_by(resumed) == drawn_by(whole)[stop:]
        assert torch.equal(whole.learner.table, resumed.learner.table)

    def test_the_gate_comes_after_the_last_and_goes_on_with_new_epochs(self):
        gate = {**TestGate.GATE, "extend_steps": 2}
        answers = iter([0.1, 0.1, 0.9])
        settings = config(**PHASES, gate=gate)
        run = Run(lambda step: next(answers)).train(settings)
        assert len(run.learner.steps) == sum(stream.steps for stream in planned(settings)) + 4

    def test_fill_is_logged(self):
        assert all(0 < row["pack_fill"] <= 1 for _, row in Run().train(config(**PHASES)).tracker.rows)


class TestExhausted:
    def test_stop_ends_when_the_first_source_has_been_drawn_through(self):
        settings = config(steps=100, on_exhausted="stop")
        (stream,) = planned(settings)
        run = Run().train(settings)
        drawn = [tuple(example) for step in drawn_by(run) for example in step]
        assert len(run.learner.steps) == stream.steps < 100
        assert len(set(drawn)) == len(drawn) == stream.limit

    def test_stop_with_enough_rows_changes_nothing(self):
        many = [SOURCES[0] * 100, SOURCES[1] * 100]
        assert planned(config(on_exhausted="stop"), many)[0].steps == 12

    def test_error_names_the_source_before_training(self):
        with pytest.raises(DataError, match=r"listed: its \d rows are used up after \d of 100 steps; .*on_exhausted: repeat"):
            planned(config(steps=100, on_exhausted="error"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 1}, "give either `steps` or `epochs`"),
        ({"steps": None}, "give either `steps` or `epochs`"),
        ({"max_length": None}, "give `max_length`, or `phases`"),
        ({"phases": [{"steps": 1, "max_length": 5}]}, "`steps` and `phases` exclude each other"),
        ({"sources": [{"kind": "jsonl", "path": "x", "passes": 2}]}, r"sources\[0\].passes has no effect .* steps; use `weight`"),
        (
            {"steps": None, "epochs": 1, "sources": [{"kind": "jsonl", "path": "x", "weight": 2}]},
            r"sources\[0\].weight has no effect .* epochs; use `passes`",
        ),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)
