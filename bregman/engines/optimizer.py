"""AdamW on the local shards of a sharded model, and the size of its gradient.

Owns optimizer state. Works on plain tensors rather than DTensors: dispatching every small parameter through DTensor costs more
than the update itself on small models.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim.adamw import adamw

from bregman.engines.config import AdamWConfig


class ShardedAdamW:
    """Loshchilov and Hutter (arXiv 1711.05101) as torch computes it; matrices decay, vectors (norms, biases) do not.

    Attributes:
        steps: updates since the state was last reset.
    """

    def __init__(self, model: nn.Module, config: AdamWConfig) -> None:
        self._config = config
        self._parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.reset()

    def reset(self) -> None:
        """Forget all moments."""
        self.steps = 0
        self._moments = {name: (torch.zeros_like(local(p)), torch.zeros_like(local(p))) for name, p in self._parameters.items()}

    def moments(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Local shards of the first and second moment of a parameter."""
        return self._moments[name]

    def local_norm(self) -> float:
        """L2 norm of this rank's shards of all gradients."""
        return float(get_total_norm([local(p.grad) for p in self._parameters.values() if p.grad is not None]))

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_scale: float) -> None:
        """Scale the gradients, update, and clear them."""
        self.steps += 1
        for decays in (True, False):
            names = [n for n, p in self._parameters.items() if (p.ndim >= 2) == decays and p.grad is not None and local(p).numel()]
            gradients = [local(self._parameters[name].grad) for name in names]
            if gradient_scale != 1.0:
                torch._foreach_mul_(gradients, gradient_scale)
            adamw(
                [local(self._parameters[name]) for name in names],
                gradients,
                [self._moments[name][0] for name in names],
                [self._moments[name][1] for name in names],
                [],
                [torch.full((), self.steps - 1.0, device=gradient.device) for gradient in gradients],  # `adamw` adds the 1 back
                fused=True,
                amsgrad=False,
                beta1=self._config.betas[0],
                beta2=self._config.betas[1],
                lr=learning_rate,
                weight_decay=self._config.weight_decay if decays else 0.0,
                eps=self._config.eps,
                maximize=False,
            )
        self.clear()

    def clear(self) -> None:
        """Drop the gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None


def local(tensor: torch.Tensor | None) -> torch.Tensor:
    """The part of a (sharded) tensor that this rank holds, sharing its memory."""
    assert isinstance(tensor, DTensor)
    with torch.no_grad():
        return tensor.to_local()
