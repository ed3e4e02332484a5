"""A fake run, recorded through the real tracker: plausible curves without any engine."""

from __future__ import annotations

import io
import math
import random
from pathlib import Path
from typing import Any

from bregman.tracking.console import Console
from bregman.tracking.ledger import SampleLedger
from bregman.tracking.run_folder import RunFolder
from bregman.tracking.tracker import RunTracker
from bregman.types import Evaluation, Fate, Group, Problem, Segment, Trajectory

RECIPE: dict[str, Any] = {
    "name": "tiny thinking <demo>",
    "seed": 0,
    "output_dir": "runs/tiny",
    "cluster": {"address": "local"},
    "stages": [
        {"name": "joint_sft", "kind": "sft", "steps": 300},
        {"name": "after_joint_sft", "kind": "eval"},
        {"name": "long_cot", "kind": "sft", "steps": 200},
        {"name": "after_long_cot", "kind": "eval"},
        {"name": "rl", "kind": "rl", "iterations": 40},
        {"name": "after_rl", "kind": "eval"},
    ],
}


def make_evaluation(accuracy: float, tokens: float) -> Evaluation:
    return Evaluation(
        accuracy=accuracy,
        pass_at_k=min(1.0, accuracy + 0.1),
        mean_tokens=tokens,
        num_problems=256,
        samples_per_problem=1,
        truncated=0.01,
        metrics={"format": 0.99},
    )


def make_trajectory(
    index: int = 0, *, right: bool = True, fate: Fate | None = Fate.TRAINED, text: str = "6+1=7-6=1,9n</think>1"
) -> Trajectory:
    return Trajectory(
        problem_id="p0",
        sample_index=index,
        token_ids=(5, 6, 7),
        logprobs=(-0.5, -0.25, -1.0),
        segments=(Segment(policy_version=3, length=2), Segment(policy_version=4, length=1)),
        finish_reason="stop",
        text=text,
        reward=float(right),
        reward_parts={"answer": float(right), "format": None},
        advantage=0.5,
        fate=fate,
    )


def make_groups(count: int, k: int, rate: float, rng: random.Random) -> list[Group]:
    groups = []
    for number in range(count):
        problem = Problem(
            id=f"p{number}", messages=({"role": "user", "content": "616=9? <b>&"},), prompt_ids=(1, 2), answer="6+1*6", difficulty=0.4
        )
        rights = [rng.random() < rate for _ in range(k)]
        fate = Fate.ZERO_VARIANCE if len(set(rights)) == 1 else Fate.TRAINED
        trajectories = [make_trajectory(index, right=right, fate=fate) for index, right in enumerate(rights)]
        if number == 0:
            trajectories[0] = make_trajectory(0, right=False, fate=Fate.TOO_LONG, text="<script>alert(1)</script>")
        groups.append(Group(problem=problem, trajectories=tuple(trajectories)))
    return groups


def record_sft(tracker: RunTracker, index: int, name: str, steps: int, rng: random.Random) -> None:
    tracker.begin_stage(index, name, "sft", total_steps=steps)
    for step in range(steps):
        loss = 0.25 + 2.2 * math.exp(-step / 40) + rng.gauss(0, 0.05)
        rate = 2e-3 * min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        tracker.log(
            step, {"loss": loss, "grad_norm": 0.6 + rng.random(), "learning_rate": rate, "tokens_per_second": 9000 + rng.gauss(0, 300)}
        )
    tracker.end_stage(steps * 0.31)


def record_rl(tracker: RunTracker, index: int, iterations: int, stop: int, rng: random.Random) -> None:
    tracker.begin_stage(index, "rl", "rl", total_steps=iterations)
    ledger = SampleLedger()
    for step in range(stop):
        rate = 0.97 - 0.65 * math.exp(-step / 6) + rng.gauss(0, 0.01)
        tokens = 60 - 33 * math.exp(-step / 12) + rng.gauss(0, 1)
        groups = make_groups(24, 8, rate, rng)
        tracker.rollouts(step, groups)
        metrics = {
            "reward/mean": rate,
            "reward/answer": rate,
            "accuracy": rate,
            "response_tokens/mean": tokens,
            "response_tokens/max": min(128.0, tokens * 2.1),
            "groups_with_signal": 1 - rate**8,
            "truncated": 0.01 * rng.random(),
            "loss": -0.02 * rng.random(),
            "grad_norm": 0.4 + 0.3 * rng.random(),
            "policy/log_ratio_abs": 0.2 + 0.1 * rng.random(),
            "policy/kl": 0.02 + 0.01 * rng.random(),
            "parity/logprob_diff_max": 10 ** rng.uniform(-6, -5.2),
            "parity/logprob_diff_mean": 10 ** rng.uniform(-7.3, -7),
            "rollout_tokens_per_second": 11000 + rng.gauss(0, 500),
            "time/rollout": 0.7 + 0.1 * rng.random(),
            "time/reward": 0.1,
            "time/train": 0.5 + 0.1 * rng.random(),
            "time/weight_sync": 0.03,
            "sampler/mean_success": rate,
        }
        if step % 5 == 0:
            metrics |= {"eval/accuracy": rate - 0.02, "eval/pass_at_k": rate + 0.02, "eval/mean_tokens": tokens + 1}
        tracker.log(step, metrics | ledger.record(groups, expected=24 * 8))
    if stop == iterations:
        tracker.end_stage(iterations * 1.4)


def record_run(path: Path, *, iterations_done: int = 40) -> Path:
    """Record a whole run, or one that stopped within RL; no `iterations_done` at all stops it before RL."""
    rng = random.Random(0)
    folder = RunFolder.open(path, RECIPE)
    tracker = RunTracker(folder, num_stages=6, console=Console(6, stream=io.StringIO()))
    record_sft(tracker, 0, "joint_sft", 300, rng)
    evaluations = {1: ("after_joint_sft", 0.19, 12.0), 3: ("after_long_cot", 0.32, 27.0), 5: ("after_rl", 0.97, 60.5)}

    def record_evaluation(index: int) -> None:
        name, accuracy, tokens = evaluations[index]
        tracker.begin_stage(index, name, "eval", total_steps=1)
        tracker.rollouts(0, make_groups(8, 1, accuracy, rng), split="eval")
        tracker.log(0, {"eval/accuracy": accuracy, "eval/mean_tokens": tokens})
        tracker.end_stage(2.5, make_evaluation(accuracy, tokens))

    record_evaluation(1)
    record_sft(tracker, 2, "long_cot", 200, rng)
    record_evaluation(3)
    tracker.warn("start policy: pass rate 0.32, 91% of the groups have any signal")
    if iterations_done:
        record_rl(tracker, 4, 40, iterations_done, rng)
    if iterations_done == 40:
        record_evaluation(5)
    tracker.close()
    folder.close()
    return path
