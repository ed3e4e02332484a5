"""The recipe: a run's name, seed, cluster, model and list of stages, as one validated tree.

Owns the top of the schema and reading a recipe file; each section lives beside what it configures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, Field, NonNegativeInt

from bregman.config import Config, apply_overrides, parse, read_yaml
from bregman.data.config import StageSource
from bregman.engines.config import ClusterConfig, EngineConfig, LearnerConfig
from bregman.models.config import ModelConfig
from evals.config import EvalConfig
from rl.config import RLConfig
from sft.config import SFTConfig

StageName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", description="unique within the recipe; names its folder")]


class SFTStage(SFTConfig):
    kind: Literal["sft"] = "sft"
    name: StageName


class RLStage(RLConfig):
    kind: Literal["rl"] = "rl"
    name: StageName


class EvalStage(EvalConfig):
    kind: Literal["eval"] = "eval"
    name: StageName


DATA_KINDS: tuple[str, ...] = ()
"""Stages that leave a data set (`recipes.context.data_file`) for `kind: stage` sources, and the model as it was."""

MODEL_KINDS: tuple[str, ...] = ("sft", "rl")
"""Stages that leave a model."""

Stage = Annotated[SFTStage | RLStage | EvalStage, Field(discriminator="kind")]


class Recipe(Config):
    """A complete run. Each stage starts from the model that the previous one left."""

    name: str
    seed: NonNegativeInt = 0
    output_dir: str = Field(description="run folder; relative to where the command is run")
    cluster: ClusterConfig = ClusterConfig()
    model: ModelConfig
    engine: EngineConfig
    learner: LearnerConfig = LearnerConfig()
    stages: list[Stage] = Field(min_length=1)

    @pydantic.model_validator(mode="after")
    def _unique_names(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two stages are named `{twice}`; give each a name of its own")
        return self

    @pydantic.model_validator(mode="after")
    def _sources_exist(self) -> Recipe:
        for index, stage in enumerate(self.stages):
            made = [earlier.name for earlier in self.stages[:index] if earlier.kind in DATA_KINDS]
            for source in sources(stage):
                if isinstance(source, StageSource) and source.stage not in made:
                    found = f"stages[{index}] ({stage.name}): no earlier stage `{source.stage}` makes a data set"
                    raise ValueError(f"{found}; there is: {', '.join(made) or 'none'}")
        return self

    @pydantic.model_validator(mode="after")
    def _responses_fit(self) -> Recipe:
        for index, stage in enumerate(self.stages):
            for key, sampling in samplings(stage).items():
                if sampling.max_tokens >= self.engine.max_model_len:
                    raise ValueError(
                        f"stages[{index}].{key}.max_tokens ({sampling.max_tokens}) leaves no room for a prompt in "
                        f"engine.max_model_len ({self.engine.max_model_len}); raise the one or lower the other"
                    )
        return self


def sources(section: Any) -> Iterator[Any]:
    """Every data source of a stage, wherever in it."""
    if isinstance(section, BaseModel):
        if "weight" in type(section).model_fields and "columns" in type(section).model_fields:
            yield section
        section = [getattr(section, name) for name in type(section).model_fields]
    if isinstance(section, list):
        for item in section:
            yield from sources(item)


def samplings(stage: Stage) -> dict[str, Any]:
    """Every sampling section of a stage, by its key within the stage."""
    match stage:
        case RLStage():
            evaluation = {"evaluation.sampling": stage.evaluation.sampling} if stage.evaluation else {}
            return {"rollout": stage.rollout, **evaluation}
        case EvalStage():
            return {"sampling": stage.sampling}
        case _:
            return {"gate.evaluation.sampling": stage.gate.evaluation.sampling} if stage.gate else {}


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and validate the recipe at `path`.

    Raises:
        RecipeError: with the place of the first mistake and how to mend it.
    """
    return parse(Recipe, apply_overrides(read_yaml(path), overrides), str(path))
