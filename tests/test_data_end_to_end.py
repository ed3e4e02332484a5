"""The tiny data recipe on the real Ray, vLLM and FSDP2: a model gets better on its own right answers; a killed stage resumes exactly."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "tiny_data" / "recipe.yaml"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(output: Path, *overrides: str) -> list[str]:
    sets = [part for override in (f"output_dir={output}", *overrides) for part in ("--set", override)]
    return [sys.executable, "-m", "recipes.cli", "run", str(RECIPE), *sets]


def run(output: Path, *overrides: str) -> None:
    result = subprocess.run(command(output, *overrides), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_curated_problems_and_verified_answers_raise_held_out_accuracy(tmp_path):
    output = tmp_path / "run"
    process = subprocess.Popen(command(output), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = output / "stages" / "03_long_cot" / "parts" / "000001_samples.parquet"
    deadline = time.monotonic() + 1200
    while not part.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert part.exists()
    made = {path: path.stat().st_mtime_ns for path in part.parent.iterdir()}
    run(output)
    assert {path: path.stat().st_mtime_ns for path in made} == made, "finished chunks stay as they are"

    summary = {row["name"]: row for row in json.loads((output / "summary.json").read_text())}
    assert summary["before"]["accuracy"] <= 0.45
    assert summary["after"]["accuracy"] >= summary["before"]["accuracy"] + 0.3

    curate = json.loads((output / "stages" / "02_curate" / "report.json").read_text())
    assert sum(curate["fates"].values()) == curate["problems"] == 512
    assert curate["fates"]["easy_to_hack"] > 0 and curate["domains"]["after"].keys() == {"even", "odd"}
    report = json.loads((output / "stages" / "03_long_cot" / "report.json").read_text())
    assert sum(report["fates"].values()) == report["samples"] == curate["fates"]["kept"] * 16
    data = parquet.read_table(output / "stages" / "03_long_cot" / "data.parquet").to_pylist()
    assert len(data) == report["fates"]["kept"]

    (output / "stages" / "03_long_cot" / "done.json").unlink()
    for leftover in [*part.parent.glob("*"), output / "stages" / "03_long_cot" / "data.parquet"]:
        leftover.unlink()
    run(output)
    again = parquet.read_table(output / "stages" / "03_long_cot" / "data.parquet").to_pylist()
    assert again == data, "sampled in one go, the data is that of the killed stage"
