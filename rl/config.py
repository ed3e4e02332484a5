"""Settings of an RL stage."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from bregman.config import Config
from bregman.data.config import SourceConfig
from bregman.engines.config import CheckpointConfig, ModelTraining, OptimizerConfig, SamplingConfig
from evals.config import EvalConfig
from rewards.config import LengthRewardConfig, RewardsConfig
from samplers.config import SamplerConfig, UniformConfig


class OPMDConfig(Config):
    """Online policy mirror descent, Kimi k1.5 Eq. (2) and (3)."""

    kind: Literal["opmd"] = "opmd"
    tau: NonNegativeFloat = Field(0.1, description="weight of KL(pi_theta || pi_i)")
    baseline: Literal["mean", "logavgexp"] = "mean"
    level: Literal["sequence", "token"] = Field("sequence", description="token: squares each token's log-ratio; not Eq. (3)")

    @pydantic.model_validator(mode="after")
    def _tau_for_logavgexp(self) -> OPMDConfig:
        if self.baseline == "logavgexp" and self.tau == 0:
            raise ValueError("baseline `logavgexp` needs tau > 0")
        return self


class GRPOConfig(Config):
    """Group relative policy optimisation, DeepSeekMath (arXiv 2402.03300), token-level clipped ratio."""

    kind: Literal["grpo"] = "grpo"
    clip: PositiveFloat = 0.2
    scale_rewards: bool = Field(True, description="divide advantages by the group's standard deviation")


class ReSTConfig(Config):
    """Supervised step on right answers only: the rejection-sampling baseline of k1.5 Fig. 10 (arXiv 2308.08998)."""

    kind: Literal["rest"] = "rest"


AlgorithmConfig = Annotated[OPMDConfig | GRPOConfig | ReSTConfig, Field(discriminator="kind")]


class PeriodicEvalConfig(EvalConfig):
    every: PositiveInt = Field(10, description="iterations between evaluations")


class RLConfig(ModelTraining):
    """Reinforcement learning with verifiable rewards."""

    iterations: PositiveInt
    num_problems: PositiveInt = Field(description="problems per iteration")
    optimizer_steps: PositiveInt = Field(4, description="optimizer steps per iteration; each takes an equal share of the groups")
    problems: SourceConfig
    sampler: SamplerConfig = UniformConfig()
    rollout: SamplingConfig
    rewards: RewardsConfig
    length_reward: LengthRewardConfig = LengthRewardConfig()
    algorithm: AlgorithmConfig = OPMDConfig()
    reference: Literal["learner", "rollout"] = Field("learner", description="whose log-probabilities of pi_i the loss uses")
    optimizer: OptimizerConfig
    reset_optimizer: bool = Field(True, description="fresh optimizer state each iteration, k1.5 sec. 2.3.2")
    kl_coefficient: NonNegativeFloat = Field(0.0, description="KL to the stage's start model, kept fixed; 0 keeps no copy")
    truncated: Literal["train", "drop"] = Field("train", description="what to do with responses cut at max_tokens")
    parity_bound: PositiveFloat = Field(0.05, description="largest |learner - engine| log-probability before the run stops; nats")
    evaluation: PeriodicEvalConfig | None = None
    checkpoint: CheckpointConfig = CheckpointConfig(every=1)

    @pydantic.model_validator(mode="after")
    def _rest_needs_plain_rewards(self) -> RLConfig:
        if isinstance(self.algorithm, ReSTConfig) and self.length_reward.weight:
            raise ValueError(
                "algorithm `rest` takes rewards of at least 1 as right, which a length reward would shift; set its weight to 0"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _on_policy(self) -> RLConfig:
        if self.rollout.top_p < 1.0:
            raise ValueError(f"rollout.top_p ({self.rollout.top_p}) must be 1: the learner cannot reproduce truncated probabilities")
        if self.rollout.temperature == 0:
            raise ValueError("rollout.temperature must be above 0: greedy responses of one problem are all equal")
        if self.num_problems < self.optimizer_steps:
            raise ValueError(f"optimizer_steps ({self.optimizer_steps}) exceeds num_problems ({self.num_problems})")
        return self
