"""Kimi-VL in the learner: every trained parameter gets a gradient, frozen parts stay, ranks with and without images agree."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from kimi_vl_cases import arguments, image, make_model, nll_loss, one_pack, sequence
from safetensors.torch import load_file

from bregman.data.packing import pack
from bregman.engines import sharding
from bregman.engines.config import AdamWConfig, LearnerConfig, ModelPart, ModelTraining, MuonConfig
from bregman.engines.fsdp2_learner import FSDP2Learner
from bregman.engines.weight_sync import read_tensors
from bregman.errors import RecipeError
from bregman.models.expert_load import ExpertLoad
from bregman.models.loading import load_policy
from bregman.models.parts import part_of
from bregman.types import PackedBatch

OPTIMIZER = AdamWConfig(learning_rate=1e-3, eps=1e-4, weight_decay=0.1, max_grad_norm=0.5)
PARTS: list[ModelPart] = ["vision_tower", "projector", "language_model"]


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "kimi")


def learner(
    model: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    training: dict[str, Any] | None = None,
    optimizer: AdamWConfig | MuonConfig = OPTIMIZER,
    **settings: Any,
) -> FSDP2Learner:
    made = FSDP2Learner(LearnerConfig(**settings), rank=rank, world_size=world_size, device=torch.device("cpu"))
    made.begin_stage(model, optimizer, training=ModelTraining(**training or {}))
    return made


def with_images() -> list[PackedBatch]:
    shown = image(4, 4)
    sequences = [sequence(shown, image(2, 6), text=40), sequence(shown, text=50, seed=1), sequence(text=60, seed=2)]
    return pack(sequences, token_budget=1000, normalizer=50.0)


def text_only() -> list[PackedBatch]:
    return pack([sequence(text=30, seed=3), sequence(text=25, seed=4)], token_budget=1000, normalizer=50.0)


def weights(made: FSDP2Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in made._sharded.full_weights(keep=True).items()}


def gradients(made: FSDP2Learner) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in made._sharded.policy.named_parameters() if p.grad is not None}
    return {name: gradient.full_tensor() for name, gradient in found.items()}


@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16"}, {"activation_checkpointing": True}], ids=str)
@pytest.mark.parametrize("train", [None, ["projector"], ["vision_tower", "language_model"]], ids=str)
def test_every_parameter_of_a_trained_part_gets_a_gradient(model: Path, train: list[ModelPart] | None, settings: dict) -> None:
    made = learner(model, training={"train": train}, **settings)
    made._accumulate(with_images(), nll_loss)
    found = gradients(made)
    wanted = {name for name, _ in made._sharded.policy.named_parameters() if part_of(name) in (train or PARTS)}
    assert found.keys() == wanted
    assert [name for name, gradient in found.items() if not 0 < float(gradient.abs().max()) < float("inf")] == []
    experts = [gradient.flatten(1).abs().amax(1) for name, gradient in found.items() if ".experts." in name]
    assert all(bool((each > 0).all()) for each in experts)


def test_checkpointed_activations_give_the_same_bits(model: Path) -> None:
    plain, recomputing = learner(model), learner(model, activation_checkpointing=True)
    first, second = (made.step(with_images(), nll_loss, 1e-3) for made in (plain, recomputing))
    assert first.metrics == second.metrics
    one, two = weights(plain), weights(recomputing)
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.mark.parametrize("train", [["vision_tower"], ["projector"], ["language_model"], ["vision_tower", "projector"]], ids=str)
def test_frozen_parts_do_not_change(model: Path, train: list[ModelPart]) -> None:
    made = learner(model, training={"train": train})
    before = weights(made)
    for batches in (with_images(), text_only()):
        made.step(batches, nll_loss, 1e-3)
    after = weights(made)
    changed = {part_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(train)
    assert {part_of(name) for name in made._optimizer._state} == set(train)


def test_a_text_model_has_no_vision_side(tmp_path: Path) -> None:
    from bregman.models.config import TinyQwen3Config
    from bregman.models.tiny.make import make_tiny_qwen3

    make_tiny_qwen3(TinyQwen3Config(alphabet="01", num_layers=1), 0, tmp_path / "text")
    with pytest.raises(RecipeError, match="this model has no vision_tower, only language_model"):
        learner(tmp_path / "text", training={"train": ["language_model", "vision_tower"]})
    policy = load_policy(tmp_path / "text")
    with pytest.raises(ValueError, match="the pack has images and .* is a text model"):
        policy(**arguments(one_pack(sequence(image(2, 2)))))


def test_published_and_exported_weights_have_the_names_on_disk(model: Path, tmp_path: Path) -> None:
    made = learner(model, training={"router_bias_rate": 0.25})
    made.step(with_images(), nll_loss, 1e-3)
    handle = made.publish_weights()
    assert handle is not None
    published = {name: tensor.clone() for name, tensor in read_tensors(handle)}
    made.close()
    made.export(tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    start = load_file(model / "model.safetensors")
    assert published.keys() == exported.keys() == start.keys()
    assert [name for name in exported if not torch.equal(exported[name], published[name])] == []
    assert [name for name in exported if torch.equal(exported[name], start[name])] == []  # all trained, the router bias too
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {path.name for path in model.iterdir()} <= names
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "kimi_vl" and config["text_config"]["rope_theta"] == 10_000.0
    again = load_policy(tmp_path / "out").model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights(made).items())


# Router bias --------------------------------------------------------------------------------------------------------------------------


class Router(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("e_score_correction_bias", torch.tensor([0.0, 1.0, 2.0, -1.0]))

    def forward(self, chosen: torch.Tensor) -> tuple[None, None, torch.Tensor]:
        return None, None, chosen


def test_the_router_bias_moves_against_the_load() -> None:
    router = Router()
    load = ExpertLoad(torch.nn.Sequential(router))
    router(torch.tensor([[0, 1], [0, 3], [0, 1]]))
    with torch.no_grad():
        router(torch.tensor([[2, 2]]))  # no backward pass: not counted
    router(torch.tensor([[1, 3]]))
    assert load.counts() == [3, 3, 0, 2]
    assert load.balance([3.0, 3.0, 0.0, 2.0], rate=0.0) == {"moe/load_max_over_mean": 1.5, "moe/load_min_over_mean": 0.0}
    assert router.get_buffer("e_score_correction_bias").tolist() == [0.0, 1.0, 2.0, -1.0]
    load.balance([3.0, 3.0, 0.0, 2.0], rate=0.25)
    assert router.get_buffer("e_score_correction_bias").tolist() == [-0.25, 0.75, 2.25, -1.0]
    load.clear()
    assert load.counts() == [0, 0, 0, 0]
    assert load.balance([0.0] * 4, rate=1.0) == {}


def test_the_bias_evens_out_the_load_and_stays_without_a_rate(model: Path) -> None:
    kept, balanced = learner(model), learner(model, training={"router_bias_rate": 0.03})
    for made in (kept, balanced):
        for module in made._sharded.policy.modules():
            if hasattr(module, "e_score_correction_bias"):
                module.e_score_correction_bias[0] = 0.4
    before = weights(kept)
    uneven = [made.step(with_images(), nll_loss, 1e-12).metrics["moe/load_max_over_mean"] for made in (kept, balanced)]
    assert uneven[0] == uneven[1] > 1.5
    for _ in range(20):
        stats = balanced.step(with_images(), nll_loss, 1e-12)
    assert stats.metrics["moe/load_max_over_mean"] < 1 + (uneven[0] - 1) / 2
    bias = next(name for name in before if name.endswith("e_score_correction_bias"))
    assert torch.equal(weights(kept)[bias], before[bias])
    assert not torch.equal(weights(balanced)[bias], before[bias])


def test_a_checkpoint_holds_the_router_bias(model: Path, tmp_path: Path) -> None:
    made = learner(model, training={"router_bias_rate": 0.25})
    made.step(with_images(), nll_loss, 1e-3)
    (tmp_path / "c").mkdir()
    made.save_checkpoint(tmp_path / "c")
    expected = weights(made)
    other = learner(model)
    other.load_checkpoint(tmp_path / "c")
    found = weights(other)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_muon_with_frozen_parts_goes_on_from_a_checkpoint(model: Path, tmp_path: Path) -> None:
    """The projector at twice the rate, the encoder frozen; two steps in a row are one step, a checkpoint and another."""
    settings: dict[str, Any] = {
        "training": {"train": ["projector", "language_model"], "router_bias_rate": 0.01},
        "optimizer": MuonConfig(learning_rate=1e-3, learning_rates={"projector": 2e-3}),
    }
    made = learner(model, **settings)
    before = weights(made)
    made.step(with_images(), nll_loss, 1e-3)
    (tmp_path / "c").mkdir()
    made.save_checkpoint(tmp_path / "c")
    made.step(text_only() + with_images(), nll_loss, 1e-3)
    other = learner(model, **settings)
    other.load_checkpoint(tmp_path / "c")
    other.step(text_only() + with_images(), nll_loss, 1e-3)
    expected, found = weights(made), weights(other)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert {part_of(name) for name in before if not torch.equal(before[name], expected[name])} == {"projector", "language_model"}


# Ranks --------------------------------------------------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "gathered at once": {"training": {"router_bias_rate": 0.01}},
    "gathered layer by layer": {"per_layer": True, "activation_checkpointing": True},
    "only the projector": {"per_layer": True, "training": {"train": ["projector"]}},
}


def steps(model: Path, case: dict[str, Any], rank: int, world_size: int) -> dict[str, Any]:
    """Two steps, log-probabilities first; the rank that has the images changes from step to step."""
    settings = dict(case)
    sharding.SMALL_MODEL = 0 if settings.pop("per_layer", False) else 50_000_000
    made = learner(model, rank=rank, world_size=world_size, **settings)
    batches = [*with_images(), *text_only()]
    trace = []
    for order in (batches, batches[::-1]):
        mine = order[rank::world_size]
        reference = made.begin_iteration([mine], reset_optimizer=False)[0]
        stats = made.step(mine, nll_loss, 1e-3)
        sums = torch.tensor([float(logprobs.sum()) for logprobs, _ in reference]).sum()
        dist.all_reduce(sums)
        trace.append((stats.loss, stats.grad_norm, float(sums), *(value for _, value in sorted(stats.metrics.items()))))
    return {"trace": trace, "weights": {name: tensor.numpy() for name, tensor in weights(made).items()}}


def _rank(rank: int, model: Path, store: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 2), rank=rank, world_size=2, timeout=timedelta(seconds=90))
    found = {name: steps(model, case, rank, 2) for name, case in CASES.items()}
    dist.barrier()
    dist.destroy_process_group()
    return found


def test_images_on_one_rank_only_give_the_step_of_one_rank(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "SMALL_MODEL", sharding.SMALL_MODEL)  # `steps` changes it
    other = torch.multiprocessing.get_context("spawn").Process(target=_rank, args=(1, model, tmp_path / "store"), daemon=True)
    other.start()
    expected = {name: steps(model, case, 0, 1) for name, case in CASES.items()}
    dist.destroy_process_group()
    try:
        found = _rank(0, model, tmp_path / "store")
    finally:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # as this module's other tests have it
    other.join(timeout=30)
    assert other.exitcode == 0
    for name, alone in expected.items():
        np.testing.assert_allclose(found[name]["trace"], alone["trace"], rtol=2e-5, err_msg=name)
        for weight, value in alone["weights"].items():
            np.testing.assert_allclose(found[name]["weights"][weight], value, atol=5e-6, rtol=1e-4, err_msg=f"{name}: {weight}")
