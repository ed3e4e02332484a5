"""Who may use a run folder, and checkpoints that appear whole or not at all."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_run import RECIPE

from bregman.errors import UserError
from bregman.tracking.run_folder import RunFolder, checkpoint, latest_checkpoint

HOLD = "import sys; from bregman.tracking.run_folder import RunFolder as R; f = R.open(sys.argv[1], {'name': 'a'}); print('held', flush=True); "


def run_python(code: str, *arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def changed(path: str, value: Any) -> dict[str, Any]:
    recipe = copy.deepcopy(RECIPE)
    node: Any = recipe
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parents:
        node = node[part]
    node[last] = value
    return recipe


def save(stage: Path, step: int, keep: int = 2, text: str = "weights") -> None:
    with checkpoint(stage, step, keep) as folder:
        (folder / "learner").mkdir()
        (folder / "learner" / "data").write_text(text)


def test_a_second_process_is_told_who_holds_the_folder_and_gets_it_afterwards(tmp_path: Path) -> None:
    holder = run_python(HOLD + "sys.stdin.read()", tmp_path / "run")
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError) as caught:
            RunFolder.open(tmp_path / "run", {"name": "a"})
        assert f"in use by process {holder.pid}" in str(caught.value)
        assert "wait for it or end it, or choose another output_dir" in str(caught.value)
        with pytest.raises(UserError, match="in use"):
            RunFolder.open(tmp_path / "run", {"name": "a"}, fresh=True)
    finally:
        holder.kill()
        holder.communicate(timeout=10)
    RunFolder.open(tmp_path / "run", {"name": "a"}).close()


def test_the_same_recipe_goes_on_in_its_folder(tmp_path: Path) -> None:
    for _ in range(2):
        folder = RunFolder.open(tmp_path / "run", {**RECIPE, "rate": 1e-05, "note": "0x10", "nothing": None, "pair": (1, 2.0)})
        (folder.path / "metrics.jsonl").touch()
        folder.close()


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("seed", 1, "seed: 0 there, 1 now"),
        ("stages.4.iterations", 41, "stages[4].iterations: 40 there, 41 now"),
        ("stages.0.gate", {"metric": "accuracy"}, 'stages[0].gate: not set there, {"metric": "accuracy"} now'),
        ("stages", RECIPE["stages"][:5], 'stages[5]: {"name": "after_rl", "kind": "eval"} there, not set now'),
    ],
)
def test_another_recipe_is_refused_by_its_first_differing_key(tmp_path: Path, path: str, value: Any, expected: str) -> None:
    RunFolder.open(tmp_path / "run", RECIPE).close()
    with pytest.raises(UserError) as caught:
        RunFolder.open(tmp_path / "run", changed(path, value))
    assert expected in str(caught.value)
    assert "choose another output_dir, or start over with --fresh" in str(caught.value)
    RunFolder.open(tmp_path / "run", RECIPE).close()


@pytest.mark.parametrize(
    "path",
    [
        "stages.4.parity_bound",
        "stages.4.rewards.on_failure",
        "learner.tokens_per_micro_batch",
        "engine.kv_cache_mib",
        "cluster.step_timeout",
    ],
)
def test_limits_may_be_raised_on_an_unfinished_run(tmp_path: Path, path: str) -> None:
    section, _, key = path.rpartition(".")
    before = changed(section, {key: 1}) if section != "stages.4" else changed(path, 1)
    after = changed(section, {key: 2}) if section != "stages.4" else changed(path, 2)
    RunFolder.open(tmp_path / "run", before).close()
    RunFolder.open(tmp_path / "run", after).close()


def test_workers_and_place_of_a_run_may_change(tmp_path: Path) -> None:
    RunFolder.open(tmp_path / "run", RECIPE).close()
    RunFolder.open(tmp_path / "run", changed("cluster.address", "auto")).close()
    (tmp_path / "run").rename(tmp_path / "moved")
    folder = RunFolder.open(tmp_path / "moved", changed("output_dir", "moved"))
    assert folder.read_recipe()["output_dir"] == "moved"
    folder.close()


def test_fresh_moves_the_old_run_aside(tmp_path: Path) -> None:
    for number in range(3):
        folder = RunFolder.open(tmp_path / "run", {"name": str(number)}, fresh=True)
        folder.metrics_file.write_text(str(number))
        folder.close()
    assert sorted(os.listdir(tmp_path)) == ["run", "run.old-1", "run.old-2"]
    assert [RunFolder(tmp_path / name).metrics_file.read_text() for name in ("run.old-1", "run.old-2", "run")] == ["0", "1", "2"]


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"not a run folder \(it holds thesis.tex\)"):
        RunFolder.open(tmp_path, RECIPE)
    assert (tmp_path / "thesis.tex").exists()


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="a file is in the way"):
        RunFolder.open(tmp_path / "run", RECIPE)


def test_a_damaged_recipe_is_named(tmp_path: Path) -> None:
    RunFolder.open(tmp_path / "run", RECIPE).close()
    (tmp_path / "run" / "recipe.resolved.yaml").write_text("{")
    with pytest.raises(UserError, match="not the YAML of a recipe"):
        RunFolder.open(tmp_path / "run", RECIPE)


def test_checkpoints_appear_and_old_ones_go(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step in (8, 9, 10):
        save(tmp_path, step)
    assert latest_checkpoint(tmp_path) == (10, tmp_path / "checkpoints" / "step_000010")
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_000009", "step_000010"]


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_a_failed_checkpoint_leaves_the_last_one(tmp_path: Path, error: BaseException) -> None:
    save(tmp_path, 1)
    with pytest.raises(type(error)), checkpoint(tmp_path, 2, 2) as folder:
        (folder / "half").touch()
        raise error
    assert os.listdir(tmp_path / "checkpoints") == ["step_000001"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 1, text="old")
    save(tmp_path, 1, text="new")
    assert (tmp_path / "checkpoints" / "step_000001" / "learner" / "data").read_text() == "new"
    assert os.listdir(tmp_path / "checkpoints") == ["step_000001"]


KILL_AT = {
    "before the rename": "os.rename = die",
    "between the renames of a replacement": "n = iter([real, die]); os.rename = lambda a, b: next(n)(a, b)",
    "at the first deletion": "shutil.rmtree = lambda p, **k: die() if os.path.exists(p) else None",
}


@pytest.mark.parametrize("moment", KILL_AT)
@pytest.mark.parametrize("step", [2, 3])
def test_killed_at_any_moment_a_whole_checkpoint_is_left(tmp_path: Path, moment: str, step: int) -> None:
    save(tmp_path / "stages" / "00_a", 1)
    save(tmp_path / "stages" / "00_a", 2)
    code = f"""
import os, pathlib, shutil, signal, sys
from bregman.tracking.run_folder import checkpoint
real = os.rename
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
with checkpoint(pathlib.Path(sys.argv[1]), {step}, 2) as folder:
    (folder / "learner").mkdir(); (folder / "learner" / "data").write_text("weights")
    {KILL_AT[moment]}
"""
    process = run_python(code, tmp_path / "stages" / "00_a")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL, errors
    found = latest_checkpoint(tmp_path / "stages" / "00_a")
    assert found is not None
    assert found[0] == (3 if step == 3 and moment != "before the rename" else 2)
    assert (found[1] / "learner" / "data").read_text() == "weights"
    (tmp_path / "recipe.resolved.yaml").write_text("name: a\n")
    RunFolder.open(tmp_path, {"name": "a"}).close()
    assert all(not name.startswith(".") for name in os.listdir(found[1].parent))


def test_a_full_disk_keeps_the_last_checkpoint(small_disk: Path) -> None:
    save(small_disk, 1)
    with pytest.raises(UserError, match="no space left"), checkpoint(small_disk, 2, 2) as folder:
        (folder / "data").write_bytes(b"x" * 2**21)

    def write_like_torch(path: Path) -> None:
        with pytest.raises(OSError, match="No space"), path.open("wb") as file:
            file.write(b"x" * 2**21)
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    with pytest.raises(UserError, match="no space left"), checkpoint(small_disk, 2, 2) as folder:
        write_like_torch(folder / "data")
    found = latest_checkpoint(small_disk)
    assert found is not None and found[0] == 1
    save(small_disk, 2)
