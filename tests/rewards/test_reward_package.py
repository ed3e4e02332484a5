"""examples/reward_package is installed as a user would, without network, and used by its entry point's name."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bregman.errors import RewardError
from bregman.types import Group, Problem, Trajectory
from rewards.config import RewardsConfig
from rewards.pool import RewardPool
from rewards.scorer import Scorer

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "reward_package"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for packages with the example in it. It is built from a copy: a build leaves files beside the source."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(EXAMPLE, folder / "source", ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--disable-pip-version-check", "--target", str(folder / "site"), str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def score(folder: Path, gold: str, *texts: str, **settings: object) -> list[float | None]:
    rewards = RewardsConfig.model_validate({"functions": [{"function": "unit_answer", **settings}]})
    trajectories = tuple(
        Trajectory(problem_id="p", sample_index=i, token_ids=(1,), logprobs=(0.0,), segments=(), finish_reason="stop", text=text)
        for i, text in enumerate(texts)
    )
    problem = Problem(id="p", messages=({"role": "user", "content": "How long?"},), prompt_ids=(1,), answer=gold)
    with RewardPool(rewards, folder) as pool:
        [group] = Scorer(rewards, pool.run).score([Group(problem=problem, trajectories=trajectories)])
    assert [t.reward_error for t in group.trajectories if t.reward_parts["unit_answer"] is not None and t.reward_error] == []
    return [t.reward_parts["unit_answer"] for t in group.trajectories]


def test_installed_package(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(site))  # reward processes inherit it
    texts = ("<think>1 km + 500 m</think>1.5 km", "1500 m", "150000cm", "1.5 m", "1500", "none")
    assert score(tmp_path, "1500 m", *texts, args={"no_unit": 0.2}) == [1.0, 1.0, 1.0, 0.0, 0.2, 0.0]
    assert score(tmp_path, "1500 m", "1501 m", args={"tolerance": 0.01}) == [1.0]
    assert score(tmp_path, "blue", "blue") == [None]


def test_unknown_until_it_is_installed(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="no built-in or installed reward of this name"):
        score(tmp_path, "1500 m", "1500 m")
