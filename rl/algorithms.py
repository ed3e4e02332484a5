"""The algorithms a recipe can name: for each, its loss and its advantages.

Adding one is a file with these two functions, its settings in `rl.config`, and a case here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from bregman.protocols import LossFunction
from rl.config import AlgorithmConfig, GRPOConfig, OPMDConfig, ReSTConfig
from rl.grpo import grpo_advantages, grpo_batch_loss
from rl.kl import with_kl
from rl.opmd import opmd_advantages, opmd_batch_loss
from rl.rest import rest_advantages, rest_batch_loss

AdvantageFunction = Callable[[Sequence[float]], list[float]]


def build_algorithm(config: AlgorithmConfig, kl_coefficient: float = 0.0) -> tuple[LossFunction, AdvantageFunction]:
    """`(loss, advantages)` of an algorithm; `advantages` maps the rewards of one group to one number each."""
    loss: LossFunction
    advantages: AdvantageFunction
    match config:
        case OPMDConfig():
            loss = partial(opmd_batch_loss, tau=config.tau, level=config.level)
            advantages = partial(opmd_advantages, baseline=config.baseline, tau=config.tau)
        case GRPOConfig():
            loss = partial(grpo_batch_loss, clip=config.clip)
            advantages = partial(grpo_advantages, scale=config.scale_rewards)
        case ReSTConfig():
            loss, advantages = rest_batch_loss, rest_advantages
    return (partial(with_kl, loss=loss, coefficient=kl_coefficient) if kl_coefficient else loss), advantages
