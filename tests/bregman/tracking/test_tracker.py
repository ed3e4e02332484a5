"""What a run records, and that a resumed stage records each step once."""

from __future__ import annotations

import io
import json
import math
import random
from pathlib import Path

import pyarrow.parquet
import pytest
from fake_run import RECIPE, make_evaluation, make_groups, make_trajectory

from bregman.errors import UserError
from bregman.tracking.console import Console
from bregman.tracking.rollouts import prompt_text, read_rollouts
from bregman.tracking.run_folder import RunFolder
from bregman.tracking.tracker import RunTracker
from bregman.types import Group, Message, Problem


def open_tracker(path: Path) -> RunTracker:
    return RunTracker(RunFolder(path), num_stages=2, console=Console(2, stream=io.StringIO()))


def rows(path: Path) -> list[tuple[str, int, float]]:
    return [(row["stage"], row["step"], row["loss"]) for row in RunFolder(path).read_metrics()]


def scalars(path: Path, stage: str) -> list[tuple[int, float]]:
    """As TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path / "tensorboard" / stage))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(f"{stage}/loss")]


def test_a_resumed_stage_records_each_step_once(tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path)
    for index, stage in enumerate(("sft", "rl")):
        tracker.begin_stage(index, stage, stage, total_steps=4)
        for step in range(4):
            tracker.log(step, {"loss": float(step)})
            tracker.rollouts(step, [], split="train")
    # Killed here, in the middle of a line, with a checkpoint at step 2; nothing is closed.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1, "stage": "rl", "st')
    resumed = open_tracker(tmp_path)
    resumed.begin_stage(1, "rl", "rl", total_steps=4, first_step=2)
    assert sorted(path.name for path in (tmp_path / "rollouts" / "rl").iterdir()) == ["train_000000.parquet", "train_000001.parquet"]
    resumed.log(2, {"loss": 20.0})
    resumed.close()
    tracker.close()
    expected = [("sft", step, float(step)) for step in range(4)] + [("rl", 0, 0.0), ("rl", 1, 1.0), ("rl", 2, 20.0)]
    assert rows(tmp_path) == expected
    assert scalars(tmp_path, "rl") == [(0, 0.0), (1, 1.0), (2, 20.0)]
    assert scalars(tmp_path, "sft") == [(step, float(step)) for step in range(4)]


def test_a_stage_begun_anew_forgets_its_earlier_rows(tmp_path: Path) -> None:
    for loss in (1.0, 2.0):
        tracker = open_tracker(tmp_path)
        tracker.begin_stage(0, "sft", "sft", total_steps=4)
        tracker.log(0, {"loss": loss})
        tracker.close()
    assert rows(tmp_path) == [("sft", 0, 2.0)]


def test_every_row_is_on_disk_at_once(tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path)
    tracker.begin_stage(0, "sft", "sft", total_steps=4)
    tracker.log(0, {"loss": 1.0})
    assert rows(tmp_path) == [("sft", 0, 1.0)]
    assert scalars(tmp_path, "sft") == [(0, 1.0)]
    tracker.close()


def test_values_that_are_not_finite_become_null_with_one_warning(tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path)
    tracker.begin_stage(0, "sft", "sft", total_steps=4)
    for step in range(3):
        tracker.log(step, {"loss": math.nan, "grad_norm": math.inf, "fine": 1.0})
    tracker.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text.splitlines()[0]) | {"time": 0} == {
        "time": 0,
        "stage": "sft",
        "step": 0,
        "loss": None,
        "grad_norm": None,
        "fine": 1,
    }
    warnings = (tmp_path / "warnings.log").read_text().splitlines()
    assert len(warnings) == 2
    assert any("stage sft, step 0: loss is nan" in warning for warning in warnings)


def test_summary_rows_are_replaced_by_name_and_in_the_order_of_the_recipe(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path / "run", RECIPE)
    for name, accuracy in (("after_rl", 0.9), ("after_long_cot", 0.3), ("after_rl", 0.97)):
        tracker = open_tracker(folder.path)
        tracker.begin_stage(0, name, "eval", total_steps=1)
        tracker.end_stage(2.5, make_evaluation(accuracy, 60.5))
        tracker.close()
    tracker = open_tracker(folder.path)
    tracker.begin_stage(0, "joint_sft", "sft", total_steps=1)
    tracker.end_stage(93.0)
    tracker.close()
    folder.close()
    summary = folder.read_summary()
    assert [row["name"] for row in summary] == ["joint_sft", "after_long_cot", "after_rl"]
    assert summary[0] == {"name": "joint_sft", "kind": "sft", "seconds": 93.0}
    assert summary[2] == {
        "name": "after_rl",
        "kind": "eval",
        "seconds": 2.5,
        "accuracy": 0.97,
        "pass_at_k": 1.0,
        "mean_tokens": 60.5,
        "num_problems": 256,
        "samples_per_problem": 1,
        "truncated": 0.01,
        "metrics": {"format": 0.99},
    }


def test_rollouts_keep_everything_about_a_response(tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path)
    tracker.begin_stage(0, "rl", "rl", total_steps=40)
    messages: tuple[Message, ...] = ({"role": "system", "content": "Think."}, {"role": "user", "content": "616=9?"})
    problem = Problem(id="p0", messages=messages, prompt_ids=(1,), answer="6+1*6", difficulty=0.4, source="search")
    tracker.rollouts(12, [Group(problem=problem, trajectories=(make_trajectory(3),))])
    tracker.close()
    path = tmp_path / "rollouts" / "rl" / "train_000012.parquet"
    [row] = pyarrow.parquet.read_table(path).to_pylist()
    assert row == {
        "iteration": 12,
        "problem_id": "p0",
        "sample_index": 3,
        "source": "search",
        "difficulty": 0.4,
        "prompt": "616=9?",
        "images": [],
        "answer": "6+1*6",
        "response": "6+1=7-6=1,9n</think>1",
        "num_tokens": 3,
        "token_ids": [5, 6, 7],
        "logprobs": [-0.5, -0.25, -1.0],
        "segments": [{"policy_version": 3, "length": 2}, {"policy_version": 4, "length": 1}],
        "finish_reason": "stop",
        "reward": 1.0,
        "reward_parts": [("answer", 1.0), ("format", None)],
        "reward_error": "",
        "advantage": 0.5,
        "fate": "trained",
    }
    assert read_rollouts(path)[0]["reward_parts"] == {"answer": 1.0, "format": None}
    assert [item.name for item in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"role": "user", "content": "a?"}], "a?"),
        ([{"role": "system", "content": "s"}, {"role": "user", "content": "a?"}], "a?"),
        ([{"role": "user", "content": [{"type": "image", "image": object()}, {"type": "text", "text": "what?"}]}], "<image>what?"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
            '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]',
        ),
        ([], "[]"),
    ],
)
def test_prompt_text(messages: list[Message], expected: str) -> None:
    assert prompt_text(messages) == expected


def test_a_full_disk_stops_the_run_with_one_line_and_keeps_what_is_there(small_disk: Path) -> None:
    tracker = open_tracker(small_disk)
    tracker.begin_stage(0, "rl", "rl", total_steps=40)
    tracker.log(0, {"loss": 1.0})
    groups = make_groups(24, 8, 0.5, random.Random(0))
    tracker.rollouts(0, groups)
    with (small_disk / "ballast").open("wb", buffering=0) as ballast:
        while True:
            try:
                ballast.write(b"x" * 4096)
            except OSError:
                break
    with pytest.raises(UserError, match="no space left"):
        tracker.rollouts(1, groups)
    with pytest.raises(UserError, match="no space left"):
        for step in range(1, 10_000):
            tracker.log(step, {"loss": 1.0})
    tracker.warn("stopped: no space left")  # must not raise
    tracker.close()
    (small_disk / "ballast").unlink()
    resumed = open_tracker(small_disk)
    resumed.begin_stage(0, "rl", "rl", total_steps=40, first_step=1)
    resumed.close()
    assert rows(small_disk) == [("rl", 0, 1.0)]
    assert len(read_rollouts(small_disk / "rollouts" / "rl" / "train_000000.parquet")) == 192
