"""Curriculum and prioritized sampling, Kimi k1.5 sec. 2.3.4: who is eligible now, and how often each is drawn.

Owns difficulty phases, success rates and the weighted draw. Difficulty labels come with the problems; success comes from
the groups observed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from bregman.errors import DataError
from bregman.types import Group, Problem
from samplers.config import CurriculumPhase
from samplers.uniform import _from_json, _to_json


class WeightedSampler:
    """Draws eligible problems without replacement within a call, problem i with weight max(floor, 1 - s_i).

    s_i is the success rate over all samples of problem i so far, where a sample succeeds when its primary reward is at least 1;
    a problem not yet tried has s_i = 0.

    Args:
        problems: the training problems.
        seed: of the draws.
        phases: curriculum: from iteration `start` on only difficulties within bounds are eligible. Empty: all are, always.
        prioritized: weigh by 1 - s_i; otherwise all eligible problems weigh the same.
        floor: least weight of a problem.

    Raises:
        DataError: the phases need difficulty labels that the data lacks, or a phase leaves no problem.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        seed: int,
        *,
        phases: Sequence[CurriculumPhase] = (),
        prioritized: bool = False,
        floor: float = 1.0,
    ) -> None:
        self._problems = list(problems)
        self._phases = sorted(phases, key=lambda phase: phase.start)
        self._prioritized, self._floor = prioritized, floor
        self._random = random.Random(f"sampler {seed}")
        self._tries: dict[str, int] = {}
        self._successes: dict[str, float] = {}
        _check(self._problems, self._phases)

    def next_problems(self, count: int, iteration: int) -> list[Problem]:
        """`count` problems of the phase at `iteration`; none twice within one call unless fewer than `count` are eligible."""
        eligible = [p for p in self._problems if _eligible(p, _phase_at(self._phases, iteration))]
        chosen: list[Problem] = []
        while len(chosen) < count:
            chosen += self._draw(eligible, min(count - len(chosen), len(eligible)))
        return chosen

    def observe(self, groups: Sequence[Group]) -> None:
        """Count tries and successes of every scored trajectory, by its primary reward."""
        for group in groups:
            for trajectory in group.trajectories:
                if trajectory.primary is not None:
                    key = group.problem.id
                    self._tries[key] = self._tries.get(key, 0) + 1
                    self._successes[key] = self._successes.get(key, 0.0) + (trajectory.primary >= 1.0)

    def success_rate(self, problem_id: str) -> float:
        """s_i in [0, 1]; 0 for a problem not yet tried."""
        tries = self._tries.get(problem_id, 0)
        return self._successes[problem_id] / tries if tries else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"random": _to_json(self._random.getstate()), "tries": dict(self._tries), "successes": dict(self._successes)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._random.setstate(_from_json(state["random"]))
        self._tries, self._successes = dict(state["tries"]), dict(state["successes"])

    def _draw(self, eligible: Sequence[Problem], count: int) -> list[Problem]:
        """Weighted draw without replacement: the largest of u^(1/w) (Efraimidis and Spirakis 2006)."""
        keys = [math.log(1.0 - self._random.random()) / self._weight(problem) for problem in eligible]
        order = sorted(range(len(eligible)), key=keys.__getitem__, reverse=True)
        return [eligible[index] for index in order[:count]]

    def _weight(self, problem: Problem) -> float:
        return max(self._floor, 1.0 - self.success_rate(problem.id)) if self._prioritized else 1.0


def _phase_at(phases: Sequence[CurriculumPhase], iteration: int) -> CurriculumPhase | None:
    """The last phase that has begun; before the first one begins, the first."""
    begun = [phase for phase in phases if phase.start <= iteration]
    return begun[-1] if begun else (phases[0] if phases else None)


def _eligible(problem: Problem, phase: CurriculumPhase | None) -> bool:
    return phase is None or (problem.difficulty is not None and phase.min_difficulty <= problem.difficulty <= phase.max_difficulty)


def _check(problems: Sequence[Problem], phases: Sequence[CurriculumPhase]) -> None:
    for index, phase in enumerate(phases):
        unlabelled = next((p.id for p in problems if p.difficulty is None), None)
        if unlabelled is not None:
            raise DataError("sampler.phases", f"problem {unlabelled} has no difficulty label", "map a `difficulty` column or use `uniform`")
        if not any(_eligible(problem, phase) for problem in problems):
            bounds = f"[{phase.min_difficulty}, {phase.max_difficulty}]"
            raise DataError(f"sampler.phases[{index}]", f"no problem has a difficulty in {bounds}", "widen the bounds")
