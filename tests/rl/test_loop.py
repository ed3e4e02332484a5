"""The RL loop on fakes: it learns, refuses a broken sync, says when there is nothing to learn, and resumes exactly."""

import copy
from dataclasses import replace

import pytest
import torch
from fakes import BigramEngine, BigramLearner, FunctionScorer, ListTracker, problem

from bregman.errors import ParityError
from bregman.tracking.ledger import SampleLedger
from bregman.types import Fate
from rl.batches import assign_advantages, has_signal, minibatches
from rl.config import RLConfig
from rl.hacking_watch import HackingWatch
from rl.loop import Parts, train
from rl.opmd import opmd_advantages
from samplers.build import build_sampler
from samplers.config import PrioritizedConfig

PROBLEMS = [problem(str(i), difficulty=i / 10) for i in range(10)]


def config(**changes) -> RLConfig:
    settings = {
        "iterations": 6,
        "num_problems": 8,
        "optimizer_steps": 4,
        "problems": {"kind": "python", "path": "unused.py:unused"},
        "rollout": {"num_samples": 8, "max_tokens": 6},
        "rewards": {"functions": [{"function": "unused"}]},
        "algorithm": {"kind": "opmd", "tau": 0.1},
        "optimizer": {"kind": "adamw", "learning_rate": 0.05},
        "sampler": {"kind": "prioritized"},
    }
    return RLConfig.model_validate({**settings, **changes})


def has_three(trajectory) -> float:
    return float(3 in trajectory.token_ids)


class Run:
    """A loop with its fakes, and every state it asked to save."""

    def __init__(self, reward=has_three) -> None:
        self.learner, self.engine, self.tracker, self.ledger = BigramLearner(), BigramEngine(), ListTracker(), SampleLedger()
        self.sampler = build_sampler(PrioritizedConfig(), PROBLEMS, seed=0)
        self.scorer = FunctionScorer(reward)
        self.saved = {}
        self.watch = HackingWatch(config().rewards)

    def train(self, settings: RLConfig, first: int = 0) -> "Run":
        parts = Parts(
            engine=self.engine,
            learner=self.learner,
            sampler=self.sampler,
            scorer=self.scorer,
            tracker=self.tracker,
            save=self._save,
            evaluate=lambda iteration: {"eval/accuracy": float(iteration)} if iteration % 2 == 0 else {},
        )
        train(settings, parts, seed=0, tokens_per_micro_batch=100, first=first, ledger=self.ledger, watch=self.watch)
        return self

    def _save(self, iteration, state):
        self.saved[iteration] = copy.deepcopy((state, self.learner.table.data))


@pytest.mark.parametrize(
    "algorithm", [{"kind": "opmd"}, {"kind": "opmd", "baseline": "logavgexp", "tau": 1.0}, {"kind": "grpo"}, {"kind": "rest"}]
)
def test_reward_rises(algorithm):
    run = Run().train(config(algorithm=algorithm, iterations=12))
    accuracy = [row["accuracy"] for _, row in run.tracker.rows]
    assert accuracy[-1] > accuracy[0] + 0.2


def test_every_rollout_has_a_fate_and_the_ledger_adds_up():
    run = Run(lambda t: None if t.sample_index == 0 else has_three(t)).train(config(iterations=3))
    for (_, row), (_, _, groups) in zip(run.tracker.rows, run.tracker.groups, strict=True):
        fates = [t.fate for g in groups for t in g.trajectories]
        assert len(fates) == 64
        assert fates.count(Fate.REWARD_FAILED) == 8 == row["ledger/reward_failed"]
        assert sum(value for name, value in row.items() if name.startswith("ledger/")) == 64


def test_optimizer_is_reset_each_iteration_unless_told_otherwise():
    assert Run().train(config(iterations=3)).learner.resets == 3
    assert Run().train(config(iterations=3, reset_optimizer=False)).learner.resets == 0


def test_log_ratio_is_zero_at_the_first_step_of_an_iteration():
    run = Run().train(config(iterations=1))
    first = run.learner.steps[0][0]
    fresh = BigramLearner()
    torch.testing.assert_close(fresh.logprobs(first).detach(), first.reference_logprobs, rtol=0, atol=0)


def test_a_broken_sync_stops_the_run_before_any_training():
    run = Run()
    run.engine.corruption = 1.0
    with pytest.raises(ParityError, match=r"iteration 0: learner and rollout engine differ by .* nats .*parity_bound 0.05"):
        run.train(config())
    assert run.learner.steps == []


def test_parity_is_logged_even_without_signal():
    run = Run(lambda t: 0.0).train(config(iterations=2))
    assert run.learner.steps == []
    assert all(row["parity/logprob_diff_max"] < 1e-5 for _, row in run.tracker.rows)
    assert "nothing to learn from: pass rate 0.00" in run.tracker.warnings[0]
    assert "no response is right" in run.tracker.warnings[0]
    torch.testing.assert_close(run.learner.table, BigramLearner().table, rtol=0, atol=0)


def test_a_run_whose_rewards_all_fail_says_so_and_trains_nothing():
    run = Run(lambda t: None).train(config(iterations=2))
    assert run.learner.steps == []
    assert run.tracker.warnings[0] == "iteration 0: 64 responses with a failed reward, the first: reward `right` failed"
    assert "nothing to learn from" in run.tracker.warnings[1] and "every reward failed" in run.tracker.warnings[1]
    assert all(row["ledger/reward_failed"] == 64 for _, row in run.tracker.rows)


def test_some_failed_rewards_are_reported_with_the_first():
    run = Run(lambda t: None if t.sample_index == 0 else has_three(t)).train(config(iterations=1))
    assert run.tracker.warnings == ["iteration 0: 8 responses with a failed reward, the first: reward `right` failed"]


def test_groups_without_signal_are_trained_where_a_kl_penalty_pulls():
    groups = assign_advantages(
        [Run().engine.rollout(PROBLEMS[:1], config().rollout, seed=0)[0]], lambda rewards: [0.0] * 8, drop_truncated=False
    )
    assert {t.fate for t in groups[0].trajectories} == {Fate.REWARD_FAILED}
    scored = [replace(g, trajectories=tuple(replace(t, reward=1.0) for t in g.trajectories)) for g in groups]
    for kept in (False, True):
        (group,) = assign_advantages(scored, lambda rewards: [0.0] * 8, drop_truncated=False, train_without_signal=kept)
        assert {t.fate for t in group.trajectories} == {Fate.TRAINED if kept else Fate.ZERO_VARIANCE}
        assert not has_signal(group)


def test_the_start_policy_is_described():
    run = Run().train(config(iterations=1))
    assert run.tracker.notes[0].startswith("start policy: pass rate 0.")


def test_evaluation_is_logged_with_its_iteration():
    run = Run().train(config(iterations=4))
    assert {step: row.get("eval/accuracy") for step, row in run.tracker.rows} == {0: 0.0, 1: None, 2: 2.0, 3: None}


def test_resume_repeats_the_undisturbed_run_exactly():
    whole = Run().train(config(iterations=6, reset_optimizer=True))
    resumed = Run()
    state, table = whole.saved[3]
    resumed.sampler.load_state_dict(state["sampler"])
    resumed.ledger.load_state_dict(state["ledger"])
    resumed.watch.load_state_dict(state["watch"])
    resumed.learner.table.data.copy_(table)
    resumed.train(config(iterations=6), first=3)
    assert torch.equal(whole.learner.table, resumed.learner.table)
    tokens = [[t.token_ids for g in groups for t in g.trajectories] for _, _, groups in whole.tracker.groups]
    again = [[t.token_ids for g in groups for t in g.trajectories] for _, _, groups in resumed.tracker.groups]
    assert tokens[3:] == again
    assert whole.saved[6][0] == resumed.saved[6][0]


def test_reference_from_the_rollout_engine_is_used_when_asked_for():
    run = Run().train(config(iterations=1, reference="rollout"))
    batch = run.learner.steps[0][0]
    assert batch.reference_logprobs is batch.rollout_logprobs


class TestBatches:
    @pytest.fixture
    def groups(self):
        run = Run()
        run.engine.load_weights(run.learner, 0)
        return run.scorer.score(run.engine.rollout(PROBLEMS[:8], config().rollout, seed=3))

    def _assign(self, groups, drop=False):
        return assign_advantages(groups, lambda rewards: opmd_advantages(rewards, baseline="mean", tau=0.1), drop_truncated=drop)

    def test_truncated_responses_are_dropped_only_when_asked(self, groups):
        cut = [replace(groups[0], trajectories=tuple(replace(t, finish_reason="length") for t in groups[0].trajectories))]
        assert {t.fate for t in self._assign(cut, drop=True)[0].trajectories} == {Fate.TOO_LONG}
        assert Fate.TOO_LONG not in {t.fate for t in self._assign(cut)[0].trajectories}

    def test_lost_responses_are_not_trained_on(self, groups):
        first, second, *rest = groups[0].trajectories
        group = replace(groups[0], trajectories=(replace(first, finish_reason="error"), replace(second, finish_reason="abort"), *rest))
        fates = [t.fate for t in self._assign([group])[0].trajectories]
        assert fates[:2] == [Fate.ENGINE_LOST, Fate.ENGINE_LOST]

    def test_baseline_is_over_usable_responses_only(self, groups):
        group = replace(
            groups[0],
            trajectories=tuple(replace(t, reward=r) for t, r in zip(groups[0].trajectories, [None, 1, 0, 0, 0, 0, 0, 0], strict=True)),
        )
        advantages = [t.advantage for t in self._assign([group])[0].trajectories]
        assert advantages[0] is None
        assert advantages[1] == pytest.approx(6 / 7)
        assert sum(advantages[1:]) == pytest.approx(0.0)

    @pytest.mark.parametrize("steps", [1, 3, 4])
    def test_each_response_is_in_exactly_one_step_and_the_normaliser_is_the_same(self, groups, steps):
        signal = self._assign(groups)
        batches = minibatches(signal, steps=steps, token_budget=50, num_ranks=1, temperature=1.0, seed=0, total_responses=64)
        assert len(batches) == steps
        assert {batch.normalizer for minibatch in batches for batch in minibatch} == {64 / steps}
        trained = sum(int(batch.loss_mask.sum()) for minibatch in batches for batch in minibatch)
        assert trained == sum(len(t.token_ids) for g in signal for t in g.trajectories)

    def test_fewer_groups_than_steps_means_fewer_steps(self, groups):
        batches = minibatches(self._assign(groups)[:2], steps=4, token_budget=50, num_ranks=1, temperature=1.0, seed=0, total_responses=64)
        assert len(batches) == 2
