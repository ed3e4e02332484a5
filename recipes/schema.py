"""The recipe: a run's name, seed, cluster, model and list of stages, as one validated tree.

Owns the top of the schema and reading a recipe file; each section lives beside what it configures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, Field, NonNegativeInt, PositiveFloat

from bregman.config import Config, apply_overrides, parse, read_yaml
from bregman.data.config import StageSource
from bregman.engines.config import ClusterConfig, EngineConfig, LearnerConfig
from bregman.models.config import ModelConfig
from evals.config import EvalConfig
from rewards.config import RewardsConfig
from rl.config import RLConfig
from samplers.curation_config import CurationConfig
from sft.config import SFTConfig
from sft.dpo_config import DPOConfig
from sft.long_cot_config import LongCoTConfig
from sft.rejection_config import RejectionConfig

StageName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", description="unique within the recipe; names its folder")]


class NamedStage(Config):
    """What every stage has."""

    name: StageName
    start_from: str | None = Field(
        None, description="start from the model that this earlier stage left, or from the recipe's model (`start`); null: the latest model"
    )


class SFTStage(SFTConfig, NamedStage):
    kind: Literal["sft"] = "sft"


class RLStage(RLConfig, NamedStage):
    kind: Literal["rl"] = "rl"


class EvalStage(EvalConfig, NamedStage):
    kind: Literal["eval"] = "eval"


class DPOStage(DPOConfig, NamedStage):
    kind: Literal["dpo"] = "dpo"


class MergedModel(Config):
    """A model to merge: the one a stage left (`start`: the recipe's own), or a folder."""

    stage: str | None = None
    path: str | None = Field(None, description="folder in Hugging Face format, relative to the recipe")
    weight: PositiveFloat = Field(1.0, description="relative to the other models")

    @pydantic.model_validator(mode="after")
    def _one_of_both(self) -> MergedModel:
        if (self.stage is None) == (self.path is None):
            raise ValueError("give `stage` or `path`, one of them")
        return self


class MergeStage(NamedStage):
    """Weighted average of models, k1.5 sec. 2.4 (model merging for long2short)."""

    kind: Literal["merge"] = "merge"
    models: list[MergedModel] = Field(min_length=2)


class LongCoTStage(LongCoTConfig, NamedStage):
    kind: Literal["long_cot"] = "long_cot"
    rewards: RewardsConfig


class RejectionStage(RejectionConfig, NamedStage):
    kind: Literal["rejection"] = "rejection"


class CurateStage(CurationConfig, NamedStage):
    kind: Literal["curate"] = "curate"
    rewards: RewardsConfig


DATA_KINDS: tuple[str, ...] = ("long_cot", "curate", "rejection")
"""Stages that leave a data set (`recipes.context.data_file`) for `kind: stage` sources, and the model as it was."""

START = "start"
"""What a recipe calls the model that it began with."""

MODEL_KINDS: tuple[str, ...] = ("sft", "rl", "merge", "dpo")
"""Stages that leave a model."""

Stage = Annotated[
    SFTStage | RLStage | EvalStage | MergeStage | DPOStage | LongCoTStage | CurateStage | RejectionStage,
    Field(discriminator="kind"),
]


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
        if START in names:
            raise ValueError(f"stages[{names.index(START)}].name: `{START}` means the recipe's own model; choose another name")
        return self

    @pydantic.model_validator(mode="after")
    def _starts_exist(self) -> Recipe:
        for index, stage in enumerate(self.stages):
            left = [START, *(earlier.name for earlier in self.stages[:index] if earlier.kind in MODEL_KINDS)]
            merged = {f"models[{i}].stage": model.stage for i, model in enumerate(stage.models)} if isinstance(stage, MergeStage) else {}
            for key, name in {"start_from": stage.start_from, **merged}.items():
                if name is not None and name not in left:
                    found = f"stages[{index}].{key}: no earlier stage `{name}` leaves a model"
                    raise ValueError(f"{found}; there is: {', '.join(left)}")
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
    def _ranks_can_share(self) -> Recipe:
        ranks, shared = self.cluster.learner_workers, self.learner.context_parallel
        if ranks % shared:
            raise ValueError(f"cluster.learner_workers ({ranks}) is no multiple of learner.context_parallel ({shared}); make it one")
        return self

    @pydantic.model_validator(mode="after")
    def _pairs_where_they_belong(self) -> Recipe:
        makes_pairs = {stage.name for stage in self.stages if isinstance(stage, RejectionStage) and stage.keep == "pairs"}
        for index, stage in enumerate(self.stages):
            for source in sources(stage):
                if not isinstance(source, StageSource) or source.columns:
                    continue
                if isinstance(stage, DPOStage) and source.stage not in makes_pairs:
                    fix = "use a stage of kind `rejection` with `keep: pairs`"
                    raise ValueError(f"stages[{index}].pairs: stage `{source.stage}` makes no preference pairs; {fix}")
                if isinstance(stage, SFTStage) and source.stage in makes_pairs:
                    fix = "use `keep: shortest`, or map its columns"
                    raise ValueError(f"stages[{index}] ({stage.name}): stage `{source.stage}` makes preference pairs; {fix}")
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


def latest_model(recipe: Recipe, index: int) -> str:
    """The stage before `index` that left the latest model, or `start`."""
    return [START, *(stage.name for stage in recipe.stages[:index] if stage.kind in MODEL_KINDS)][-1]


def needs(recipe: Recipe, index: int) -> set[str]:
    """Names of the stages whose model or data set a stage starts from; `start` for the recipe's own model."""
    stage = recipe.stages[index]
    data = {source.stage for source in sources(stage) if isinstance(source, StageSource)}
    if isinstance(stage, MergeStage):
        return data | {model.stage for model in stage.models if model.stage is not None}
    return data | {stage.start_from or latest_model(recipe, index)}


def samplings(stage: Stage) -> dict[str, Any]:
    """Every sampling section of a stage, by its key within the stage."""
    match stage:
        case RLStage():
            evaluation = {"evaluation.sampling": stage.evaluation.sampling} if stage.evaluation else {}
            return {"rollout": stage.rollout, **evaluation}
        case EvalStage() | LongCoTStage() | RejectionStage():
            return {"sampling": stage.sampling}
        case CurateStage():
            hack = {"hack.sampling": stage.hack.sampling} if stage.hack else {}
            return {**hack, "sampling": stage.sampling}
        case SFTStage():
            return {"gate.evaluation.sampling": stage.gate.evaluation.sampling} if stage.gate else {}
        case _:
            return {}


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and validate the recipe at `path`.

    Raises:
        RecipeError: with the place of the first mistake and how to mend it.
    """
    return parse(Recipe, apply_overrides(read_yaml(path), overrides), str(path))
