"""`bregman rewards test` over rollouts that a run could have written, and `bregman rewards new`; mistakes are one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bregman.tracking.rollouts import write_rollouts
from bregman.types import Group, Problem, Trajectory
from recipes import cli
from recipes.reward_commands import _groups
from rewards.config import RewardsConfig
from rewards.pool import RewardPool
from rewards.scorer import Scorer
from rewards.trial import percentile, score_histogram

TASK = """
import os, time

def problems(*, seed, count=3):
    for i in range(count):
        yield {"id": f"p{i}", "prompt": f"{i}+1", "answer": str(i + 1), "digits": [i, 1]}

def text(completion): return completion[0]["content"].split("</think>")[-1]

def adds_up(completions, digits, **_):
    return [None if text(c) == "?" else float(text(c) == str(sum(d))) for c, d in zip(completions, digits)]

def lenient(completions, answer, **_): return [float(a in text(c)) for c, a in zip(completions, answer)]

def length(completion_ids, **_): return [-0.1 * len(ids) for ids in completion_ids]

def fragile(completions, **_):
    for c in completions:
        if text(c) == "7": raise ValueError("no sevens")
        if text(c) == "8": os._exit(3)
    return [1.0] * len(completions)

def slow(completions, **_):
    time.sleep(0.05)
    return [1.0] * len(completions)
"""

SAMPLING = {"num_samples": 4, "max_tokens": 8}
SOURCE = {"kind": "python", "path": "task.py:problems"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A recipe and two iterations of rollouts: three problems, four responses each; p0 was drawn twice in the second one."""
    (tmp_path / "task.py").write_text(TASK)
    recipe = {
        "name": "small",
        "output_dir": "unused",
        "model": {"kind": "tiny_qwen3", "alphabet": "0123456789+?"},
        "engine": {"max_model_len": 32},
        "stages": [
            {
                "kind": "rl",
                "name": "rl",
                "iterations": 2,
                "num_problems": 4,
                "problems": SOURCE,
                "rollout": SAMPLING,
                "rewards": functions("adds_up", "lenient", "length"),
                "algorithm": {"kind": "opmd", "tau": 0.1},
                "optimizer": {"kind": "adamw", "learning_rate": 0.001},
            },
            {"kind": "eval", "name": "held_out", "problems": SOURCE, "sampling": SAMPLING, "rewards": functions("lenient")},
        ],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    answers = [["1", "2", "3", "11"], ["2", "?", "7", "2"], ["3", "3", "4", "8"]]
    write(tmp_path / "run" / "rollouts" / "rl" / "train_000000.parquet", 0, enumerate(answers))
    write(tmp_path / "run" / "rollouts" / "rl" / "train_000001.parquet", 1, [(0, answers[0]), (0, answers[0]), (2, answers[2])])
    write(tmp_path / "run" / "rollouts" / "held_out" / "eval_000000.parquet", 0, [(1, ["2", "2", "2", "2"])])
    return tmp_path


def functions(*names: str, **settings: Any) -> dict[str, Any]:
    return {"functions": [{"function": f"task.py:{name}", **settings} for name in names]}


def write(path: Path, iteration: int, answers: Any) -> None:
    """What the run stored: the reward `adds_up`, which had a bug then and took `11` for 1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    groups = []
    for number, texts in answers:
        trajectories = tuple(
            Trajectory(
                problem_id=f"p{number}",
                sample_index=index,
                token_ids=tuple(range(2 + index)),
                logprobs=(0.0,) * (2 + index),
                segments=(),
                finish_reason="abort" if (number, index, iteration) == (2, 0, 1) else "stop",
                text=f"<think>sum</think>{text}",
                reward=1.0,
                reward_parts={"adds_up": None if text == "?" else float(text in (str(number + 1), "11"))},
            )
            for index, text in enumerate(texts)
        )
        problem = Problem(id=f"p{number}", messages=({"role": "user", "content": f"{number}+1"},), prompt_ids=(1,), answer=str(number + 1))
        groups.append(Group(problem=problem, trajectories=trajectories))
    write_rollouts(path, iteration, groups)


Command = Callable[..., str]


@pytest.fixture
def command(run: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    def call(*arguments: str, on: str | Path = "run", code: int = 0) -> str:
        assert cli.main(["rewards", "test", str(run / "recipe.yaml"), "--on", str(run / on), *arguments]) == code
        said = capsys.readouterr()
        if code:
            assert said.err.count("\n") == 1 and said.err.startswith("error: "), said.err
        return said.err if code else said.out

    return call


def block(out: str, title: str) -> list[str]:
    lines = out.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(title)) + 1
    return lines[start : next((index for index in range(start, len(lines)) if not lines[index]), len(lines))]


def test_what_it_says(command: Command) -> None:
    out = command()
    assert out.startswith("stage rl: 24 responses to 3 problems, 2 files\n")
    assert "23 responses scored in" in out  # the unfinished one is not judged
    [header, *rows] = block(out, "latency of a call")
    assert header.split()[:4] == ["calls", "samples/call", "p50", "ms"]
    assert [row.split()[:3] for row in rows] == [[name, "2", "11.5"] for name in ("adds_up", "lenient", "length")]
    scores = block(out, "scores")
    assert scores[0] == "adds_up: mean 0.364, 22 scores, 1 not applicable, 0 failed"
    assert [line.split()[0::2] for line in scores[1:3]] == [["0", "14"], ["1", "8"]]
    assert "lenient: mean 0.478, 23 scores, 0 not applicable, 0 failed" in scores
    assert "length: mean -0.357, 23 scores, 0 not applicable, 0 failed" in scores
    assert block(out, "against the stored scores") == [
        "adds_up: 3 of 23 scores differ from the stored ones; first: problem `p0`, sample 3: 1 then, 0 now",
        "lenient: not in the rollouts",
        "length: not in the rollouts",
    ]
    disagreements = block(out, "disagreements between rewards")
    assert disagreements[0] == "adds_up / lenient: 86.4% of 22 alike; only adds_up 0, only lenient 3"
    assert disagreements[1] == "problem `p0`, sample 3, gold answer 1: adds_up 0, lenient 1, length -0.5"
    assert disagreements[2:] == ["  > 0+1", "  > <think>sum</think>11"]  # `length` is no verdict
    verdicts = [line for line in block(out, "samples by the verdict of adds_up") if " of 23" in line]
    assert verdicts == ["right: 8 of 23", "wrong: 14 of 23", "not applicable: 1 of 23", "failed: 0 of 23"]


@pytest.mark.parametrize("on", ["run", "run/rollouts", "run/rollouts/rl"])
def test_any_folder_of_the_run(command: Command, on: str) -> None:
    assert command("--stage", "rl", "--limit", "1", on=on).startswith("stage rl: 4 responses to 1 problems, 2 files")


def test_the_stage_is_the_one_the_folder_is_named_after(command: Command) -> None:
    assert command(on="run/rollouts/held_out").startswith("stage held_out: 4 responses to 1 problems, 1 files")
    assert command(on="run/rollouts/held_out/eval_000000.parquet").startswith("stage held_out: 4 responses")
    assert command("--stage", "held_out").startswith("stage held_out: 4 responses")


def test_an_evaluation_within_an_rl_stage_has_its_own_rewards(command: Command, run: Path) -> None:
    write(run / "run" / "rollouts" / "rl" / "eval_000000.parquet", 0, [(1, ["2", "3"])])
    evaluation = json.dumps({"every": 1, "problems": SOURCE, "sampling": SAMPLING, "rewards": functions("lenient")})
    out = command("--set", f"stages.0.evaluation={evaluation}", on="run/rollouts/rl/eval_000000.parquet")
    assert out.startswith("stage rl: 2 responses to 1 problems, 1 files")
    assert [line.split(":")[0] for line in block(out, "scores") if "mean" in line] == ["lenient"]


def test_a_reader_that_has_seen_enough_is_no_error(run: Path) -> None:
    """As with `| head -1`: the reader is gone after the first line."""
    command = [sys.executable, "-m", "recipes.cli", "rewards", "test", str(run / "recipe.yaml"), "--on", str(run / "run")]
    root = Path(cli.__file__).resolve().parents[1]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith("stage rl")
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=30) == 0


@pytest.mark.parametrize("on_failure", ["drop", "zero", "stop"])
def test_failures_are_shown_and_stop_nothing(command: Command, on_failure: str) -> None:
    rewards = json.dumps({**functions("fragile"), "on_failure": on_failure})
    out = command("--set", f"stages.0.rewards={rewards}")
    assert "fragile: mean 1.000, 20 scores, 0 not applicable, 3 failed" in out
    assert block(out, "failures") == [
        "2 x reward `fragile`, problem `p2`, sample 3: its process ended with exit code 3",
        "1 x reward `fragile`, problem `p1`, sample 2: ValueError: no sevens (task.py:19)",
    ]
    assert "failed: 3 of 23" in out


def test_latency_is_what_a_call_takes(command: Command) -> None:
    out = command("--set", f"stages.0.rewards={json.dumps(functions('slow', batch=4))}")
    [row] = block(out, "latency of a call")[1:]
    _, calls, samples, p50, *_, per_sample = row.split()
    assert (calls, samples) == ("5", "4.6")
    assert 50 <= float(p50) < 500
    assert 10.8 <= float(per_sample) < 110  # five calls for 23 samples


@pytest.mark.parametrize(
    ("arguments", "on", "expected"),
    [
        ((), "missing", "no such folder; give a run folder or its rollouts/STAGE folder"),
        ((), "run/none.parquet", "no such file"),
        ((), ".", "no train_*.parquet of stage `rl` in it"),
        (("--stage", "held"), "run", "--stage: no stage `held` with rewards; choose one of rl, held_out"),
        (("--set", "stages.0.problems.args={count: 2}"), "run", "1 of 3 problems are not in the source of stage `rl`, the first is `p2`"),
        (("--set", "stages.0.rewards.functions=[{function: exact_answr}]"), "run", "did you mean `exact_answer`?"),
    ],
)
def test_mistakes_are_one_line(command: Command, arguments: tuple[str, ...], on: str, expected: str) -> None:
    assert expected in command(*arguments, on=on, code=2)


def test_a_file_that_is_no_rollout_file(command: Command, run: Path) -> None:
    (run / "run" / "rollouts" / "rl" / "train_000002.parquet").write_text("not parquet")
    assert "train_000002.parquet: not a rollout file" in command(code=2)


def test_a_problem_drawn_twice_is_two_groups(run: Path) -> None:
    problems = {
        f"p{number}": Problem(id=f"p{number}", messages=({"role": "user", "content": "?"},), prompt_ids=(1,)) for number in range(3)
    }
    groups = _groups(run / "run" / "rollouts" / "rl" / "train_000001.parquet", problems, "rl")
    assert [(group.problem.id, len(group.trajectories), len(rows)) for group, rows in groups] == [("p0", 4, 4), ("p0", 4, 4), ("p2", 4, 4)]


def test_percentiles() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1.0, 50.0, 99.0, 100.0]
    assert percentile([3.0], 0.99) == 3.0


def test_histogram_of_many_values_has_ten_ranges() -> None:
    lines = score_histogram("r", [index / 99 for index in range(100)] + [None, None], 1)
    assert lines[0] == "r: mean 0.500, 100 scores, 1 not applicable, 1 failed"
    assert [line.rsplit(maxsplit=1)[1] for line in lines[1:]] == ["10"] * 10


class TestNew:
    def test_what_it_writes_works(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        """Its own test passes, and the recipe line in its README scores in isolation."""
        monkeypatch.chdir(tmp_path)
        assert cli.main(["rewards", "new", "my_reward"]) == 0
        readme = (tmp_path / "my_reward" / "README.md").read_text()
        assert capsys.readouterr().out == readme
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_reward.py"]
        environment = {"PYTHONPATH": str(Path(cli.__file__).resolve().parents[1])}
        done = subprocess.run(command, cwd=tmp_path / "my_reward", env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "6 passed" in done.stdout, done.stdout + done.stderr

        lines = [line for line in readme.splitlines() if line.startswith("    ")]
        rewards = RewardsConfig.model_validate(yaml.safe_load("\n".join(lines))["rewards"])
        problem = Problem(id="p", messages=({"role": "user", "content": "6*7?"},), prompt_ids=(1,), answer="42")
        trajectories = tuple(
            Trajectory(problem_id="p", sample_index=i, token_ids=(1,), logprobs=(0.0,), segments=(), finish_reason="stop", text=text)
            for i, text in enumerate(["<think>6*7</think>42", "41", ""])
        )
        with RewardPool(rewards, tmp_path / "my_reward") as pool:
            [group] = Scorer(rewards, pool.run).score([Group(problem=problem, trajectories=trajectories)])
        assert [t.reward for t in group.trajectories] == [1.0, 0.1, 0.0]

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("my-reward", "not a name for a Python function"),
            ("class", "not a name for a Python function"),
            ("../up", "not a name for a Python function"),
            ("math", "a built-in reward has this name"),
            ("there", "exists already"),
        ],
    )
    def test_mistakes(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, message: str
    ) -> None:
        (tmp_path / "there").mkdir()
        monkeypatch.chdir(tmp_path)
        assert cli.main(["rewards", "new", name]) == 2
        assert message in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == [tmp_path / "there"]
