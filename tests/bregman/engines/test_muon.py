"""Muon against a float64 reference that shares no code with it: the iteration, the update, and whole learner steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from learner_cases import _padded_policy_loss, make_model, make_moe, make_sequences, minibatch, policy_loss
from transformers import AutoModelForCausalLM

from bregman.config import parse
from bregman.engines.config import AdamWConfig, LearnerConfig, MuonConfig
from bregman.engines.fsdp2_learner import FSDP2Learner
from bregman.engines.muon import newton_schulz
from bregman.engines.optimizer import muon_parameters
from bregman.errors import RecipeError
from bregman.models.loading import load_policy

CONFIG = MuonConfig(learning_rate=2e-3, weight_decay=0.1, max_grad_norm=0.5, eps=1e-4)


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def learner(model: Path, optimizer: Any) -> FSDP2Learner:
    made = FSDP2Learner(LearnerConfig(), rank=0, world_size=1, device=torch.device("cpu"))
    made.begin_stage(model, optimizer)
    return made


def reference_orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """ALGORITHM of the paper, one 2-D matrix in float64, written without transposition tricks: p(X) on the singular values."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / max(float(torch.sqrt((s**2).sum())), 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vh


@pytest.mark.parametrize("shape", [(8, 8), (5, 17), (17, 5), (1, 6), (3, 7, 4), (2, 4, 9)])
def test_the_iteration_acts_on_singular_values(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = [reference_orthogonal(each) for each in matrix.reshape(-1, *shape[-2:])]
    found = newton_schulz(matrix, 5).reshape(-1, *shape[-2:])
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=0, atol=2e-5)


def test_zeros_stay_zero() -> None:
    assert newton_schulz(torch.zeros(4, 3), 5).abs().max() == 0


def test_is_torchs_muon_up_to_its_bfloat16(tmp_path: Path) -> None:
    weight, gradients = torch.randn(24, 40), [torch.randn(24, 40) for _ in range(3)]
    parameter = torch.nn.Parameter(weight.clone())
    theirs = torch.optim.Muon([parameter], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw")
    momentum, ours = torch.zeros(24, 40), weight.clone()
    for gradient in gradients:
        parameter.grad = gradient.clone()
        theirs.step()
        momentum = 0.95 * momentum + gradient
        update = newton_schulz(gradient + 0.95 * momentum, 5) * 0.2 * math.sqrt(40)
        ours = ours * (1 - 0.02 * 0.1) - 0.02 * update
    assert float((ours - parameter.detach()).norm() / (weight - ours).norm()) < 0.02


class Reference:
    """Muon + AdamW of Moonlight in float64, one parameter and one expert at a time."""

    def __init__(self, model: torch.nn.Module, config: MuonConfig, muon: set[str]) -> None:
        self.model, self.config, self.muon, self.steps = model, config, muon, 0
        self.state = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}

    @torch.no_grad()
    def step(self) -> None:
        c = self.config
        self.steps += 1
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in self.model.parameters()))
        scale = min(1.0, c.max_grad_norm / (norm + 1e-6))
        for name, p in self.model.named_parameters():
            first, second = self.state[name]
            gradient = p.grad * scale
            if name in self.muon:
                first.mul_(c.momentum).add_(gradient)
                direction = gradient + c.momentum * first
                stacked = direction if p.ndim == 3 else direction[None]
                factor = 0.2 * math.sqrt(max(p.shape[-2:]))
                update = torch.stack([reference_orthogonal(each) * factor for each in stacked]).reshape(p.shape)
                p.sub_(c.learning_rate * (update + c.weight_decay * p))
            else:
                first.mul_(c.betas[0]).add_(gradient, alpha=1 - c.betas[0])
                second.mul_(c.betas[1]).add_(gradient**2, alpha=1 - c.betas[1])
                p.mul_(1 - c.learning_rate * (c.weight_decay if p.ndim > 1 else 0.0))
                unbiased = second / (1 - c.betas[1] ** self.steps)
                p.sub_(c.learning_rate * (first / (1 - c.betas[0] ** self.steps)) / (unbiased.sqrt() + c.eps))
            p.grad = None


@pytest.mark.parametrize("make", [make_model, make_moe])
def test_learner_steps_equal_a_float64_reference(make: Any, tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    made = learner(folder, CONFIG)
    start = {name: tensor.clone() for name, tensor in made._sharded.full_weights(keep=True).items()}
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", experts_implementation="eager", dtype=torch.float64)
    matrices = {name.removeprefix("model.") for name in muon_parameters(load_policy(folder))}
    reference = Reference(model, CONFIG, matrices)
    for step in range(3):
        made.step(minibatch(seed=step), policy_loss, CONFIG.learning_rate)
        _padded_policy_loss(model, make_sequences(seed=step)).backward()
        reference.step()
    found = made._sharded.full_weights(keep=True)
    for name, parameter in model.named_parameters():
        moved = (parameter.detach() - start[name]).norm()
        assert float((found[name] - parameter.detach()).norm() / moved) < 2e-3, name


def test_which_parameters_are_matrices(tmp_path: Path) -> None:
    names = muon_parameters(load_policy(make_moe(tmp_path / "model")))
    last = {name.removeprefix("model.model.layers.1.") for name in names if ".layers.1." in name}
    attention = {f"self_attn.{each}_proj.weight" for each in "qkvo"}
    assert last == attention | {"mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert not {name for name in names if ".layers." not in name}  # no embedding, no head, no norm


def test_parts_keep_the_ratio_of_their_rates(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    plain = learner(folder, AdamWConfig(learning_rate=1e-3))
    own = learner(folder, AdamWConfig(learning_rate=4e-3, learning_rates={"language_model": 1e-3}))
    plain.step(minibatch(), policy_loss, 0.5e-3)
    own.step(minibatch(), policy_loss, 2e-3)
    for name, tensor in plain._sharded.full_weights(keep=True).items():
        assert torch.equal(tensor, own._sharded.full_weights(keep=True)[name])


def test_mistakes_are_named(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    with pytest.raises(RecipeError, match="no `vision_tower` is trained here"):
        learner(folder, MuonConfig(learning_rate=1e-3, learning_rates={"vision_tower": 1e-4}))
    with pytest.raises(RecipeError, match="did you mean `momentum`"):
        parse(MuonConfig, {"kind": "muon", "learning_rate": 1e-3, "momentun": 0.9}, "recipe")


def test_checkpoint_keeps_the_momentum(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    made, other = learner(folder, CONFIG), learner(folder, CONFIG)
    made.step(minibatch(), policy_loss, 1e-3)
    (tmp_path / "checkpoint").mkdir()
    made.save_checkpoint(tmp_path / "checkpoint")
    other.load_checkpoint(tmp_path / "checkpoint")
    for each in (made, other):
        each.step(minibatch(seed=1), policy_loss, 1e-3)
    for name, tensor in made._sharded.full_weights(keep=True).items():
        assert torch.equal(tensor, other._sharded.full_weights(keep=True)[name])
