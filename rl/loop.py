"""The RL loop: rollouts, rewards, advantages, a few optimizer steps, again. One screen, in the paper's order (k1.5 sec. 2.3).

Owns the order of things. Consumes problems, waits for the engine, the rewards and the learner, produces trained weights in
the learner; what each step means lives in the file it is imported from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bregman.protocols import Learner, MiniBatch, ProblemSampler, RewardScorer, RolloutEngine, Tracker
from bregman.tracking.ledger import SampleLedger
from bregman.tracking.timing import PhaseTimer
from evals.evaluate import warn_about_failures
from rewards.length_reward import add_length_reward
from rl.algorithms import build_algorithm
from rl.batches import assign_advantages, is_trained, minibatches
from rl.config import RLConfig
from rl.hacking_watch import HackingWatch
from rl.metrics import group_metrics, step_metrics, warn_without_signal
from rl.parity import logprob_difference, require_parity


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the loop drives. `save(iteration, state)` writes a checkpoint from which `iteration` is next; `evaluate` scores the
    weights that the engine holds on held-out problems."""

    engine: RolloutEngine
    learner: Learner
    sampler: ProblemSampler
    scorer: RewardScorer
    tracker: Tracker
    save: Callable[[int, Mapping[str, Any]], None]
    evaluate: Callable[[int], Mapping[str, float]]


def train(
    config: RLConfig,
    parts: Parts,
    *,
    seed: int,
    tokens_per_micro_batch: int,
    first: int = 0,
    ledger: SampleLedger,
    watch: HackingWatch,
) -> None:
    """Run iterations `first .. config.iterations - 1`. The learner starts with the policy to train, and ends with the trained one.

    Args:
        ledger, watch: as the iterations before `first` left them.

    Raises:
        ParityError: engine and learner disagree after a weight sync.
    """
    engine, learner, tracker = parts.engine, parts.learner, parts.tracker
    loss, advantages = build_algorithm(config.algorithm, config.kl_coefficient)
    for iteration in range(first, config.iterations):
        timer = PhaseTimer(tracker)
        with timer("weight_sync"):
            engine.load_weights(learner, version=iteration)  # pi_i: sampler and reference at once
        with timer("evaluation"):
            evaluation = parts.evaluate(iteration)
        with timer("rollout"):
            problems = parts.sampler.next_problems(config.num_problems, iteration)
            groups = engine.rollout(problems, config.rollout, seed=iteration_seed(seed, iteration))
        with timer("reward"):
            groups = parts.scorer.score(groups)
            warn_about_failures(groups, f"iteration {iteration}", tracker.warn)
            parts.sampler.observe(groups)
            groups = add_length_reward(groups, config.length_reward, iteration)
        groups = assign_advantages(
            groups, advantages, drop_truncated=config.truncated == "drop", train_without_signal=config.kl_coefficient > 0
        )
        trained = [group for group in groups if is_trained(group)]
        with timer("reference"):
            batches = learner.begin_iteration(
                minibatches(
                    trained or groups[:1],  # where nothing is trained one group still serves the parity probe
                    steps=config.optimizer_steps,
                    token_budget=tokens_per_micro_batch,
                    num_ranks=learner.num_ranks,
                    temperature=config.rollout.temperature,
                    seed=iteration_seed(seed, iteration),
                    total_responses=config.num_problems * config.rollout.num_samples,
                ),
                reset_optimizer=config.reset_optimizer,
            )
        parity = logprob_difference(batches)
        require_parity(parity["parity/logprob_diff_max"], config.parity_bound, iteration)
        with timer("train"):
            batches = _reference_from_rollout(batches) if config.reference == "rollout" else batches
            steps = [learner.step(batch, loss, config.optimizer.learning_rate) for batch in batches] if trained else []
        tracker.rollouts(iteration, groups)
        counts = ledger.record(groups, expected=config.num_problems * config.rollout.num_samples)
        watched = watch.observe(groups, iteration, tracker.warn)
        measured = {**group_metrics(groups), **step_metrics(steps), **watched, **parity, **evaluation, **counts}
        tracker.log(iteration, {**measured, **timer.metrics(groups)})
        warn_without_signal(groups, iteration, tracker)
        parts.save(iteration + 1, {"sampler": parts.sampler.state_dict(), "ledger": ledger.state_dict(), "watch": watch.state_dict()})


def iteration_seed(seed: int, iteration: int) -> int:
    """A seed in [0, 2^31) of its own for each iteration, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"iteration {seed} {iteration}".encode()).digest()[:4], "big") >> 1


def _reference_from_rollout(batches: list[MiniBatch]) -> list[MiniBatch]:
    """`reference: rollout`: the engine's log-probabilities stand in for pi_i's. A different algorithm where the two differ."""
    return [[replace(batch, reference_logprobs=batch.rollout_logprobs) for batch in minibatch] for minibatch in batches]
