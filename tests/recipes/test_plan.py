"""The memory plan: exact where it counts what is kept, within a third where it estimates activations; full-size recipes print it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from learner_cases import make_model, make_moe, minibatch, policy_loss
from transformers import AutoModelForCausalLM

from bregman.engines.config import AdamWConfig, LearnerConfig, ModelPart, ModelTraining, MuonConfig
from bregman.engines.fsdp2_learner import FSDP2Learner
from bregman.models.kimi_vl.configuration import KimiVLConfig
from bregman.models.kimi_vl.modeling import KimiVLForConditionalGeneration
from bregman.models.loading import load_policy
from bregman.models.meta import meta_model
from bregman.models.policy import PolicyModel
from recipes import cli
from recipes.plan import learner_plan, sizes

FULL_SIZE = Path(__file__).parents[2] / "recipes" / "kimi_vl_thinking"


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_counts_of_kimi_vl_a3b() -> None:
    """The report's numbers: a 16B mixture of experts of which 2.8B are active in the language decoder, a 400M encoder."""
    size = sizes(meta_model(FULL_SIZE / "config.json"))
    assert size.parameters == {"language_model": 15_960_108_544, "vision_tower": 416_866_032, "projector": 30_679_808}
    assert size.experts == 26 * 64 * 3 * 2048 * 1408
    assert size.kv_cache == 512 + 64
    assert 2.8e9 < size.active - 447_545_840 < 3.0e9
    assert size.layers == 27


@pytest.mark.parametrize("make", [make_model, make_moe])
@pytest.mark.parametrize("optimizer", [AdamWConfig(learning_rate=1e-3), MuonConfig(learning_rate=1e-3)])
def test_what_a_rank_keeps_is_exact(make: Any, optimizer: Any, tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    learner = FSDP2Learner(LearnerConfig(), rank=0, world_size=1, device=torch.device("cpu"))
    learner.begin_stage(folder, optimizer)
    learner.step(minibatch(), policy_loss, 1e-3)
    parameters = dict(learner._sharded.policy.named_parameters())
    size = sizes(AutoModelForCausalLM.from_pretrained(folder))
    plan = learner_plan(size, LearnerConfig(), 1, ModelTraining(), optimizer, 100, frozen_copy=False)
    assert plan.parts["weights"] == sum(4 * p.numel() for p in parameters.values())
    assert plan.parts["gradients"] == plan.parts["weights"]
    assert plan.parts["optimizer"] == sum(4 * state.numel() for name in parameters for state in learner._optimizer.state(name).values())


def saved_bytes(model: torch.nn.Module, forward: Callable[[], Any]) -> int:
    """What autograd keeps for the backward pass of `forward`, every storage once, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # or an address could be used twice
        return tensor

    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(seen.values())


def saved_by_text(policy: PolicyModel, tokens: int) -> int:
    ids, ends = torch.arange(tokens) % 20, torch.tensor([0, tokens], dtype=torch.int32)
    return saved_bytes(policy, lambda: policy(ids, torch.arange(tokens), ends))


@pytest.mark.parametrize("make", [make_model, make_moe])
def test_activations_are_estimated_within_a_third(make: Any, tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    size = sizes(AutoModelForCausalLM.from_pretrained(folder))
    policy, tokens = load_policy(folder), 512
    found = saved_by_text(policy, 2 * tokens) - saved_by_text(policy, tokens)  # without what does not grow with tokens
    head = 2 * tokens * 4 * 29  # logits and their softmax, which the plan leaves out: they are taken in chunks at real sizes
    plan = learner_plan(size, LearnerConfig(), 1, ModelTraining(), AdamWConfig(learning_rate=1e-3), tokens, frozen_copy=False)
    assert plan.parts["activations"] == pytest.approx(found - head, rel=1 / 3)


def test_activations_of_images_are_estimated_within_a_third() -> None:
    settings = json.loads((FULL_SIZE / "config.json").read_text())
    text = settings["text_config"] | {"num_hidden_layers": 1, "hidden_size": 64, "vocab_size": 9, "pad_token_id": None}
    vision = settings["vision_config"] | {"num_hidden_layers": 6, "hidden_size": 64, "intermediate_size": 240, "num_attention_heads": 2}
    model = KimiVLForConditionalGeneration(KimiVLConfig(text_config=text, vision_config=vision))

    def saved(images: int) -> int:
        pixels, grid = torch.zeros(256 * images, 3, 14, 14), torch.tensor([[16, 16]] * images)
        return saved_bytes(model, lambda: model.image_features(pixels, grid))

    def planned(train: list[ModelPart] | None, *, checkpointing: bool) -> float:
        learner = LearnerConfig(activation_checkpointing=checkpointing)
        stage, optimizer = ModelTraining(train=train), AdamWConfig(learning_rate=1e-3)
        return learner_plan(sizes(model), learner, 1, stage, optimizer, 2 * 64, frozen_copy=False).parts["images (at most)"]

    assert planned(None, checkpointing=False) == pytest.approx(saved(4) - saved(2), rel=1 / 3)  # 64 tokens for an image of 256 patches
    model.vision_tower.requires_grad_(False)
    frozen = planned(["projector", "language_model"], checkpointing=True)
    assert saved(4) - saved(2) < frozen < planned(None, checkpointing=True) < planned(None, checkpointing=False)


@pytest.mark.parametrize("path", sorted(FULL_SIZE.glob("*.yaml")), ids=lambda path: path.stem)
def test_full_size_recipes_print_their_plan(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["check", str(path), "--set", "model.path=no/such-model"])
    printed = capsys.readouterr()
    assert code == 2
    assert "model.path (no/such-model)" in printed.err
    assert "16.41 B parameters" in printed.out
    assert "fits: " in printed.out
    assert ("KV cache" in printed.out) == (path.stem == "4_rl")


def test_says_what_would_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--set", "cluster.gpu_memory_gib=24", "--set", "model.path=no/such-model"]
    assert cli.main(["check", str(FULL_SIZE / "4_rl.yaml"), *small]) == 2
    printed = capsys.readouterr().out
    assert printed.count("does NOT fit") == 2
    assert "activation_checkpointing" in printed
    assert "gpus_per_rollout_worker" in printed
