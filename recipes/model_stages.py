"""Stages that make a model without the learner: merging, and preference tuning by TRL.

Owns the wiring only; averages are taken in `bregman.models.merge`, pairs read and trained on in `sft.dpo`.
"""

from __future__ import annotations

from pathlib import Path

import sft.dpo
from bregman.engines import cluster
from bregman.errors import RecipeError
from bregman.models.merge import merge_models
from bregman.protocols import ImageEncoder
from recipes.context import Context
from recipes.schema import DPOStage, MergedModel, MergeStage


def run_merge(context: Context, stage: MergeStage, output: Path) -> None:
    """Leave the weighted average of the stage's models in `output / "model"`.

    Raises:
        DataError: the models differ in their tensors, or cannot be read.
    """
    context.tracker.waiting_for("the models to be averaged")
    count = merge_models([_folder(context, model) for model in stage.models], [model.weight for model in stage.models], output / "model")
    context.tracker.note(f"averaged {count} tensors of {len(stage.models)} models")


def run_dpo(context: Context, stage: DPOStage, model: Path, output: Path) -> None:
    """Leave `model`, tuned on the stage's pairs, in `output / "model"`.

    Raises:
        RecipeError: the model takes images.
        DataError: naming the pair that cannot be used.
    """
    text_model_only(stage, context.encoder)
    context.tracker.waiting_for("the preference pairs")
    pairs = sft.dpo.read_pairs(context.source(stage.pairs), context.base, context.tokenizer, context.recipe.seed, stage.max_length)
    context.workers.lend_gpus_of_learner()
    context.tracker.waiting_for(f"preference tuning on {len(pairs)} pairs (TRL)")
    gpus = context.recipe.cluster.gpus_per_learner_worker
    history = cluster.run_alone(
        sft.dpo.train,
        stage,
        model.absolute(),
        (output / "model").absolute(),
        pairs,
        seed=context.recipe.seed,
        on_gpu=gpus > 0,
        what=f"stage {stage.name}: preference tuning",
        timeout=stage.timeout,
        gpus=gpus,
    )
    context.tracker.plan(len(history))
    for step, entry in enumerate(history):
        values = {name.replace("rewards/", "dpo/"): value for name, value in entry.items() if name not in ("epoch", "step")}
        context.tracker.log(step, values)


def text_model_only(stage: DPOStage, encoder: ImageEncoder | None) -> None:
    """Raises:
    RecipeError: the model has an image encoder.
    """
    if encoder is not None:
        fix = "shorten it by merging, by shortest rejection sampling or by RL"
        raise RecipeError(f"stage {stage.name}", "preference tuning takes text models, and this one takes images", fix)


def _folder(context: Context, model: MergedModel) -> Path:
    if model.stage is not None:
        return context.model_of(model.stage)
    return (context.base / Path(model.path or "").expanduser()).resolve()
