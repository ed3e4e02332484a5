"""Optimizers on the local shards of a sharded model, and the size of its gradient.

Owns optimizer state, which parameter is updated by which rule and at which rate. Works on plain tensors rather than DTensors:
dispatching every small parameter through DTensor costs more than the update itself on small models. Muon's arithmetic is in `muon`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim.adamw import adamw

from bregman.engines.config import AdamWConfig, MuonConfig
from bregman.engines.muon import muon_directions
from bregman.errors import RecipeError
from bregman.models.parts import part_of

if TYPE_CHECKING:
    from bregman.models.policy import PolicyModel

State = dict[str, torch.Tensor]


class ShardedOptimizer:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) as torch computes it; with `kind: muon`, Muon on the model's matrices and
    AdamW on the rest (Moonlight, arXiv 2502.16982 sec. 2.2). Matrices decay, vectors (norms, biases) do not.

    Args:
        policy: sharded; parameters that need no gradient are left alone.
        config: of either kind.

    Attributes:
        steps: updates since the state was last reset.

    Raises:
        RecipeError: a rate is given for a part that the model does not have or that does not train.
    """

    def __init__(self, policy: PolicyModel, config: AdamWConfig | MuonConfig) -> None:
        self._config = config
        self._parameters = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
        missing = sorted(config.learning_rates.keys() - {part_of(name) for name in self._parameters})
        if missing:
            raise RecipeError("optimizer.learning_rates", f"no `{missing[0]}` is trained here", "remove it, or add it to `train`")
        self._matrices = muon_parameters(policy) & self._parameters.keys() if isinstance(config, MuonConfig) else set()
        self._rates = {name: config.learning_rates.get(part_of(name), config.learning_rate) for name in self._parameters}
        self.reset()

    def reset(self) -> None:
        """Forget all moments."""
        self.steps = 0
        self._state = {name: self._fresh(name) for name in self._parameters}

    def state(self, name: str) -> State:
        """Local shards of a parameter's moments: `exp_avg` and `exp_avg_sq`, or `momentum`."""
        return self._state[name]

    def local_norm(self) -> float:
        """L2 norm of this rank's shards of all gradients."""
        return float(get_total_norm([local(p.grad) for p in self._parameters.values() if p.grad is not None]))

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_scale: float) -> None:
        """Scale the gradients, update, and clear them. `learning_rate` is that of parts without a rate of their own; the others
        keep their ratio to it."""
        self.steps += 1
        present = [name for name, parameter in self._parameters.items() if parameter.grad is not None]
        gradients = [local(self._parameters[name].grad) for name in present]
        if gradient_scale != 1.0 and gradients:
            torch._foreach_mul_(gradients, gradient_scale)
        groups: dict[tuple[bool, float], list[str]] = defaultdict(list)
        for name in present:
            if name not in self._matrices and local(self._parameters[name]).numel():
                groups[self._parameters[name].ndim >= 2, self._rates[name]].append(name)
        scale = learning_rate / self._config.learning_rate
        for (decays, rate), names in groups.items():
            self._adamw(names, rate * scale, self._config.weight_decay if decays else 0.0)
        self._muon([name for name in present if name in self._matrices], scale)
        self.clear()

    def clear(self) -> None:
        """Drop the gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def _fresh(self, name: str) -> State:
        names = ("momentum",) if name in self._matrices else ("exp_avg", "exp_avg_sq")
        return {moment: torch.zeros_like(local(self._parameters[name])) for moment in names}

    def _adamw(self, names: Sequence[str], learning_rate: float, weight_decay: float) -> None:
        parameters = [local(self._parameters[name]) for name in names]
        adamw(
            parameters,
            [local(self._parameters[name].grad) for name in names],
            [self._state[name]["exp_avg"] for name in names],
            [self._state[name]["exp_avg_sq"] for name in names],
            [],
            [torch.full((), self.steps - 1.0, device=parameter.device) for parameter in parameters],  # `adamw` adds the 1 back
            fused=True,
            amsgrad=False,
            beta1=self._config.betas[0],
            beta2=self._config.betas[1],
            lr=learning_rate,
            weight_decay=weight_decay,
            eps=self._config.eps,
            maximize=False,
        )

    def _muon(self, names: Sequence[str], scale: float) -> None:
        """W <- W - lr (0.2 sqrt(max(rows, columns)) O + wd W): Moonlight Eq. (1) to (4)."""
        config = self._config
        if not names or not isinstance(config, MuonConfig):
            return
        directions = {}
        for name in names:
            gradient, momentum = local(self._parameters[name].grad), self._state[name]["momentum"]
            momentum.mul_(config.momentum).add_(gradient)
            directions[name] = gradient.add(momentum, alpha=config.momentum) if config.nesterov else momentum
        rows = {name: self._parameters[name].shape[0] for name in names}
        updates = muon_directions(directions, rows, _group(self._parameters[name] for name in names), steps=config.newton_schulz_steps)
        for name, update in updates.items():
            rate = self._rates[name] * scale
            local(self._parameters[name]).mul_(1.0 - rate * config.weight_decay).add_(update, alpha=-rate)


def muon_parameters(policy: PolicyModel) -> set[str]:
    """Names of the matrices that Muon updates: 2-D weights and stacks of experts, but no embedding, output head, convolution or
    table of positions (Moonlight sec. 2.2: those stay with AdamW)."""
    heads = {id(policy.model.get_input_embeddings().weight), id(policy.model.get_output_embeddings().weight)}
    tables = {id(module.weight) for module in policy.modules() if isinstance(module, nn.Embedding)}
    return {
        name
        for name, parameter in policy.named_parameters()
        if (parameter.ndim == 2 or (parameter.ndim == 3 and ".experts." in name)) and id(parameter) not in heads | tables
    }


def _group(parameters: Iterable[nn.Parameter]) -> dist.ProcessGroup | None:
    """The ranks over which parameters are sharded, all of them over the same."""
    parameter = next(iter(parameters))
    assert isinstance(parameter, DTensor)
    return parameter.device_mesh.get_group()


def local(tensor: torch.Tensor | None) -> torch.Tensor:
    """The part of a (sharded) tensor that this rank holds, sharing its memory."""
    assert isinstance(tensor, DTensor)
    with torch.no_grad():
        return tensor.to_local()
