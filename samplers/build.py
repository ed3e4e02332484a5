"""From a recipe's `sampler:` section to a sampler."""

from __future__ import annotations

from collections.abc import Sequence

from bregman.protocols import ProblemSampler
from bregman.types import Problem
from samplers.config import CurriculumConfig, PrioritizedConfig, SamplerConfig, UniformConfig
from samplers.uniform import UniformSampler
from samplers.weighted import WeightedSampler


def build_sampler(config: SamplerConfig, problems: Sequence[Problem], seed: int) -> ProblemSampler:
    """The sampler that `config` describes, over `problems`."""
    match config:
        case UniformConfig():
            return UniformSampler(problems, seed)
        case CurriculumConfig():
            return WeightedSampler(problems, seed, phases=config.phases)
        case PrioritizedConfig():
            return WeightedSampler(problems, seed, phases=config.phases, prioritized=True, floor=config.floor)
