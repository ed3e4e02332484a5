"""Images from problems to rollout requests and to packs: encoded once, whoever shows them."""

from __future__ import annotations

import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from bregman.types import Group, ImagePatches, Problem, Segment, Trajectory
from rl.batches import assign_advantages, minibatches
from rl.opmd import opmd_advantages

PLACEHOLDER = 9


def image(value: float) -> ImagePatches:
    return ImagePatches(pixels=np.full((8, 3, 2, 2), value, dtype=np.float32), grid=(2, 4), num_tokens=2)


def problem(name: str, *images: ImagePatches) -> Problem:
    places = tuple(place for number in range(len(images)) for place in (1 + 3 * number, 2 + 3 * number))
    prompt = (1, *(PLACEHOLDER, PLACEHOLDER, 2) * len(images), 3)
    return Problem(id=name, messages=(), prompt_ids=prompt, images=images, patches=images, image_positions=places)


def scored(one: Problem, k: int = 3) -> Group:
    """Responses of 1, 2, ... tokens, among them the placeholder, which a policy may sample; only the first is right."""
    trajectories = tuple(
        Trajectory(
            problem_id=one.id,
            sample_index=index,
            token_ids=(PLACEHOLDER,) * index + (0,),
            logprobs=(-1.0,) * (index + 1),
            segments=(Segment(policy_version=0, length=index + 1),),
            finish_reason="stop",
            text="",
            reward=float(index == 0),
            reward_parts={"right": float(index == 0)},
        )
        for index in range(k)
    )
    return Group(problem=one, trajectories=trajectories)


@pytest.mark.parametrize("token_budget", [1000, 14])
def test_responses_share_the_images_of_their_problem(token_budget: int) -> None:
    two, text, one = problem("two", image(0.0), image(1.0)), problem("text"), problem("one", image(2.0))
    advantages = partial(opmd_advantages, baseline="mean", tau=1.0)
    groups = assign_advantages([scored(p) for p in (two, text, one)], advantages, drop_truncated=True)
    settings = {"steps": 1, "num_ranks": 1, "temperature": 1.0, "seed": 0, "total_responses": 9}
    (packs,) = minibatches(groups, token_budget=token_budget, **settings)
    assert (len(packs) == 1) == (token_budget == 1000)
    for batch in packs:
        if batch.pixel_values is None:
            assert batch.image_rows is None and not (batch.token_ids == PLACEHOLDER)[~batch.loss_mask].any()
            continue
        values = batch.pixel_values[:, 0, 0, 0].reshape(-1, 8)[:, 0]
        assert len(set(values.tolist())) == len(values)  # each distinct image once
        assert not batch.loss_mask[batch.image_positions].any()
        in_prompts = (batch.token_ids == PLACEHOLDER) & ~batch.loss_mask
        assert in_prompts.nonzero()[:, 0].tolist() == batch.image_positions.tolist()
        shown = values[batch.image_rows // 2]
        prompts = [(start, stop) for start, stop in zip(batch.boundaries[:-1].tolist(), batch.boundaries[1:].tolist(), strict=True)]
        for start, stop in prompts:
            inside = (batch.image_positions >= start) & (batch.image_positions < stop)
            assert shown[inside].tolist() in ([0.0, 0.0, 1.0, 1.0], [2.0, 2.0], [])
    if token_budget == 1000:
        assert packs[0].image_grid.tolist() == [[2, 4]] * 3


def test_requests_carry_patches_that_travel_once() -> None:
    from bregman.engines.config import ClusterConfig, EngineConfig, SamplingConfig
    from bregman.engines.rollout_workers import RolloutWorkers

    engine = EngineConfig(max_model_len=64)
    workers = RolloutWorkers(Path("unused"), engine, ClusterConfig(), tokenizer=None, stop_token_ids=(0,))  # type: ignore[arg-type]
    one = problem("one", replace(image(1.0), pixels=np.ones((400, 3, 14, 14), dtype=np.float32)))
    requests = workers._requests([one, problem("text")], SamplingConfig(num_samples=16, max_tokens=8), seed=0)
    assert all(request.images == one.patches and request.image_positions == one.image_positions for request in requests[0])
    assert all(request.images == () and request.image_positions == () for request in requests[1])
    size = len(pickle.dumps(requests))
    assert one.patches[0].pixels.nbytes < size < 1.1 * one.patches[0].pixels.nbytes
