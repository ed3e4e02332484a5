"""Reward workers on a real Ray: order, several reward sets, a dead worker, errors."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bregman.engines import cluster
from bregman.engines.config import ClusterConfig
from bregman.engines.reward_workers import RewardWorkers, split
from bregman.errors import ClusterError, RewardError
from bregman.types import Group, Problem, Trajectory
from rewards.call import Sample
from rewards.config import RewardConfig, RewardsConfig

PLUGIN = """
import os, pathlib, signal, sys, time

def index(prompts, completions, number, **_): return [float(n) for n in number]
def worker(completions, **_): return [float(os.getppid())] * len(completions)
def heavy(completions, **_): return [float(sum(name in sys.modules for name in ("torch", "ray", "vllm")))] * len(completions)
def hangs_on_three(completions, number, **_):
    if 3 in number: time.sleep(600)
    return [1.0] * len(completions)
def kills_its_worker_once(completions, number, **_):
    mark = pathlib.Path(__file__).with_suffix(".killed")
    if 0 in number and not mark.exists():
        mark.touch()
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    return [1.0] * len(completions)
def kills_its_worker(completions, **_):
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def workers() -> Iterator[RewardWorkers]:
    config = ClusterConfig(reward_workers=2, start_timeout=120)
    cluster.start(config)
    workers = RewardWorkers.start(config)
    yield workers
    workers.close()
    cluster.stop()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "plugin.py").write_text(PLUGIN)
    return tmp_path


def groups(count: int, samples: int = 2) -> list[Group]:
    def trajectory(problem: int, sample: int) -> Trajectory:
        return Trajectory(
            problem_id=f"p{problem}",
            sample_index=sample,
            token_ids=(1,),
            logprobs=(0.0,),
            segments=(),
            finish_reason="stop",
            text="<think>a</think>b",
        )

    return [
        Group(
            problem=Problem(id=f"p{i}", messages=({"role": "user", "content": "?"},), prompt_ids=(1,), answer="b", columns={"number": i}),
            trajectories=tuple(trajectory(i, j) for j in range(samples)),
        )
        for i in range(count)
    ]


def rewards(*functions: str, **settings: float) -> RewardsConfig:
    return RewardsConfig(functions=[RewardConfig(function=f, **settings) for f in functions])  # type: ignore[arg-type]


def test_results_in_order_from_both_workers(workers: RewardWorkers, folder: Path) -> None:
    scored = workers.scorer(rewards("plugin.py:index", "plugin.py:worker", "plugin.py:heavy"), folder).score(groups(7))
    assert [g.problem.id for g in scored] == [f"p{i}" for i in range(7)]
    assert [[t.reward_parts["index"] for t in g.trajectories] for g in scored] == [[float(i)] * 2 for i in range(7)]
    assert len({t.reward_parts["worker"] for g in scored for t in g.trajectories}) == 2
    assert {t.reward_parts["heavy"] for g in scored for t in g.trajectories} == {0.0}


def test_one_set_of_workers_serves_several_reward_sets(workers: RewardWorkers, folder: Path) -> None:
    first, second = workers.scorer(rewards("plugin.py:index"), folder), workers.scorer(rewards("exact_answer", "think_format"), folder)
    assert first.score(groups(3))[2].trajectories[0].reward == 2.0
    assert second.score(groups(3))[2].trajectories[0].reward == 2.0
    assert first.score(groups(1))[0].trajectories[1].reward == 0.0  # fewer groups than workers
    assert first.score([]) == []
    workers.release()
    assert first.score(groups(3))[1].trajectories[0].reward == 1.0  # starts again when asked


def test_a_hanging_sample_costs_itself_only(workers: RewardWorkers, folder: Path) -> None:
    scored = workers.scorer(rewards("plugin.py:hangs_on_three", timeout=0.5), folder).score(groups(6, samples=1))
    assert [g.trajectories[0].reward for g in scored] == [1.0, 1.0, 1.0, None, 1.0, 1.0]
    assert scored[3].trajectories[0].reward_error == "reward `hangs_on_three`, problem `p3`, sample 0: no answer within 0.5 s"


def test_a_dead_worker_is_replaced(workers: RewardWorkers, folder: Path) -> None:
    scorer = workers.scorer(rewards("plugin.py:kills_its_worker_once", timeout=30), folder)
    assert [t.reward for g in scorer.score(groups(4)) for t in g.trajectories] == [1.0] * 8
    assert [t.reward for g in scorer.score(groups(4)) for t in g.trajectories] == [1.0] * 8


def test_a_worker_that_dies_again_is_an_error(workers: RewardWorkers, folder: Path) -> None:
    scorer = workers.scorer(rewards("plugin.py:kills_its_worker", timeout=30), folder)
    with pytest.raises(ClusterError, match=r"reward worker 0: score 2 samples, second try: the worker died"):
        scorer.score(groups(1))
    healthy = workers.scorer(rewards("plugin.py:index"), folder)
    assert healthy.score(groups(2))[1].trajectories[0].reward == 1.0


def test_reward_processes_end_with_their_worker(workers: RewardWorkers, folder: Path) -> None:
    scorer = workers.scorer(rewards("plugin.py:worker"), folder)
    actor = int(scorer.score(groups(1))[0].trajectories[0].reward or 0)
    children = [int(path.name) for path in Path("/proc").glob("[0-9]*") if parent_of(path) == actor]
    assert children
    os.kill(actor, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert scorer.score(groups(1))[0].trajectories[0].reward


MISTAKES = [
    ("plugin.py:indx", RewardError, "did you mean `index`?"),
    ("nothing.py:f", RewardError, "no file"),
    ("exact_anser", RewardError, "did you mean `exact_answer`?"),
]


@pytest.mark.parametrize(("function", "kind", "text"), MISTAKES)
def test_mistakes_arrive_as_one_line(workers: RewardWorkers, folder: Path, function: str, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        workers.scorer(rewards(function), folder)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_split_is_even_and_keeps_groups() -> None:
    def sample(problem: int, index: int) -> Sample:
        return Sample(problem_id=f"p{problem}", sample_index=index, prompt=(), completion="", completion_ids=(), columns={})

    samples = [sample(problem, index) for problem in range(5) for index in range(4)]
    parts = split(samples, 2)
    assert [s for part in parts for s in part] == samples
    assert [len(part) for part in parts] == [12, 8]
    assert split(samples[:4], 3) == [samples[:4], [], []]
    assert split([], 2) == [[], []]


def parent_of(process: Path) -> int | None:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return None
