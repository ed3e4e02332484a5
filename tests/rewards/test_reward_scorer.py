"""Combining parts into rewards, the policy on failures, and what a reward function gets to see."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from bregman.errors import RewardError
from bregman.types import FinishReason, Group, Problem, Trajectory
from rewards.call import Failure, Outcome, Sample
from rewards.config import RewardConfig, RewardsConfig
from rewards.pool import RewardPool
from rewards.scorer import Scorer, part_names, samples_of


def group(problem_id: str, *texts: str, answer: str | None = "9", finish: FinishReason = "stop", **columns: object) -> Group:
    messages = ({"role": "system", "content": "think"}, {"role": "user", "content": "616=9?"})
    problem = Problem(id=problem_id, messages=messages, prompt_ids=(1, 2), answer=answer, columns=columns)
    trajectories = tuple(
        Trajectory(
            problem_id=problem_id, sample_index=i, token_ids=(5, 6, i), logprobs=(0.0,) * 3, segments=(), finish_reason=finish, text=text
        )
        for i, text in enumerate(texts)
    )
    return Group(problem=problem, trajectories=trajectories)


def rewards(*weights: float, on_failure: str = "drop") -> RewardsConfig:
    functions = [RewardConfig(function="exact_answer", name=f"f{i}", weight=weight) for i, weight in enumerate(weights)]
    return RewardsConfig(functions=functions, on_failure=on_failure)  # type: ignore[arg-type]


def score_one(config: RewardsConfig, *outcomes: Outcome) -> Trajectory:
    def run(samples: Sequence[Sample]) -> list[list[Outcome]]:
        assert len(samples) == 1
        return [[outcome] for outcome in outcomes]

    return Scorer(config, run).score([group("p", "text")])[0].trajectories[0]


BAD = Failure("ValueError: no (plugin.py:3)")
WHO = "reward `f{}`, problem `p`, sample 0: ValueError: no (plugin.py:3)"
TOTALS = [
    # weights, policy, outcomes -> reward, parts, error
    ((1.0,), "drop", (0.5,), 0.5, (0.5,), ""),
    ((1.0, 0.5), "drop", (1.0, 1.0), 1.5, (1.0, 1.0), ""),
    ((2.0, -1.0), "drop", (1.0, 3.0), -1.0, (1.0, 3.0), ""),
    ((1.0, 0.5), "drop", (None, 1.0), 0.5, (None, 1.0), ""),
    ((1.0, 0.0), "drop", (1.0, 7.0), 1.0, (1.0, 7.0), ""),
    ((0.0,), "drop", (1.0,), 0.0, (1.0,), ""),
    ((1.0, 1.0), "drop", (None, None), None, (None, None), "no reward applied to problem `p`, sample 0"),
    ((1.0, 0.0), "drop", (None, 1.0), None, (None, 1.0), "no reward applied to problem `p`, sample 0"),
    ((1.0, 1.0), "drop", (1.0, BAD), None, (1.0, None), WHO.format(1)),
    ((1.0, 1.0), "zero", (1.0, BAD), 1.0, (1.0, 0.0), WHO.format(1)),
    ((1.0,), "zero", (BAD,), 0.0, (0.0,), WHO.format(0)),
    ((1.0, 0.0), "drop", (1.0, BAD), 1.0, (1.0, None), WHO.format(1)),
    ((1.0, 0.0), "zero", (1.0, BAD), 1.0, (1.0, None), WHO.format(1)),
    ((1.0, 1.0), "drop", (BAD, BAD), None, (None, None), WHO.format(0) + "; " + WHO.format(1)),
]


@pytest.mark.parametrize(("weights", "policy", "outcomes", "reward", "parts", "error"), TOTALS)
def test_total(
    weights: tuple[float, ...],
    policy: str,
    outcomes: tuple[Outcome, ...],
    reward: float | None,
    parts: tuple[float | None, ...],
    error: str,
) -> None:
    trajectory = score_one(rewards(*weights, on_failure=policy), *outcomes)
    assert trajectory.reward == reward
    assert tuple(trajectory.reward_parts.items()) == tuple((f"f{i}", part) for i, part in enumerate(parts))
    assert trajectory.reward_error == error


def test_stop_names_reward_problem_and_sample() -> None:
    with pytest.raises(RewardError, match=r"reward `f1`, problem `p`, sample 0: ValueError: no \(plugin\.py:3\); "):
        score_one(rewards(1.0, 1.0, on_failure="stop"), 1.0, BAD)


def test_part_names() -> None:
    functions = ["exact_answer", "task.py:check", "package.module:check"]
    config = RewardsConfig(functions=[RewardConfig(function=f) for f in functions[:2]])
    assert part_names(config) == ["exact_answer", "check"]
    with pytest.raises(RewardError, match=r"rewards\.functions\[2\]: a second reward named `check`"):
        part_names(RewardsConfig(functions=[RewardConfig(function=f) for f in functions]))
    renamed = [RewardConfig(function="math"), RewardConfig(function="math", name="boxed")]
    assert part_names(RewardsConfig(functions=renamed)) == ["math", "boxed"]


def test_unfinished_and_lost_responses_are_left_alone() -> None:
    groups = [group("a", "x", "y"), group("b", "x", finish="abort"), group("c", "x", finish="error"), group("d", "x", finish="length")]
    seen: list[str] = []

    def run(samples: Sequence[Sample]) -> list[list[Outcome]]:
        seen.extend(sample.problem_id for sample in samples)
        return [[1.0] * len(samples)]

    scored = Scorer(rewards(1.0), run).score(groups)
    assert seen == ["a", "a", "d"]
    assert [[t.reward for t in g.trajectories] for g in scored] == [[1.0, 1.0], [None], [None], [1.0]]
    assert scored[1] == groups[1]


def test_samples_have_the_same_columns_whatever_their_source() -> None:
    samples = samples_of([group("a", "x", digits=[6, 1]), group("b", "y", answer=None, target=3), group("c", "z", answer="no", **{})])
    assert [dict(sample.columns) for sample in samples] == [
        {"answer": "9", "digits": [6, 1], "target": None},
        {"answer": None, "digits": None, "target": 3},
        {"answer": "no", "digits": None, "target": None},
    ]
    own = Problem(id="p", messages=(), prompt_ids=(), answer="gold", columns={"answer": "as in the data"})
    text = group("p", "x").trajectories
    assert samples_of([Group(problem=own, trajectories=text)])[0].columns["answer"] == "as in the data"


SPY = """
import json

def spy(prompts, completions, **columns):
    with open("seen.json", "w") as file:
        json.dump({"prompts": prompts, "completions": completions, **columns}, file, default=lambda value: "callable")
    columns["log_metric"]("name", 1.0)
    columns["log_extra"]("name", [1] * len(prompts))
    return [float(len(ids)) for ids in columns["completion_ids"]]

async def later(completions, factor, **_):
    import asyncio
    await asyncio.gather(*[asyncio.sleep(0.01) for _ in completions])
    return [factor * len(c[0]["content"]) for c in completions]

class Judge:
    async def __call__(self, completions, answer):
        return [float(gold == "9") for gold in answer]

judge = Judge()
"""


def test_functions_see_what_trl_passes(tmp_path: Path) -> None:
    (tmp_path / "spy.py").write_text(SPY)
    functions = [
        RewardConfig(function="spy.py:spy", args={"alpha": 0.5}),
        RewardConfig(function="spy.py:later", args={"factor": 2}),
        RewardConfig(function="spy.py:judge"),
    ]
    config = RewardsConfig(functions=functions)
    with RewardPool(config, tmp_path) as pool:
        scored = Scorer(config, pool.run).score([group("a", "one", "three", digits=[6, 1, 6], prompt="not passed"), group("b", "x")])
    seen = json.loads((tmp_path / "seen.json").read_text())
    prompt = [{"role": "system", "content": "think"}, {"role": "user", "content": "616=9?"}]
    assert seen == {
        "prompts": [prompt] * 3,
        "completions": [[{"role": "assistant", "content": text}] for text in ("one", "three", "x")],
        "completion_ids": [[5, 6, 0], [5, 6, 1], [5, 6, 0]],
        "trainer_state": None,
        "log_extra": "callable",
        "log_metric": "callable",
        "answer": ["9"] * 3,
        "digits": [[6, 1, 6], [6, 1, 6], None],
        "alpha": 0.5,
    }
    parts = [t.reward_parts for g in scored for t in g.trajectories]
    assert parts == [{"spy": 3.0, "later": 2.0 * n, "judge": 1.0} for n in (3, 5, 1)]
