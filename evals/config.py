"""Evaluation settings of a recipe."""

from __future__ import annotations

from pydantic import Field

from bregman.config import Config
from bregman.data.config import SourceConfig
from bregman.engines.config import SamplingConfig
from rewards.config import RewardsConfig


class EvalConfig(Config):
    """Sample answers to held-out problems and score them."""

    problems: SourceConfig
    sampling: SamplingConfig
    rewards: RewardsConfig
    seed: int = Field(0, description="of the sampled answers: the same on each evaluation, so that stages compare")
