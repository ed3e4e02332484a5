"""Seconds from launching `bregman run` on the demo recipe to its first optimizer step, goal 25.

Each repeat starts the command in a process of its own with a fresh run folder, and waits for the first row of `metrics.jsonl`, which the
first SFT stage writes after its first step. By then the model is made, the data are read and the learner is up; vLLM, which that stage
does not need, comes up beside it and competes for the cores. The first repeat also pays for whatever the disk cache does not hold.

    python benchmarks/startup.py [--repeats 3] [--deadline 120]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "tiny_thinking" / "recipe.yaml"
POLL_SECONDS = 0.02
GOAL_SECONDS = 25.0


def seconds_to_first_step(deadline: float) -> float:
    """Wall time from process start to the first row of metrics; the process is ended after it.

    Raises:
        RuntimeError: no row within `deadline` seconds, or the command ended without one; with what it printed.
    """
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "output.txt").open("w+") as output:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "recipes.cli", "run", str(RECIPE), "--set", f"output_dir={run}"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)}
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            while not _first_row(run / "metrics.jsonl"):
                if process.poll() is not None or time.monotonic() - started > deadline:
                    output.seek(0)
                    state = "is still running" if process.returncode is None else f"ended with code {process.returncode}"
                    raise RuntimeError(f"no optimizer step after {time.monotonic() - started:.0f} s; the command {state}:\n{output.read()}")
                time.sleep(POLL_SECONDS)
            return time.monotonic() - started
        finally:
            _end(process)


def _first_row(metrics: Path) -> bool:
    """Whether the first whole line is there, and is what we wait for."""
    if not metrics.exists():
        return False
    first, newline, _ = metrics.read_text().partition("\n")
    if not newline:
        return False
    row = json.loads(first)
    if "loss" not in row or row["step"] != 0:
        raise RuntimeError(f"the first row is not that of an optimizer step: {first}")
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """As a user would: SIGTERM lets it end its workers; killed if it does not."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--deadline", type=float, default=120.0, help="seconds before a repeat counts as failed")
    options = parser.parse_args()
    seconds = []
    for repeat in range(options.repeats):
        load = os.getloadavg()[0]
        seconds.append(seconds_to_first_step(options.deadline))
        print(f"launch to first optimizer step, run {repeat + 1}: {seconds[-1]:.1f} s (load average before it: {load:.1f})", flush=True)
    middle, spread = statistics.median(seconds), f"{min(seconds):.1f} to {max(seconds):.1f}"
    print(f"launch to first optimizer step: {middle:.1f} s (median of {options.repeats}, {spread}; goal {GOAL_SECONDS:.0f})")


if __name__ == "__main__":
    main()
