"""Stages that make a model without the learner: merging.

Owns the wiring only; the average is taken in `bregman.models.merge`.
"""

from __future__ import annotations

from pathlib import Path

from bregman.models.merge import merge_models
from recipes.context import Context
from recipes.schema import MergedModel, MergeStage


def run_merge(context: Context, stage: MergeStage, output: Path) -> None:
    """Leave the weighted average of the stage's models in `output / "model"`.

    Raises:
        DataError: the models differ in their tensors, or cannot be read.
    """
    context.tracker.waiting_for("the models to be averaged")
    count = merge_models([_folder(context, model) for model in stage.models], [model.weight for model in stage.models], output / "model")
    context.tracker.note(f"averaged {count} tensors of {len(stage.models)} models")


def _folder(context: Context, model: MergedModel) -> Path:
    if model.stage is not None:
        return context.model_of(model.stage)
    return (context.base / Path(model.path or "").expanduser()).resolve()
