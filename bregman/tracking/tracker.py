"""Where the numbers and rollouts of a run go: metrics.jsonl, TensorBoard, Parquet, summary.json, warnings.log and the console.

Owns what is recorded and that a resumed stage records each step once. How it is shown is `console` and `report`.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from bregman.errors import UserError
from bregman.tracking.console import Console
from bregman.tracking.disk import AppendFile, disk_errors, write_json, write_text
from bregman.tracking.rollouts import write_rollouts
from bregman.tracking.run_folder import RunFolder, step_of_rollouts
from bregman.tracking.tensorboard import EventWriter
from bregman.types import Evaluation, Group


class RunTracker:
    """`protocols.Tracker` of a run, one stage at a time.

    Steps count from 0. A checkpoint at step n holds the steps before n; a stage resumed from it begins with `first_step=n`.
    """

    def __init__(self, folder: RunFolder, *, num_stages: int, console: Console | None = None) -> None:
        self._folder = folder
        self._console = console or Console(num_stages)
        self._metrics = AppendFile(folder.metrics_file)
        self._warnings = AppendFile(folder.warnings_file)
        self._events: EventWriter | None = None
        self._stage = self._kind = ""
        self._not_finite: set[str] = set()

    def begin_stage(self, index: int, name: str, kind: str, *, total_steps: int, first_step: int = 0) -> None:
        """Begin or resume the stage at place `index` (from 0); what an earlier process recorded of it from `first_step` on is dropped."""
        self._stage, self._kind = name, kind
        self._not_finite.clear()
        self.rewind(name, first_step)
        self._close_events()
        self._events = EventWriter(self._folder.tensorboard_folder(name), first_step)
        self._console.begin_stage(index, name, kind, total_steps, first_step)

    def rewind(self, stage: str, first_step: int) -> None:
        """Drop metrics and rollouts of `stage` from `first_step` on: the steps that will run again."""
        rows = self._folder.read_metrics()
        kept = [row for row in rows if row["stage"] != stage or row["step"] < first_step]
        if len(kept) < len(rows):
            write_text(self._folder.metrics_file, "".join(f"{json.dumps(row)}\n" for row in kept))
            self._metrics.close()
            self._metrics = AppendFile(self._folder.metrics_file)
        for path in self._folder.rollouts_folder(stage).glob("*.parquet"):
            step = step_of_rollouts(path)
            if step is not None and step >= first_step:
                with disk_errors(path):
                    path.unlink()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record `metrics` of the current stage at `step`; a value that is not finite becomes null, with a warning."""
        row: dict[str, Any] = {"time": round(time.time(), 3), "stage": self._stage, "step": step}
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._metrics.write_line(json.dumps(row | {name: finite.get(name) for name in values}))
        if self._events is not None:
            self._events.write(step, {f"{self._stage}/{name}": value for name, value in values.items()})
        self._console.step(step, finite)
        for name in values.keys() - finite.keys() - self._not_finite:
            self._not_finite.add(name)
            self.warn(f"stage {self._stage}, step {step}: {name} is {values[name]}")

    def rollouts(self, step: int, groups: Sequence[Group], *, split: str = "train") -> None:
        """Store every trajectory of an iteration as `rollouts/<stage>/<split>_<step>.parquet`."""
        write_rollouts(self._folder.rollouts_file(self._stage, split, step), step, groups)

    def end_stage(self, seconds: float, evaluation: Evaluation | None = None) -> None:
        """Add the stage to summary.json, or replace its row there. `seconds`: wall time of the stage over all its processes."""
        row: dict[str, Any] = {"name": self._stage, "kind": self._kind, "seconds": round(seconds, 3)}
        if evaluation is not None:
            row |= {
                "accuracy": evaluation.accuracy,
                "pass_at_k": evaluation.pass_at_k,
                "mean_tokens": evaluation.mean_tokens,
                "num_problems": evaluation.num_problems,
                "samples_per_problem": evaluation.samples_per_problem,
                "truncated": evaluation.truncated,
                "metrics": dict(evaluation.metrics),
            }
        rows = [earlier for earlier in self._folder.read_summary() if earlier["name"] != self._stage]
        write_json(self._folder.summary_file, [*rows, row])
        self._close_events()
        self._console.end_stage(seconds, evaluation)

    def plan(self, total_steps: int) -> None:
        """Say how many steps the stage will take, where that shows only once it runs."""
        self._console.plan(total_steps)

    def waiting_for(self, what: str) -> None:
        """Say on the console what the run is waiting for, until the next `log` or wait."""
        self._console.waiting_for(what)

    def note(self, text: str) -> None:
        """Say something worth reading once."""
        self._console.note(text)

    def warn(self, text: str) -> None:
        """Say something the user should know; kept in warnings.log, and never an error itself, even on a full disk."""
        self._console.warn(text)
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        try:
            self._warnings.write_line(f"{stamp} {' '.join(text.split())}")
        except UserError as error:
            self._console.warn(str(error))

    def close(self) -> None:
        """Stop the live display and close the files. No more calls after this one."""
        self._console.close()
        with contextlib.suppress(UserError):  # every event was flushed, or failed aloud, when it was written
            self._close_events()
        self._metrics.close()
        self._warnings.close()

    def _close_events(self) -> None:
        if self._events is not None:
            events, self._events = self._events, None
            events.close()
