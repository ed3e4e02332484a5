"""Engine, learner, rewards and tracker small enough to drive the loops in a unit test: a bigram policy, sampled and trained for real."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bregman.types import Group, PackedBatch, Problem, Segment, StepStats, Trajectory

END = 0
VOCABULARY = 6


def problem(name: str, difficulty: float | None = None) -> Problem:
    return Problem(id=name, messages=({"role": "user", "content": name},), prompt_ids=(1, 2), difficulty=difficulty)


class BigramLearner:
    """Implements `protocols.Learner` with one logit table [VOCABULARY, VOCABULARY] and plain AdamW."""

    num_ranks = 1

    def __init__(self, seed: int = 0) -> None:
        self.table = torch.nn.Parameter(0.1 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed)))
        self.optimizer = torch.optim.AdamW([self.table], lr=0.0, weight_decay=0.0)
        self.steps: list[Sequence[PackedBatch]] = []
        self.resets = 0

    def begin_stage(self, model: Path, optimizer: Any, *, training: Any = None, keep_fixed_reference: bool = False) -> None:
        self.fixed = self.table.detach().clone()

    def logprobs(self, batch: PackedBatch, table: torch.Tensor | None = None) -> torch.Tensor:
        table = self.table if table is None else table
        logits = table[batch.token_ids.roll(1)] / batch.temperature
        values = torch.log_softmax(logits, -1).gather(-1, batch.token_ids[:, None])[:, 0]
        return torch.where(batch.position_ids == 0, 0.0, values)

    def begin_iteration(self, minibatches, *, reset_optimizer: bool = True):
        if reset_optimizer:
            self.resets += 1
            self.optimizer = torch.optim.AdamW([self.table], lr=0.0, weight_decay=0.0)
        with torch.no_grad():
            return [[replace(batch, reference_logprobs=self.logprobs(batch)) for batch in minibatch] for minibatch in minibatches]

    def step(self, minibatch: Sequence[PackedBatch], loss, learning_rate: float) -> StepStats:
        self.steps.append(minibatch)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.zero_grad()
        total, metrics = 0.0, {}
        for batch in minibatch:
            value, parts = loss(self.logprobs(batch), batch)
            value.backward()
            total += value.item()
            metrics = {name: metrics.get(name, 0.0) + part.item() for name, part in parts.items()}
        self.optimizer.step()
        tokens = sum(batch.num_tokens for batch in minibatch)
        return StepStats(
            loss=total,
            grad_norm=self.table.grad.norm().item(),
            learning_rate=learning_rate,
            num_tokens=tokens,
            seconds=1e-3,
            metrics=metrics,
        )


class BigramEngine:
    """Implements `protocols.RolloutEngine` by sampling from the learner's table."""

    def __init__(self, max_tokens: int = 8) -> None:
        self.table, self.version = torch.zeros(VOCABULARY, VOCABULARY), -1
        self.corruption = 0.0
        self.finish: str | None = None

    def load_weights(self, source: BigramLearner, version: int) -> Mapping[str, float]:
        self.table, self.version = source.table.detach().clone() + self.corruption * torch.eye(VOCABULARY), version
        return {}

    def rollout(self, problems: Sequence[Problem], sampling, *, seed: int) -> list[Group]:
        generator = torch.Generator().manual_seed(seed)
        return [
            Group(problem=p, trajectories=tuple(self._sample(p, index, sampling, generator) for index in range(sampling.num_samples)))
            for p in problems
        ]

    def _sample(self, p: Problem, index: int, sampling, generator) -> Trajectory:
        tokens: list[int] = []
        logprobs: list[float] = []
        last = p.prompt_ids[-1]
        while len(tokens) < sampling.max_tokens and (not tokens or tokens[-1] != END):
            values = torch.log_softmax(self.table[last] / sampling.temperature, -1)
            last = int(torch.multinomial(values.exp(), 1, generator=generator))
            tokens.append(last)
            logprobs.append(values[last].item())
        return Trajectory(
            problem_id=p.id,
            sample_index=index,
            token_ids=tuple(tokens),
            logprobs=tuple(logprobs),
            segments=(Segment(policy_version=self.version, length=len(tokens)),),
            finish_reason=self.finish or ("stop" if tokens[-1] == END else "length"),
            text=" ".join(map(str, tokens)),
        )


class FunctionScorer:
    """Implements `protocols.RewardScorer` with a function of the trajectory, in this process."""

    def __init__(self, function) -> None:
        self.function = function

    def score(self, groups: Sequence[Group]) -> list[Group]:
        return [replace(g, trajectories=tuple(self._one(t) for t in g.trajectories)) for g in groups]

    def _one(self, trajectory: Trajectory) -> Trajectory:
        value = self.function(trajectory)
        error = "" if value is not None else "reward `right` failed"
        return replace(trajectory, reward=value, reward_parts={"right": value}, reward_error=error)


class ListTracker:
    """Implements `protocols.Tracker` by keeping everything in lists."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.groups: list[tuple[int, str, list[Group]]] = []
        self.warnings: list[str] = []
        self.notes: list[str] = []
        self.waits: list[tuple[float, str]] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.rows.append((step, dict(metrics)))

    def rollouts(self, step: int, groups: Sequence[Group], *, split: str = "train") -> None:
        self.groups.append((step, split, list(groups)))

    def plan(self, total_steps: int) -> None:
        self.planned = total_steps

    def waiting_for(self, what: str) -> None:
        self.waits.append((time.monotonic(), what))

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
