"""GRPO's gradient is TRL's, for responses of unequal length, on-policy and where ratios are clipped."""

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bregman.data.config import PythonSource
from bregman.data.sources import read_problems
from bregman.models.config import TinyQwen3Config
from bregman.models.loading import hide_cuda_builds
from bregman.models.tiny.make import make_tiny_qwen3
from bregman.types import Group, Segment, Trajectory
from recipes.models import load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

pytestmark = pytest.mark.filterwarnings("ignore:TRL currently supports vLLM")


@pytest.fixture(scope="module")
def rl_step():
    hide_cuda_builds()
    pytest.importorskip("trl")
    import rl_step

    return rl_step


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradient") / "model"
    make_tiny_qwen3(TinyQwen3Config(alphabet="0123456789+-*=?", hidden_size=64, num_layers=2, initializer_range=0.1), 0, folder)
    return folder


@pytest.fixture(scope="module")
def groups(rl_step, model):
    source = PythonSource(path="task.py:train_problems", args={"count": 3})
    problems = read_problems(source, rl_step.RECIPE.parent, load_tokenizer(model), seed=0, max_prompt_tokens=64)
    rng = random.Random(0)
    return [Group(problem=problem, trajectories=tuple(_trajectory(problem, index, rng) for index in range(4))) for problem in problems]


def _trajectory(problem, index, rng):
    length = rng.randint(1, 20)
    return Trajectory(
        problem_id=problem.id,
        sample_index=index,
        token_ids=tuple(rng.randrange(4, 20) for _ in range(length)),
        logprobs=(0.0,) * length,
        segments=(Segment(policy_version=0, length=length),),
        finish_reason="stop",
        text="",
        reward=rng.random(),
    )


def test_gradients_agree(rl_step, model, groups):
    differences = rl_step.check_gradients(model, groups)
    assert set(differences) == {"on-policy", "off-policy"}
    assert max(differences.values()) < 1e-4


def test_the_off_policy_case_clips(rl_step, model, groups, monkeypatch):
    clipped, _ = rl_step.bregman_gradient(model, groups, disturbance=0.1)
    monkeypatch.setattr(rl_step, "CLIP", 1e6)
    free, _ = rl_step.bregman_gradient(model, groups, disturbance=0.1)
    assert rl_step.relative_difference(clipped, free) > 0.01


def test_another_gradient_is_noticed(rl_step, model, groups, monkeypatch):
    worse = [replace(group, trajectories=tuple(replace(t, reward=t.reward**2) for t in group.trajectories)) for group in groups]
    real = rl_step.bregman_gradient
    monkeypatch.setattr(rl_step, "bregman_gradient", lambda model, groups, disturbance: real(model, worse, disturbance))
    with pytest.raises(RuntimeError, match="on-policy: the gradients differ"):
        rl_step.check_gradients(model, groups)
