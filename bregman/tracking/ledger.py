"""The sample ledger: every rollout ends in exactly one bin, and the bins add up to what was asked for.

Owns the counts. Who decides a fate is `rl.batches`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from bregman.types import Fate, Group


class SampleLedger:
    """Counts fates per iteration and over the whole stage; its state goes into checkpoints.

    Attributes:
        totals: responses per fate since the stage began; an unfinished response counts in each iteration that carries it over.
        carried: responses that the last iteration left unfinished, to be continued in the next.
    """

    def __init__(self) -> None:
        self.totals: Counter[Fate] = Counter()
        self.carried = 0

    def record(self, groups: Sequence[Group], *, expected: int) -> dict[str, float]:
        """Book an iteration and return its `ledger/<fate>` counts, zeros included.

        Args:
            groups: everything the iteration got back, responses carried over from the last one included.
            expected: responses newly asked for in this iteration.

        Raises:
            RuntimeError: a response has no fate, or some are missing or too many. A bug, so no `UserError`.
        """
        counts = self.check(groups, expected)
        self.totals.update(counts)
        self.carried = counts[Fate.UNFINISHED]
        return {f"ledger/{fate}": float(counts[fate]) for fate in Fate}

    def check(self, groups: Sequence[Group], expected: int) -> Counter[Fate]:
        """Responses per fate; arguments and errors as `record`."""
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        homeless = [f"{t.problem_id}[{t.sample_index}]" for t in trajectories if t.fate is None]
        if homeless:
            raise RuntimeError(f"sample ledger: {len(homeless)} responses have no fate, the first is {homeless[0]}")
        counts = Counter(trajectory.fate for trajectory in trajectories if trajectory.fate is not None)
        if counts.total() != expected + self.carried:
            parts = ", ".join(f"{counts[fate]} {fate}" for fate in Fate if counts[fate])
            asked = f"{expected} were asked for and {self.carried} carried over"
            raise RuntimeError(f"sample ledger: {asked}, but {counts.total()} came back ({parts})")
        return counts

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"totals": {str(fate): self.totals[fate] for fate in Fate}, "carried": self.carried}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.totals = Counter({Fate(name): int(count) for name, count in state["totals"].items()})
        self.carried = int(state["carried"])
