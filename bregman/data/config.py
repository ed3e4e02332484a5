"""Where examples and problems come from.

Owns the source sections of a recipe; reading them lives in `bregman.data.sources`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat

from bregman.config import Config


class _Source(Config):
    name: str = Field("", description="shown in tracking and errors; the file or function name if empty")
    weight: PositiveFloat = Field(1.0, description="SFT in steps: share of the mixture, relative to the other sources")
    passes: PositiveFloat = Field(1.0, description="SFT in epochs: how often each row is seen per epoch; 0.5 takes every other row")
    format: Literal["rows", "mmmu", "mathvision", "mathvista"] = Field(
        "rows", description="rows with the standard columns, or with the published ones of a benchmark"
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="standard name -> column of the data; standard names: messages, prompt, completion, answer, id, difficulty, images",
    )


class PythonSource(_Source):
    """A generator function beside the recipe: `path.py:name`, called as `name(seed=..., **args)`, yielding dicts."""

    kind: Literal["python"] = "python"
    path: str = Field(description="`file.py:function`, relative to the recipe")
    args: dict[str, Any] = Field(default_factory=dict)


class JsonlSource(_Source):
    kind: Literal["jsonl"] = "jsonl"
    path: str


class ParquetSource(_Source):
    kind: Literal["parquet"] = "parquet"
    path: str


class HubSource(_Source):
    """A data set of the Hugging Face hub, or a folder that `datasets.load_dataset` understands."""

    kind: Literal["hub"] = "hub"
    path: str = Field(description="data set id")
    subset: str | None = None
    split: str = "train"
    revision: str | None = None


class StageSource(_Source):
    """The data set that an earlier stage of the same recipe made (`long_cot`, `curate`, ...)."""

    kind: Literal["stage"] = "stage"
    stage: str = Field(description="name of that stage")


SourceConfig = Annotated[PythonSource | JsonlSource | ParquetSource | HubSource | StageSource, Field(discriminator="kind")]
