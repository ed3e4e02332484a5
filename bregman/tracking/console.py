"""What the user sees while a run goes on: a live view in a terminal, plain lines in a log.

Owns wording and timing of the output. Never breaks the run: a display that fails says so once and stays silent.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TextIO

from bregman.tracking.run_folder import RunFolder
from bregman.types import Evaluation, Group

KEY_METRICS: Mapping[str, tuple[str, str]] = {
    "accuracy": ("accuracy", ".3f"),
    "eval/accuracy": ("held-out accuracy", ".3f"),
    "response_tokens/mean": ("tokens", ".1f"),
    "loss": ("loss", ".4g"),
    "grad_norm": ("grad norm", ".3g"),
    "parity/logprob_diff_max": ("parity", ".1e"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "samples_per_second": ("samples/s", ",.1f"),
    "rollout_tokens_per_second": ("rollout tokens/s", ",.0f"),
}
"""Metrics worth a place on the console, in order: label and format."""

LINE_EVERY = 5.0
"""Seconds between lines about steps in plain mode."""
FIRST_WAIT, WAIT_EVERY = 10.0, 30.0
"""Seconds until a wait is mentioned in plain mode, and between mentions."""

P = ParamSpec("P")


def _never_fails(method: Callable[Concatenate[Console, P], None]) -> Callable[Concatenate[Console, P], None]:
    """A closed pipe, an odd encoding or a bug in the display must not end a run of hours."""

    @functools.wraps(method)
    def guarded(self: Console, /, *args: P.args, **kwargs: P.kwargs) -> None:
        if self.failed:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self.failed = True
            try:
                print(f"the progress display failed and is off from here ({type(error).__name__}: {error})", file=sys.stderr)
            except Exception:
                return

    return guarded


class Console:
    """Progress of a run on `stream`.

    Args:
        num_stages: stages of the recipe.
        stream: where to write; standard output by default.
        live: redraw in place; by default when `stream` is a terminal.
    """

    def __init__(self, num_stages: int, *, stream: TextIO | None = None, live: bool | None = None) -> None:
        self._stream = stream or sys.stdout
        terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._lock = threading.RLock()
        self._num_stages = num_stages
        self._title, self._unit, self._total, self._done = "", "step", 0, 0
        self._metrics: dict[str, float] = {}
        self._history: deque[tuple[float, int]] = deque(maxlen=20)
        self._waiting, self._since = "", 0.0
        self._next_line = self._next_wait = 0.0
        self._closed = threading.Event()
        self._live: Any = None
        self.failed = False
        self._start(terminal if live is None else live)

    @_never_fails
    def _start(self, live: bool) -> None:
        if live:
            from bregman.tracking.live_view import start_live

            self._live = start_live(self._stream, self.snapshot)
        else:
            threading.Thread(target=self._mention_waits, daemon=True, name="console").start()

    @_never_fails
    def begin_stage(self, index: int, name: str, kind: str, total_steps: int, first_step: int) -> None:
        with self._lock:
            self._title = f"stage {index + 1}/{self._num_stages} {name}"
            self._unit = "iteration" if kind == "rl" else "step"
            self._total, self._done = total_steps, first_step
            self._metrics.clear()
            self._history.clear()
            self._next_line = 0.0
        resumed = f", goes on after {first_step}" if first_step else ""
        length = f": {total_steps} {self._unit}s" if total_steps > 1 else ""
        self._print(f"{self._title} ({kind}){length}{resumed}")

    @_never_fails
    def plan(self, total_steps: int) -> None:
        with self._lock:
            self._total = total_steps

    @_never_fails
    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step (from 0) has finished."""
        now = time.monotonic()
        with self._lock:
            if self._live is None:  # a line shows what its step measured; the live view the latest of everything
                self._metrics = {name: value for name, value in self._metrics.items() if not name.startswith("eval/")}
            self._metrics |= metrics
            self._waiting = ""
            self._done = step + 1
            if not self._history or self._history[-1][1] < self._done:
                self._history.append((now, self._done))
            due = now >= self._next_line or self._done == self._total or any(name.startswith("eval/") for name in metrics)
            if self._live is not None or not due:
                return
            self._next_line = now + LINE_EVERY
        self._print("  ".join(["  " + self.position(), *self.key_metrics(), *self._eta_text()]))

    @_never_fails
    def end_stage(self, seconds: float, evaluation: Evaluation | None) -> None:
        result = ""
        if evaluation is not None:
            lengths = f"{evaluation.mean_tokens:.1f} tokens per response"
            result = f": accuracy {evaluation.accuracy:.3f}, {lengths}, {evaluation.num_problems} problems"
        self._print(f"{self._title} finished in {duration(seconds)}{result}")
        with self._lock:
            self._title, self._waiting = "", ""

    @_never_fails
    def waiting_for(self, what: str) -> None:
        with self._lock:
            self._waiting, self._since = what, time.monotonic()
            self._next_wait = self._since + FIRST_WAIT

    @_never_fails
    def note(self, text: str) -> None:
        self._print(f"  {text}")

    @_never_fails
    def warn(self, text: str) -> None:
        self._print(f"  warning: {text}", style="yellow")

    @_never_fails
    def close(self) -> None:
        self._closed.set()
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()

    def snapshot(self) -> tuple[str, str, int, int, str]:
        """For the live view: position, key metrics, steps done, steps in all, what is being waited for."""
        with self._lock:
            title = "  ".join(part for part in (self._title, self.position() if self._title else "", *self._eta_text()) if part)
            return title, "  ".join(self.key_metrics()), self._done, self._total, self.wait_text()

    def position(self) -> str:
        if self._done > self._total:
            return f"{self._unit} {self._done} (beyond the planned {self._total})"
        return f"{self._unit} {self._done}/{self._total}"

    def key_metrics(self) -> list[str]:
        shown = ((KEY_METRICS[name], self._metrics[name]) for name in KEY_METRICS if name in self._metrics)
        return [f"{label} {value:{form}}" for (label, form), value in shown]

    def wait_text(self) -> str:
        return f"waiting for {self._waiting} ({duration(time.monotonic() - self._since)})" if self._waiting else ""

    def eta(self) -> float | None:
        """Seconds left in the stage at the pace of the last steps; None before there is a pace."""
        if len(self._history) < 2 or self._done >= self._total:
            return None
        (first_time, first_step), (last_time, last_step) = self._history[0], self._history[-1]
        pace = (last_time - first_time) / (last_step - first_step)
        return max(0.0, (self._total - last_step) * pace - (time.monotonic() - last_time))

    def _eta_text(self) -> list[str]:
        left = self.eta()
        return [] if left is None else [f"ETA {duration(left)}"]

    def _print(self, line: str, style: str = "") -> None:
        live = self._live
        if live is None:
            with self._lock:
                print(line, file=self._stream, flush=True)
        else:  # never under our lock: rich draws under its own, and drawing asks for `snapshot`, which takes ours
            live.console.print(line, style=style or None, markup=False, highlight=False)

    def _mention_waits(self) -> None:
        while not self._closed.wait(0.5) and not self.failed:
            self._mention_wait()

    @_never_fails
    def _mention_wait(self) -> None:
        with self._lock:
            if not self._waiting or time.monotonic() < self._next_wait:
                return
            self._next_wait = time.monotonic() + WAIT_EVERY
            text = f"  still {self.wait_text()}"
        self._print(text)


class PlainTracker:
    """A `protocols.Tracker` for commands without a run folder: says what happens, keeps nothing."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        print(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))

    def rollouts(self, step: int, groups: Sequence[Group], *, split: str = "train") -> None:
        return

    def plan(self, total_steps: int) -> None:
        """The steps are counted as they come."""

    def waiting_for(self, what: str) -> None:
        print(f"waiting for {what}", file=sys.stderr)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr)


def summary_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table at the end of a run: one line per evaluated stage, accuracy and mean response length."""
    header = ("stage", "accuracy", "mean response tokens", "problems", "time")
    body = [
        (
            row["name"] if row["kind"] == "eval" else f"{row['name']} (gate)",
            f"{row['accuracy']:.3f}",
            f"{row['mean_tokens']:.1f}",
            str(row["num_problems"]),
            duration(row["seconds"]),
        )
        for row in rows
        if "accuracy" in row
    ]
    if not body:
        return "no stage has been evaluated yet"
    widths = [max(len(line[column]) for line in [header, *body]) for column in range(len(header))]
    rule = tuple("-" * width for width in widths)
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))])
        for line in [header, rule, *body]
    )


def print_summary(run_folder: Path) -> None:
    """Print the table of the run at `run_folder`, with the time that all finished stages took."""
    rows = RunFolder(run_folder).read_summary()
    print(summary_table(rows))
    if rows:
        print(f"{len(rows)} stages finished in {duration(sum(row['seconds'] for row in rows))}")


def duration(seconds: float) -> str:
    """`8 s`, `2:05`, `1:02:05`."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
