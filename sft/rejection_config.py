"""Settings of rejection sampling for short answers."""

from __future__ import annotations

from typing import Literal

import pydantic
from pydantic import Field, PositiveInt

from bregman.config import Config
from bregman.data.config import SourceConfig
from bregman.engines.config import SamplingConfig
from rewards.config import RewardsConfig


class RejectionConfig(Config):
    """Sample the model's answers and keep short right ones, for SFT or as preference pairs (k1.5 sec. 2.4, long2short)."""

    problems: SourceConfig
    sampling: SamplingConfig = Field(description="num_samples: answers per problem; k1.5 takes 8")
    rewards: RewardsConfig = Field(description="the first one says what is right: 1 or more")
    keep: Literal["shortest", "pairs"] = Field(description="shortest: right answers, for SFT; pairs: chosen and rejected, for DPO")
    longer: float = Field(1.5, ge=1.0, description="pairs: right answers more than this many times as long are rejected too")
    max_pairs: PositiveInt = Field(4, description="pairs: most of one problem, those with the longest rejected answers first")
    chunk: PositiveInt = Field(64, description="problems sampled between two saved parts")

    @pydantic.model_validator(mode="after")
    def _several_samples(self) -> RejectionConfig:
        if self.sampling.num_samples < 2 or self.sampling.temperature == 0:
            raise ValueError("sampling needs num_samples >= 2 and a temperature above 0: there is nothing to choose from")
        return self
