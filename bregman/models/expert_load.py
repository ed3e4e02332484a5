"""How evenly the router of a mixture of experts spreads tokens, and the rule that evens it out without a loss term.

Owns counting in the routers with a correction bias (DeepSeek-V3, arXiv 2412.19437 sec. 2.1.2) and that bias's update. Adding counts
up over ranks is the learner's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

BIAS = "e_score_correction_bias"


class ExpertLoad:
    """Counts the tokens of each expert in every forward pass that will have a backward pass.

    Activation checkpointing runs a layer twice and counts its tokens twice, which changes no ratio.

    Args:
        model: any model; one without such routers has nothing to count.
    """

    def __init__(self, model: nn.Module) -> None:
        self._routers = [module for module in model.modules() if isinstance(getattr(module, BIAS, None), torch.Tensor)]
        self._counts: list[torch.Tensor] = []
        self.clear()
        for index, router in enumerate(self._routers):
            router.register_forward_hook(lambda _module, _inputs, output, index=index: self._count(index, output))

    def clear(self) -> None:
        """Start again from zero."""
        self._counts = [torch.zeros(len(router.get_buffer(BIAS)), dtype=torch.int64) for router in self._routers]

    def counts(self) -> list[float]:
        """Tokens of this rank per expert, router after router."""
        return [float(count) for counts in self._counts for count in counts.tolist()]

    @torch.no_grad()
    def balance(self, counts: list[float], rate: float) -> dict[str, float]:
        """Move each correction bias by `rate` towards an even load, and say how uneven it is.

        The bias rises for an expert below the mean load of its router and falls above it (arXiv 2412.19437 sec. 2.1.2); it decides
        which experts are chosen, never how they are weighted. At rate 0 it stays as it is.

        Args:
            counts: `counts()`, added up over ranks.
            rate: step of the bias.

        Returns:
            `moe/load_max_over_mean`, the largest share of an expert over an even share, worst router; `moe/load_min_over_mean`, the
            smallest; nothing if there are no routers.
        """
        largest, smallest, start = 0.0, math.inf, 0
        for router in self._routers:
            bias = router.get_buffer(BIAS)
            load = torch.tensor(counts[start : start + len(bias)], dtype=torch.float64)
            start += len(bias)
            mean = float(load.mean())
            if mean == 0:
                continue
            largest, smallest = max(largest, float(load.max()) / mean), min(smallest, float(load.min()) / mean)
            if rate > 0:
                bias += (rate * torch.sign(mean - load)).to(bias)
        return {"moe/load_max_over_mean": largest, "moe/load_min_over_mean": smallest} if largest else {}

    def _count(self, index: int, output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        chosen = output[2].detach().flatten()
        counts = self._counts[index].to(chosen.device)
        self._counts[index] = counts.index_add_(0, chosen, torch.ones_like(chosen))
