"""The demo's recipe, shortened, on the real Ray, vLLM and FSDP2: held-out accuracy rises; and a killed run resumes exactly."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "tiny_thinking" / "recipe.yaml"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(output: Path, *overrides: str) -> list[str]:
    sets = [part for override in (f"output_dir={output}", *overrides) for part in ("--set", override)]
    return [sys.executable, "-m", "recipes.cli", "run", str(RECIPE), *sets]


def run(output: Path, *overrides: str, timeout: float = 400) -> str:
    result = subprocess.run(command(output, *overrides), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.mark.timeout(600)
def test_sft_long_cot_and_opmd_raise_held_out_accuracy(tmp_path):
    output = run(tmp_path / "run", "stages.rl.iterations=10", "stages.rl.evaluation=null")
    summary = {row["name"]: row for row in json.loads((tmp_path / "run" / "summary.json").read_text())}
    joint, long_cot, rl = (summary[name]["accuracy"] for name in ("after_joint_sft", "after_long_cot_sft", "after_rl"))
    assert long_cot <= 0.45
    assert rl >= long_cot + 0.25
    assert joint < rl
    assert summary["after_rl"]["mean_tokens"] > summary["after_long_cot_sft"]["mean_tokens"]
    assert summary["after_rl"]["metrics"]["gave_up"] < summary["after_long_cot_sft"]["metrics"]["gave_up"]
    assert summary["after_rl"]["num_problems"] == 256

    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    iterations = [row for row in rows if row["stage"] == "rl"]
    assert [row["step"] for row in iterations] == list(range(10))
    assert max(row["parity/logprob_diff_max"] for row in iterations) < 1e-3
    for row in iterations:
        assert sum(value for name, value in row.items() if name.startswith("ledger/")) == 24 * 8

    report = tmp_path / "run" / "report.html"
    assert f"report: {report}" in output
    assert report.stat().st_size > 10_000


class TestResume:
    """SIGKILL the driver, run the same command: the same tokens, rewards and weights as an undisturbed run."""

    SMALL = (
        "stages.joint_sft.steps=12",
        "stages.joint_sft.checkpoint={every: 5}",
        "stages.long_cot_sft.steps=8",
        "stages.long_cot_sft.gate=null",
        "stages.rl.iterations=4",
        "stages.rl.num_problems=6",
        "stages.rl.rollout={num_samples: 4, max_tokens: 24}",
        "stages.rl.optimizer_steps=2",
        "stages.rl.evaluation=null",
        "stages.rl.checkpoint={every: 1}",
        # About half of any samples are right: there is a signal although the model can do nothing yet.
        f"stages.rl.rewards={{functions: [{{function: '{ROOT}/tests/plugins.py:token_parity'}}]}}",
    )

    @pytest.mark.timeout(600)
    def test_killed_run_continues_exactly(self, tmp_path):
        whole, killed = tmp_path / "whole", tmp_path / "killed"
        run(whole, *self.SMALL)
        for marker in ("stages/00_joint_sft/checkpoints/step_000005", "stages/04_rl/checkpoints/step_000002"):
            self._kill_when(killed, killed / marker)
        run(killed, *self.SMALL)

        for stage in ("00_joint_sft", "02_long_cot_sft", "04_rl"):
            first, second = (load_file(folder / "stages" / stage / "model" / "model.safetensors") for folder in (whole, killed))
            assert first.keys() == second.keys()
            assert all(torch.equal(first[name], second[name]) for name in first), stage
        for iteration in range(4):
            name = f"rollouts/rl/train_{iteration:06d}.parquet"
            first, second = (parquet.read_table(folder / name).to_pylist() for folder in (whole, killed))
            assert [row["token_ids"] for row in first] == [row["token_ids"] for row in second]
            assert [row["reward"] for row in first] == [row["reward"] for row in second]
        assert self._steps(whole) == self._steps(killed)

    def _kill_when(self, folder: Path, marker: Path) -> None:
        """Start the run, SIGKILL its driver as soon as `marker` exists, and wait until its workers are gone."""
        with open(folder.with_suffix(".log"), "ab") as log:
            process = subprocess.Popen(command(folder, *self.SMALL), cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log)
        deadline = time.monotonic() + 200
        while not marker.exists():
            assert process.poll() is None, folder.with_suffix(".log").read_text()[-3000:]
            assert time.monotonic() < deadline, f"{marker} did not appear"
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

    def _steps(self, folder: Path) -> list[tuple[str, int, dict[str, float]]]:
        """Stage and step of every row, and what the reward hacking watch, which remembers earlier iterations, said of it."""
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [(row["stage"], row["step"], {name: value for name, value in row.items() if name.startswith("watch/")}) for row in rows]
