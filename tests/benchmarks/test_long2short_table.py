"""The table and the plot of benchmarks/long2short.py, from a run folder written by hand."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "long2short.py"


def run_folder(path: Path, finished: int) -> Path:
    rows = []
    for name, accuracy, tokens in [("long", 0.9, 120.0), ("rl", 0.96, 60.0)]:
        rows.append({"name": name, "kind": "sft", "seconds": 30.4})
        counts = {"num_problems": 100, "samples_per_problem": 4, "truncated": 0.015}
        metrics = {"second_looks": 3.25, "gave_up": 0.0}
        rows.append({"name": f"after_{name}", "accuracy": accuracy, "mean_tokens": tokens, "seconds": 2.0, "metrics": metrics, **counts})
    path.mkdir()
    (path / "summary.json").write_text(json.dumps(rows[:finished]))
    (path / "recipe.resolved.yaml").write_text(yaml.safe_dump({"stages": [{"name": row["name"]} for row in rows]}))
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["long2short.py", *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_every_model_has_a_row_and_a_point(tmp_path, monkeypatch, capsys):
    folder = run_folder(tmp_path / "run", 4)
    run(monkeypatch, folder)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:4] == [
        "| long | 0.900 +- 0.015 | 120.0 | 1.00 | 1.5% | 3.25 | 0.00 | 30 |",
        "| rl | 0.960 +- 0.010 | 60.0 | 0.50 | 1.5% | 3.25 | 0.00 | 30 |",
    ]
    assert lines[-1] == f"plot: {folder / 'long2short.svg'}"
    drawn = (folder / "long2short.svg").read_text()
    assert drawn.count('r="3.5"') == 2 and ">rl</text>" in drawn


@pytest.mark.parametrize(("finished", "expected"), [(1, "run the recipe to its end first"), (None, "holds no run")])
def test_an_unfinished_run_is_one_line(tmp_path, monkeypatch, capsys, finished, expected):
    folder = run_folder(tmp_path / "run", finished) if finished else tmp_path
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, folder)
    assert expected in f"{stopped.value}{capsys.readouterr().err}"
