"""The learner as Ray actors: two ranks give what one gives, checkpoints move between rank counts, failures name the rank."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import learner_cases
import pytest
import ray
import torch
from learner_cases import LENGTHS, OPTIMIZER, broken_loss, make_model, make_moe, minibatch, nan_loss, policy_loss, reference_loss
from transformers import AutoModelForCausalLM

from bregman.engines import cluster
from bregman.engines.config import ClusterConfig, LearnerConfig, MuonConfig
from bregman.engines.learner_workers import LearnerWorkers
from bregman.engines.weight_sync import read_tensors
from bregman.errors import ClusterError, DataError, UserError

RATE = OPTIMIZER.learning_rate
CLUSTER = ClusterConfig(learner_workers=2, step_timeout=60, start_timeout=120)


@pytest.fixture(scope="module")
def learners() -> Iterator[tuple[LearnerWorkers, LearnerWorkers]]:
    """One rank and two ranks, side by side."""
    ray.cloudpickle.register_pickle_by_value(learner_cases)  # the workers' path does not hold the tests
    cluster.start(CLUSTER)
    settings = LearnerConfig()
    made = (LearnerWorkers.start(settings, replace_workers(1)), LearnerWorkers.start(settings, CLUSTER))
    yield made
    for each in made:
        each.close()
    cluster.stop()
    ray.cloudpickle.unregister_pickle_by_value(learner_cases)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def fresh(learners: tuple[LearnerWorkers, LearnerWorkers], model: Path) -> tuple[LearnerWorkers, LearnerWorkers]:
    for each in learners:
        each.begin_stage(model, OPTIMIZER, keep_fixed_reference=True)
    return learners


def replace_workers(count: int) -> ClusterConfig:
    return CLUSTER.model_copy(update={"learner_workers": count})


def weights(learner: LearnerWorkers) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in read_tensors(learner.publish_weights())}


def assert_close(first: LearnerWorkers, second: LearnerWorkers) -> None:
    expected = weights(first)
    for name, tensor in weights(second).items():
        torch.testing.assert_close(tensor, expected[name], atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("lengths", [LENGTHS, [9]])  # a single sequence leaves one rank with a filler
@pytest.mark.parametrize("budget", [1000, 30])
def test_two_ranks_equal_one(fresh: tuple[LearnerWorkers, LearnerWorkers], lengths: list[int], budget: int) -> None:
    one, two = fresh
    assert (one.num_ranks, two.num_ranks) == (1, 2)
    for step in range(3):
        stats = [
            learner.step(minibatch(token_budget=budget, num_ranks=learner.num_ranks, seed=step, lengths=lengths), policy_loss, RATE)
            for learner in fresh
        ]
        assert stats[0].loss == pytest.approx(stats[1].loss, rel=1e-5)
        assert stats[0].grad_norm == pytest.approx(stats[1].grad_norm, rel=1e-5)
        assert dict(stats[0].metrics) == pytest.approx(dict(stats[1].metrics), rel=1e-5)
        assert stats[0].num_tokens == stats[1].num_tokens == sum(lengths)
    assert_close(one, two)


@pytest.mark.parametrize("make", [make_model, make_moe])
def test_two_ranks_equal_one_with_muon(
    learners: tuple[LearnerWorkers, LearnerWorkers], make: Callable[[Path], Path], tmp_path: Path
) -> None:
    model = make(tmp_path / "model")
    optimizer = MuonConfig(learning_rate=RATE, max_grad_norm=0.5, eps=1e-4)
    start = AutoModelForCausalLM.from_pretrained(model).state_dict()
    for learner in learners:
        learner.begin_stage(model, optimizer)
    for step in range(3):
        for learner in learners:
            learner.step(minibatch(token_budget=30, num_ranks=learner.num_ranks, seed=step), policy_loss, RATE)
    expected = weights(learners[0])
    for name, tensor in weights(learners[1]).items():
        if name in start:  # experts have other names on disk
            moved = (expected[name] - start[name]).norm()
            assert float((tensor - expected[name]).norm()) < 2e-3 * float(moved), name
        torch.testing.assert_close(tensor, expected[name], atol=2e-5, rtol=1e-4)


def test_an_iteration_starts_exactly_at_its_reference(fresh: tuple[LearnerWorkers, LearnerWorkers]) -> None:
    two = fresh[1]
    given = [minibatch(token_budget=25, num_ranks=2, seed=step) for step in range(2)]
    filled = two.begin_iteration(given)
    for before, after in zip(given, filled, strict=True):
        assert [torch.equal(b.token_ids, a.token_ids) for b, a in zip(before, after, strict=True)] == [True] * len(before)
        assert all(batch.reference_logprobs.shape == batch.token_ids.shape for batch in after)
    assert two.step(filled[0], reference_loss, RATE).metrics["from_reference"] == 0
    stats = two.step(filled[1], reference_loss, RATE)
    assert stats.metrics["from_reference"] == pytest.approx(stats.metrics["from_fixed"])
    assert stats.metrics["from_reference"] > 0.05


@pytest.mark.parametrize("direction", ["one_to_two", "two_to_one"])
def test_a_checkpoint_loads_at_another_rank_count(
    fresh: tuple[LearnerWorkers, LearnerWorkers], direction: str, model: Path, tmp_path: Path
) -> None:
    source, target = fresh if direction == "one_to_two" else fresh[::-1]
    for step in range(2):
        source.step(minibatch(num_ranks=source.num_ranks, seed=step), policy_loss, RATE)
    source.save_checkpoint(tmp_path)
    target.begin_stage(model, OPTIMIZER)
    target.load_checkpoint(tmp_path)
    for name, tensor in weights(source).items():
        assert torch.equal(tensor, weights(target)[name])
    for learner in fresh:
        learner.step(minibatch(num_ranks=learner.num_ranks, seed=9), policy_loss, RATE)
    assert_close(source, target)  # the moments came along


def test_two_ranks_export_a_whole_model(fresh: tuple[LearnerWorkers, LearnerWorkers], tmp_path: Path) -> None:
    two = fresh[1]
    two.step(minibatch(num_ranks=2), policy_loss, RATE)
    two.export(tmp_path / "exported")
    exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "exported").named_parameters())
    for name, tensor in weights(two).items():
        assert torch.equal(tensor, exported[name])


def test_user_errors_come_through(fresh: tuple[LearnerWorkers, LearnerWorkers], tmp_path: Path) -> None:
    two = fresh[1]
    with pytest.raises(UserError, match="the loss is nan"):
        two.step(minibatch(num_ranks=2), nan_loss, RATE)
    with pytest.raises(DataError, match="no such folder"):
        two.begin_stage(tmp_path / "missing", OPTIMIZER)


def test_bugs_keep_their_traceback(fresh: tuple[LearnerWorkers, LearnerWorkers]) -> None:
    with pytest.raises(ZeroDivisionError, match="a bug in the loss"):
        fresh[1].step(minibatch(num_ranks=2), broken_loss, RATE)


def test_ranks_that_share_a_context_get_the_same_micro_batches() -> None:
    made = LearnerWorkers.__new__(LearnerWorkers)
    made._actors, made._context = [None] * 4, 2
    assert made.num_ranks == 2
    shares = [made._share(["a", "b", "c", "d"], rank) for rank in range(4)]  # type: ignore[list-item]
    assert shares == [["a", "c"], ["a", "c"], ["b", "d"], ["b", "d"]]
    answers: Any = [[[(f"{rank}-{index}", None) for index in range(2)]] for rank in range(4)]
    made._each = lambda *_, **__: answers  # type: ignore[method-assign]
    (filled,) = made.begin_iteration([minibatch(token_budget=25, num_ranks=2)[:4]])
    assert [batch.reference_logprobs for batch in filled] == ["0-0", "2-0", "0-1", "2-1"]
    with pytest.raises(ValueError, match="groups of 2"):
        LearnerWorkers.start(LearnerConfig(context_parallel=2), replace_workers(3))


def test_micro_batches_must_fit_the_ranks(fresh: tuple[LearnerWorkers, LearnerWorkers]) -> None:
    with pytest.raises(ValueError, match="cannot be spread over 2 ranks"):
        fresh[1].step(minibatch(), policy_loss, RATE)


def test_a_silent_rank_is_named(fresh: tuple[LearnerWorkers, LearnerWorkers], monkeypatch: pytest.MonkeyPatch) -> None:
    two = fresh[1]
    monkeypatch.setattr(two, "_config", replace_workers(2).model_copy(update={"step_timeout": 0.01}))
    with pytest.raises(ClusterError, match=r"learner rank 0, 1: step: no answer after 0 s"):
        two.step(minibatch(num_ranks=2), policy_loss, RATE)


def test_a_dead_rank_is_named(learners: tuple[LearnerWorkers, LearnerWorkers], model: Path) -> None:
    """Last: it ends the two-rank learner."""
    two = learners[1]
    two.begin_stage(model, OPTIMIZER)
    batches = [replace(batch, normalizer=1.0) for batch in minibatch(num_ranks=2)]
    two.step(batches, policy_loss, RATE)
    process = ray.get(two._actors[1].__ray_call__.remote(lambda _: os.getpid()))
    os.kill(process, signal.SIGKILL)
    with pytest.raises(ClusterError, match="learner rank 1: step: the worker died"):
        two.step(batches, policy_loss, RATE)
