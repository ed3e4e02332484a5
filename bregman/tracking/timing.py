"""Wall time of the phases of an iteration.

Owns the stopwatch and the derived rollout speed; tells the tracker what is being waited for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from bregman.protocols import Tracker
from bregman.types import Group


class PhaseTimer:
    """`with timer("rollout"): ...` adds the block's seconds to that phase."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._tracker.waiting_for(phase.replace("_", " "))
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - started

    def metrics(self, groups: Sequence[Group] = ()) -> dict[str, float]:
        """`time/<phase>` in seconds, and `rollout_tokens_per_second` when groups are given."""
        metrics = {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
        tokens = sum(len(trajectory.token_ids) for group in groups for trajectory in group.trajectories)
        if tokens and self._seconds.get("rollout"):
            metrics["rollout_tokens_per_second"] = tokens / self._seconds["rollout"]
        return metrics
