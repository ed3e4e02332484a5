"""Settings of a supervised stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import pydantic
from pydantic import Field, PositiveFloat, PositiveInt

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


class PhaseConfig(Config):
    """A part of a stage with its own sequence length and schedule; the optimizer's state goes on from phase to phase."""

    steps: PositiveInt | None = Field(None, description="optimizer steps; or `epochs`")
    epochs: PositiveInt | None = Field(None, description="passes over the sources; `check` says how many steps they take")
    max_length: PositiveInt = Field(description="longest conversation in tokens")
    tokens_per_step: PositiveInt | None = Field(None, description="the stage's if left out")
    learning_rate: PositiveFloat | None = Field(None, description="peak of this phase; the optimizer's if left out")
    schedule: ScheduleConfig | None = Field(None, description="over the steps of this phase; the stage's if left out")

    @pydantic.model_validator(mode="after")
    def _one_length(self) -> PhaseConfig:
        return _steps_or_epochs(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A phase with everything filled in. Exactly one of `steps` and `epochs` is a number."""

    steps: int | None
    epochs: int | None
    max_length: int
    tokens_per_step: int
    learning_rate: float
    schedule: ScheduleConfig


class SFTConfig(ModelTraining):
    """Supervised fine-tuning on a weighted mixture of conversations, packed.

    One phase is written as `steps` (or `epochs`) and `max_length` of the stage; several as a list of `phases`.
    """

    steps: PositiveInt | None = Field(None, description="optimizer steps; or `epochs`, or `phases`")
    epochs: PositiveInt | None = Field(None, description="passes over the sources, each `source.passes` times per epoch")
    max_length: PositiveInt | None = Field(None, description="longest conversation in tokens")
    phases: list[PhaseConfig] = Field(default_factory=list, description="one after another, in place of steps, epochs and max_length")
    tokens_per_step: PositiveInt = Field(description="token budget of one optimizer step")
    too_long: Literal["error", "skip", "truncate"] = Field("error", description="what to do with longer conversations")
    on_bad_row: Literal["error", "skip"] = Field("error", description="what to do with malformed rows; skipped ones are counted by reason")
    on_exhausted: Literal["repeat", "stop", "error"] = Field(
        "repeat", description="with `steps`: what happens once every row of a source was drawn; `repeat` draws them in a new order"
    )
    sources: list[SourceConfig] = Field(min_length=1)
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig(every=200)
    gate: GateConfig | None = None

    @pydantic.model_validator(mode="after")
    def _one_form(self) -> SFTConfig:
        if not self.phases:
            if self.max_length is None:
                raise ValueError("give `max_length`, or `phases`")
            return _steps_or_epochs(self)
        both = next((key for key in ("steps", "epochs", "max_length") if getattr(self, key) is not None), None)
        if both:
            raise ValueError(f"`{both}` and `phases` exclude each other: move it into the phases")
        return self

    @pydantic.model_validator(mode="after")
    def _weights_and_passes(self) -> SFTConfig:
        epochs = {phase.epochs is not None for phase in self.plan}
        for index, source in enumerate(self.sources):
            for key, other, unused in (("weight", "passes", {True}), ("passes", "weight", {False})):
                if key in source.model_fields_set and epochs == unused:
                    length = "epochs" if key == "weight" else "steps"
                    raise ValueError(f"sources[{index}].{key} has no effect in a stage measured in {length}; use `{other}`")
        return self

    @property
    def plan(self) -> tuple[Phase, ...]:
        """The phases, the only one of the short form included."""
        if not self.phases:
            assert self.max_length is not None
            return (self._phase(PhaseConfig(steps=self.steps, epochs=self.epochs, max_length=self.max_length)),)
        return tuple(self._phase(phase) for phase in self.phases)

    def _phase(self, phase: PhaseConfig) -> Phase:
        return Phase(
            steps=phase.steps,
            epochs=phase.epochs,
            max_length=phase.max_length,
            tokens_per_step=phase.tokens_per_step or self.tokens_per_step,
            learning_rate=phase.learning_rate or self.optimizer.learning_rate,
            schedule=phase.schedule or self.schedule,
        )


L = TypeVar("L", PhaseConfig, SFTConfig)


def _steps_or_epochs(section: L) -> L:
    if (section.steps is None) == (section.epochs is None):
        raise ValueError("give either `steps` or `epochs`")
    return section
