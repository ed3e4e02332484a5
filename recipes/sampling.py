"""Sampling and scoring a problem set chunk by chunk, so that a killed stage goes on at the next chunk and makes the same data.

Owns chunks, their seeds, their files and their progress. What is asked, how it is judged and what becomes of it is the stage's.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from bregman.engines.config import SamplingConfig
from bregman.errors import DataError
from bregman.protocols import RewardScorer, RolloutEngine, Tracker
from bregman.tracking.rollouts import prompt_text, read_rollouts, write_rollouts
from bregman.types import Group, Problem, Segment, Trajectory

Ask = Callable[[Problem], Problem]
"""A problem as it is put to the model: the same id, other messages and prompt (`bregman.data.templates.asked_with`)."""

_PART = re.compile(r"\d{6}_(?P<name>.+)\.parquet")


def as_it_is(problem: Problem) -> Problem:
    return problem


class ChunkedSampling:
    """Draws of one stage, one after the other, in chunks whose results lie in `folder`.

    Chunks are counted through all draws of the stage; a chunk is a step of the tracker. Weights are loaded when the first chunk
    that is not on disk is due.

    Args:
        engine: gives the engine, its weights loaded; called once, if at all.
        folder: of the parts; one file per finished chunk, which appears at once.
        seed: of the stage; every chunk derives its own.

    Attributes:
        step: chunks sampled or read so far; after the last draw the step at which the stage logs what came of it.
    """

    def __init__(self, engine: Callable[[], RolloutEngine], tracker: Tracker, folder: Path, seed: int) -> None:
        self._make_engine, self._tracker, self._folder, self._seed = engine, tracker, folder, seed
        self._engine: RolloutEngine | None = None
        self.step = 0

    def draw(
        self,
        name: str,
        problems: Sequence[Problem],
        sampling: SamplingConfig,
        scorer: RewardScorer,
        *,
        chunk: int,
        ask: Sequence[Ask] = (as_it_is,),
        prefills: Sequence[str] = ("",),
        later_chunks: int = 0,
    ) -> Iterator[list[Group]]:
        """Scored groups of `problems`, chunk after chunk, in order. Each must be taken before the next draw begins.

        A group has `len(ask) * sampling.num_samples` trajectories, those of the first way of asking first; its problem is the one
        given, not the one asked, so that rewards and readers see the plain question.

        Args:
            name: of the draw, unique within the stage: names its files and its metrics.
            chunk: problems in a chunk.
            ask: ways of asking each problem.
            prefills: with which text each way begins the response; put before what was sampled.
            later_chunks: chunks that later draws of the stage will take at most, for the progress bar.

        Raises:
            DataError: a part on disk is of other problems.
        """
        chunks = [problems[start : start + chunk] for start in range(0, len(problems), chunk)]
        self._tracker.plan(self.step + len(chunks) + later_chunks + 1)  # the last is the stage's verdict on what was sampled
        for number, own in enumerate(chunks):
            part = self._folder / f"{self.step:06d}_{name}.parquet"
            if part.exists():
                groups = _read_part(part, own, len(ask) * sampling.num_samples)
            else:
                groups = self._sample(name, number, own, sampling, scorer, ask, prefills)
                # images stay with the data
                write_rollouts(part, self.step, [replace(group, problem=replace(group.problem, images=())) for group in groups])
            self.step += 1
            yield groups

    def _sample(
        self,
        name: str,
        number: int,
        problems: Sequence[Problem],
        sampling: SamplingConfig,
        scorer: RewardScorer,
        ask: Sequence[Ask],
        prefills: Sequence[str],
    ) -> list[Group]:
        if self._engine is None:
            self._engine = self._make_engine()
        started = time.monotonic()
        self._tracker.waiting_for(f"samples of {len(problems)} problems ({name})")
        asked = [way(problem) for problem in problems for way in ask]
        drawn = self._engine.rollout(asked, sampling, seed=chunk_seed(self._seed, name, number))
        sampled = time.monotonic()
        self._tracker.waiting_for(f"the rewards of {len(asked) * sampling.num_samples} samples ({name})")
        groups = scorer.score([_joined(problem, drawn[place * len(ask) :][: len(ask)], prefills) for place, problem in enumerate(problems)])
        self._tracker.log(self.step, _metrics(name, groups, sampled - started, time.monotonic() - started))
        return groups


def finished_chunks(folder: Path) -> int:
    """Parts in `folder`: the step at which a stage resumed from it goes on."""
    return sum(1 for entry in folder.iterdir() if _PART.fullmatch(entry.name)) if folder.is_dir() else 0


def chunk_seed(seed: int, name: str, number: int) -> int:
    """Seed of chunk `number` of the draw `name`; 31 bits."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}/{number}".encode(), digest_size=4).digest(), "big") >> 1


def _joined(problem: Problem, groups: Sequence[Group], prefills: Sequence[str]) -> Group:
    """All samples of a problem, numbered through its ways of asking."""
    samples = [(trajectory, prefill) for group, prefill in zip(groups, prefills, strict=True) for trajectory in group.trajectories]
    return Group(
        problem=problem,
        trajectories=tuple(
            replace(trajectory, problem_id=problem.id, sample_index=index, text=prefill + trajectory.text)
            for index, (trajectory, prefill) in enumerate(samples)
        ),
    )


def _metrics(name: str, groups: Sequence[Group], sampling_seconds: float, seconds: float) -> dict[str, float]:
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    judged = [t.primary for t in trajectories if t.primary is not None]
    tokens = sum(len(t.token_ids) for t in trajectories)
    values = {
        "samples": float(len(trajectories)),
        "samples_failed": float(len(trajectories) - len(judged)),
        "response_tokens/mean": tokens / len(trajectories),
        "truncated": fmean(t.finish_reason == "length" for t in trajectories),
        "samples_per_second": len(trajectories) / seconds,
        "rollout_tokens_per_second": tokens / sampling_seconds,
        "time/sampling": sampling_seconds,
        "time/rewards": seconds - sampling_seconds,
    }
    return {**values, **({"accuracy": fmean(judged), f"accuracy/{name}": fmean(judged)} if judged else {})}


def _read_part(path: Path, problems: Sequence[Problem], count: int) -> list[Group]:
    rows = read_rollouts(path, token_ids=True)
    held = [(row["problem_id"], row["prompt"], row["answer"]) for row in rows[::count]]
    if len(rows) != count * len(problems) or held != [(p.id, prompt_text(p.messages), p.answer) for p in problems]:
        fix = "start over with --fresh, or remove the stage's folder"
        raise DataError(str(path), "holds samples of other problems: the data changed since this stage was begun", fix)
    return [
        Group(problem=problem, trajectories=tuple(_trajectory(row) for row in rows[place * count : (place + 1) * count]))
        for place, problem in enumerate(problems)
    ]


def _trajectory(row: dict[str, Any]) -> Trajectory:
    """Everything but the log-probabilities, which no data stage needs."""
    return Trajectory(
        problem_id=row["problem_id"],
        sample_index=row["sample_index"],
        token_ids=tuple(row["token_ids"]),
        logprobs=(),
        segments=tuple(Segment(**segment) for segment in row["segments"]),
        finish_reason=row["finish_reason"],
        text=row["response"],
        reward=row["reward"],
        reward_parts=row["reward_parts"],
        reward_error=row["reward_error"],
    )
