"""What a run folder holds, read for the report: stages in order, curves per metric, sample rollouts.

Owns reading and choosing; reads finished and unfinished runs alike. How it looks is `report` and `charts`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bregman.tracking.rollouts import read_rollouts
from bregman.tracking.run_folder import RunFolder, step_of_rollouts

_SPLITS = ("train", "eval", "gate")


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One metric of one stage: `steps` rising, `values` as many."""

    steps: Sequence[int]
    values: Sequence[float | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageData:
    """One stage of the recipe.

    Attributes:
        summary: its row of summary.json; None while it is unfinished.
        curves: by metric name; empty if it has not begun.
    """

    name: str
    kind: str
    planned_steps: int | None
    summary: Mapping[str, Any] | None
    curves: Mapping[str, Curve]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """Everything the report shows. `recipe` is the text of the resolved recipe."""

    name: str
    recipe: str
    stages: Sequence[StageData]
    warnings: Sequence[str]
    seconds: float
    updated: float | None


def read_run(folder: RunFolder) -> RunData:
    """Read the run in `folder`; parts that do not exist yet are empty."""
    recipe = folder.read_recipe()
    rows, summary = folder.read_metrics(), {row["name"]: row for row in folder.read_summary()}
    planned = {stage["name"]: stage for stage in recipe.get("stages", [])}
    names = dict.fromkeys([*planned, *(row["stage"] for row in rows), *summary])
    stages = [
        StageData(
            name=name,
            kind=planned.get(name, summary.get(name, {})).get("kind", ""),
            planned_steps=planned.get(name, {}).get("iterations") or planned.get(name, {}).get("steps"),
            summary=summary.get(name),
            curves=_curves([row for row in rows if row["stage"] == name]),
        )
        for name in names
    ]
    return RunData(
        name=str(recipe.get("name", folder.path.absolute().name)),
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if recipe else "",
        stages=stages,
        warnings=_lines(folder.warnings_file),
        seconds=sum(row["seconds"] for row in summary.values()),
        updated=rows[-1]["time"] if rows else None,
    )


def sample_rollouts(folder: RunFolder, stage: str) -> list[tuple[int, list[dict[str, Any]]]]:
    """For an early, a middle and a late iteration of `stage`: one right and one wrong response each, as far as there are any.

    Of the rollouts it trained on, or else of its evaluations.
    """
    by_split = (sorted(folder.rollouts_folder(stage).glob(f"{split}_*.parquet")) for split in _SPLITS)
    paths: list[Path] = next((found for found in by_split if found), [])
    files = {step: path for path in paths if (step := step_of_rollouts(path)) is not None}
    steps = sorted(files)
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []
    return [(step, _right_and_wrong(files[step])) for step in chosen]


def primary_reward(row: Mapping[str, Any]) -> float | None:
    """The first reward part of a rollout row, which `accuracy` averages; the total reward if it has no parts."""
    parts: Mapping[str, float | None] = row["reward_parts"]
    return next(iter(parts.values()), row["reward"])


def _right_and_wrong(path: Path) -> list[dict[str, Any]]:
    rows = read_rollouts(path)
    right = [row for row in rows if (primary_reward(row) or 0.0) >= 1.0]
    wrong = [row for row in rows if (primary_reward(row) or 0.0) < 1.0]
    return [some[len(some) // 2] for some in (right, wrong) if some]


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """Later rows of a step win."""
    values: dict[str, dict[int, float | None]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("time", "stage", "step"):
                values.setdefault(name, {})[row["step"]] = value
    return {name: Curve(steps=sorted(points), values=[points[step] for step in sorted(points)]) for name, points in values.items()}


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
