"""Choosing short right answers among samples of one problem: k1.5 sec. 2.4 (long2short).

Owns the choices as pure functions over scored groups. Sampling, scoring and writing the chosen rows are
`recipes.rejection`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

from bregman.types import Group, Trajectory

RIGHT = 1.0
"""Primary reward from which an answer counts as right."""


def shortest_right(group: Group) -> Trajectory | None:
    """The shortest right answer, the first of equals; None if none is right. Shortest rejection sampling, k1.5 sec. 2.4."""
    right = _right(group)
    return min(right, key=lambda trajectory: len(trajectory.token_ids)) if right else None


def preference_pairs(group: Group, *, longer: float = 1.5) -> list[tuple[Trajectory, Trajectory]]:
    """(chosen, rejected) pairs for DPO, k1.5 sec. 2.4: the shortest right answer is chosen over each distinct wrong answer and over each
    right one more than `longer` times its length. Empty if no answer is right.

    Unfinished, failed and unscored answers are in no pair.
    """
    chosen = shortest_right(group)
    if chosen is None:
        return []
    limit = longer * len(chosen.token_ids)
    right = {id(trajectory) for trajectory in _right(group)}
    rejected = [t for t in _usable(group) if id(t) not in right or len(t.token_ids) > limit]
    distinct = {t.token_ids: t for t in reversed(rejected)}  # the first of equals stays
    return [(chosen, t) for t in rejected if distinct[t.token_ids] is t]


def _right(group: Group) -> list[Trajectory]:
    return [t for t in _usable(group) if t.finish_reason == "stop" and (t.primary or 0.0) >= RIGHT]


def _usable(group: Group) -> Sequence[Trajectory]:
    return [t for t in group.trajectories if t.finish_reason in ("stop", "length", "repetition") and t.primary is not None]
