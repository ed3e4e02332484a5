"""Peak memory of a whole demo run: proportional set size (shared pages counted once) summed over the driver, Ray and all workers.

Runs the demo with shortened stages, which hold the same processes and buffers as the whole one, and samples every second.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "tiny_thinking" / "recipe.yaml"
SHORT = ["stages.joint_sft.steps=30", "stages.long_cot_sft.steps=30", "stages.long_cot_sft.gate=null", "stages.rl.iterations=4"]
MARK = "BREGMAN_MEMORY_BENCHMARK"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--whole", action="store_true", help="do not shorten the stages")
    options = parser.parse_args()
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"output_dir={folder}/run", *([] if options.whole else SHORT)]
        command = [sys.executable, "-m", "recipes.cli", "run", str(RECIPE), *(part for o in overrides for part in ("--set", o))]
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, MARK: mark}, stdout=subprocess.DEVNULL)
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, _gib(mark))
            time.sleep(1.0)
    if process.returncode:
        sys.exit(f"the run ended with code {process.returncode}")
    print(f"peak memory of all processes: {peak:.2f} GiB (goal 6)")


def _gib(mark: str) -> float:
    """Memory of every process whose environment carries `mark`: Ray's processes inherit it from the driver."""
    total = 0
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                total += process.memory_full_info().pss
        except (psutil.Error, FileNotFoundError):  # it ended in between, or is a kernel thread
            continue
    return total / 2**30


if __name__ == "__main__":
    main()
