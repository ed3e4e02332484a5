"""Settings of the problem samplers.

Owns numbers and their checks; the samplers live beside it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field, NonNegativeInt, PositiveFloat

from bregman.config import Config


class CurriculumPhase(Config):
    """From iteration `start` on, draw only problems with `min_difficulty <= difficulty <= max_difficulty`."""

    start: NonNegativeInt = Field(description="first iteration of the phase")
    min_difficulty: float = 0.0
    max_difficulty: float = 1.0

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> CurriculumPhase:
        if self.min_difficulty > self.max_difficulty:
            raise ValueError(f"min_difficulty ({self.min_difficulty}) is above max_difficulty ({self.max_difficulty})")
        return self


class UniformConfig(Config):
    kind: Literal["uniform"] = "uniform"


class CurriculumConfig(Config):
    """Difficulty labels and a schedule, k1.5 sec. 2.3.4."""

    kind: Literal["curriculum"] = "curriculum"
    phases: list[CurriculumPhase] = Field(min_length=1)


class PrioritizedConfig(Config):
    """Draw problem i with probability proportional to 1 - s_i, its success rate, k1.5 sec. 2.3.4."""

    kind: Literal["prioritized"] = "prioritized"
    floor: PositiveFloat = Field(0.05, le=1.0, description="least weight, so that a solved problem is still seen now and then (ours)")
    phases: list[CurriculumPhase] = Field(default_factory=list, description="curriculum schedule combined with it; empty: none")


SamplerConfig = Annotated[UniformConfig | CurriculumConfig | PrioritizedConfig, Field(discriminator="kind")]
