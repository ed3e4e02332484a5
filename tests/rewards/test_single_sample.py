"""The single-sample form: what a function sees, what it may return, and that a fault costs one sample."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from bregman.errors import RewardError
from bregman.types import Group, Problem, Trajectory
from rewards.call import Failure, Sample
from rewards.config import RewardConfig, RewardsConfig
from rewards.pool import RewardPool
from rewards.sample import RewardSample, call_each, is_single_sample, sample_parameters, single_sample
from rewards.scorer import samples_of

PLUGIN = """
import asyncio, os, time
from rewards.sample import RewardSample, single_sample

@single_sample
def looks(sample: RewardSample, bonus: float = 0.0) -> float | None:
    if sample.completion == "none": return None
    if sample.completion == "raise": raise ValueError("bad luck")
    if sample.completion == "text": return "1.0"
    if sample.completion == "die": os._exit(3)
    if sample.completion == "fork" and os.fork() == 0: return 0.25
    return float(sample.final == sample.answer) + bonus + len(sample.images)

@single_sample
async def slow(sample: RewardSample) -> float:
    if sample.completion == "raise": raise ValueError("bad luck")
    await asyncio.sleep(0.3)
    return float(sample.columns["digits"])

@single_sample
def needs(sample: RewardSample, threshold: float) -> float:
    return threshold
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single")
    (path / "plugin.py").write_text(PLUGIN)
    return path


def samples(*texts: str, **columns: Any) -> list[Sample]:
    prompt = ({"role": "user", "content": "?"},)
    return [
        Sample(problem_id="p", sample_index=i, prompt=prompt, completion=text, completion_ids=(1, 2), columns={"answer": "9", **columns})
        for i, text in enumerate(texts)
    ]


def run(folder: Path, name: str, of: list[Sample], **settings: Any) -> list[Any]:
    rewards = RewardsConfig(functions=[RewardConfig(function=f"plugin.py:{name}", **settings)])
    with RewardPool(rewards, folder) as pool:
        return pool.run(of)[0]


def test_what_it_sees() -> None:
    seen: list[RewardSample] = []

    @single_sample
    def reward(sample: RewardSample) -> float:
        seen.append(sample)
        return 1.0

    call_each(reward, samples("<think>a</think>9", digits="12", images=["i"]), {}, None, asyncio.new_event_loop())
    [sample] = seen
    assert (sample.prompt, sample.completion) == (({"role": "user", "content": "?"},), "<think>a</think>9")
    assert (sample.thinking, sample.final, sample.answer) == ("a", "9", "9")
    assert (sample.columns["digits"], sample.images, sample.completion_ids) == ("12", ("i",), (1, 2))


def test_only_marked_functions_are_single_sample() -> None:
    assert is_single_sample(single_sample(lambda sample: 1.0))
    assert not is_single_sample(lambda sample: 1.0)


def test_faults_cost_one_sample(folder: Path) -> None:
    texts = ("<think>a</think>9", "8", "none", "raise", "text", "die", "fork", "9")
    outcomes = run(folder, "looks", samples(*texts), args={"bonus": 0.5})
    assert [outcomes[i] for i in (0, 1, 2, 6, 7)] == [1.5, 0.5, None, 0.5, 1.5]
    assert outcomes[3] == Failure("ValueError: bad luck (plugin.py:8)")
    assert outcomes[4] == Failure("returned '1.0' (str), expected a number or None")
    assert outcomes[5] == Failure("its process ended with exit code 3")


def test_async_samples_run_side_by_side(folder: Path) -> None:
    """Twenty waits of 0.3 s within one call of at most 3 s; one by one they would need 6 s."""
    outcomes = run(folder, "slow", samples("raise", *["9"] * 20, digits=4), timeout=3.0)
    assert outcomes == [Failure("ValueError: bad luck (plugin.py:16)"), *[4.0] * 20]


def test_an_async_fault_does_not_end_the_call() -> None:
    """The others need not be judged again."""

    @single_sample
    async def reward(sample: RewardSample) -> float:
        return {"good": 1.0}[sample.completion]

    outcomes = call_each(reward, samples("good", "bad", "good"), {}, __file__, asyncio.new_event_loop())
    assert outcomes[::2] == [1.0, 1.0]
    assert isinstance(outcomes[1], Failure) and outcomes[1].text.startswith("KeyError: 'bad' (test_single_sample.py:")


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("needs", {}, "missing a required argument: 'threshold'; its args are `threshold`"),
        ("looks", {"bonis": 1.0}, "unexpected keyword argument 'bonis'; its args are `bonus`"),
        ("slow", {"x": 1}, "it takes the sample and no args"),
    ],
)
def test_wrong_args_show_when_it_is_loaded(folder: Path, name: str, args: dict[str, float], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        run(folder, name, samples("9"), args=args)


def test_no_parameter_for_the_sample() -> None:
    with pytest.raises(RewardError, match="it takes the sample and no args"):
        sample_parameters(single_sample(lambda: 1.0), {})


def test_images_pass_through(folder: Path) -> None:
    """From the problem into the sample; a problem without images in the same batch has none."""

    def group(name: str, images: tuple[Any, ...]) -> Group:
        trajectory = Trajectory(
            problem_id=name, sample_index=0, token_ids=(1,), logprobs=(0.0,), segments=(), finish_reason="stop", text="9"
        )
        problem = Problem(id=name, messages=({"role": "user", "content": "?"},), prompt_ids=(1,), answer="9", images=images)
        return Group(problem=problem, trajectories=(trajectory,))

    found = samples_of([group("a", (b"one", b"two")), group("b", ())])
    assert [sample.columns["images"] for sample in found] == [[b"one", b"two"], None]
    assert run(folder, "looks", found) == [3.0, 1.0]
