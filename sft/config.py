"""Settings of a supervised stage."""

from __future__ import annotations

from typing import Literal

import pydantic
from pydantic import Field, PositiveInt

from bregman.config import Config
from bregman.data.config import SourceConfig
from bregman.engines.config import CheckpointConfig, ModelTraining, OptimizerConfig, ScheduleConfig
from evals.config import EvalConfig


class GateConfig(Config):
    """A stage is finished only when a metric of an evaluation passes; until then it goes on training."""

    metric: str = Field(description="`accuracy`, `mean_tokens`, or the name of a reward in `evaluation`")
    at_least: float | None = None
    at_most: float | None = None
    extend_steps: PositiveInt = Field(description="further steps (a re-warmed run of the schedule) after each failed check")
    max_extensions: PositiveInt = Field(4, description="failed checks before the run ends with an error")
    evaluation: EvalConfig

    @pydantic.model_validator(mode="after")
    def _one_bound(self) -> GateConfig:
        if self.at_least is None and self.at_most is None:
            raise ValueError("a gate needs `at_least` or `at_most`")
        return self

    @pydantic.model_validator(mode="after")
    def _measured(self) -> GateConfig:
        parts = [function.name or function.function.rpartition(":")[2] for function in self.evaluation.rewards.functions]
        known = ["accuracy", "pass_at_k", "mean_tokens", "truncated", *parts]
        if self.metric not in known:
            raise ValueError(f"metric `{self.metric}` is not measured; choose one of {', '.join(known)}")
        return self

    def passes(self, value: float) -> bool:
        above = self.at_least is None or value >= self.at_least
        return above and (self.at_most is None or value <= self.at_most)


class SFTConfig(ModelTraining):
    """Supervised fine-tuning on a weighted mixture of conversations, packed."""

    steps: PositiveInt
    tokens_per_step: PositiveInt = Field(description="token budget of one optimizer step")
    max_length: PositiveInt = Field(description="longest conversation in tokens")
    too_long: Literal["error", "skip"] = Field("error", description="what to do with longer conversations")
    sources: list[SourceConfig] = Field(min_length=1)
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig(every=200)
    gate: GateConfig | None = None
