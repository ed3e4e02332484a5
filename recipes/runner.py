"""Runs a recipe: its stages in order, skipping finished ones and resuming the unfinished one exactly where it stopped.

Owns the order of stages and how a stage is begun, resumed and ended. What a stage is made of is in `recipes.stages`.
"""

from __future__ import annotations

import time
from pathlib import Path

from bregman.engines.config import ModelTraining
from bregman.errors import RecipeError, UserError
from bregman.models.rope import extended
from bregman.models.vision import load_image_encoder
from bregman.tracking.report import write_report
from bregman.tracking.run_folder import RunFolder, latest_checkpoint, write_json
from bregman.tracking.tracker import RunTracker
from recipes import stages
from recipes.context import Context, Saver, read_state
from recipes.data_stages import PARTS
from recipes.models import initial_model, load_tokenizer
from recipes.sampling import finished_chunks
from recipes.schema import DPOStage, LongCoTStage, MergeStage, Recipe, RLStage, SFTStage, Stage, latest_model, needs
from recipes.workers import Workers


def run(recipe: Recipe, base: Path, *, only: str | None = None, fresh: bool = False) -> Path:
    """Run all stages of `recipe`, or only the one named `only`; returns the path of the report.

    Raises:
        UserError: anything the user can mend; the run folder stays resumable.
    """
    folder = RunFolder.open(Path(recipe.output_dir), recipe.model_dump(mode="json"), fresh=fresh)
    tracker = RunTracker(folder, num_stages=len(recipe.stages))
    try:
        start = initial_model(recipe, folder)
        todo = _unfinished(recipe, folder, only)
        if todo:
            _run_stages(recipe, base, folder, tracker, start, todo)
        return write_report(folder.path)
    except UserError as error:
        tracker.warn(f"stopped: {error}")
        raise
    finally:
        tracker.close()
        folder.close()


def _run_stages(recipe: Recipe, base: Path, folder: RunFolder, tracker: RunTracker, start: Path, todo: list[int]) -> None:
    tokenizer = load_tokenizer(start)
    learner = any(isinstance(recipe.stages[index], SFTStage | RLStage) for index in todo)
    engine = any(_needs_engine(recipe.stages[index]) for index in todo)
    with Workers(recipe, start, tokenizer, tracker, learner=learner, engine=engine) as workers:
        context = Context(
            recipe=recipe,
            base=base,
            folder=folder,
            start=start,
            tracker=tracker,
            tokenizer=tokenizer,
            encoder=load_image_encoder(start),
            workers=workers,
        )
        for index in todo:
            _run_stage(context, index, _model_before(context, index))
            write_report(folder.path)


def _run_stage(context: Context, index: int, model: Path) -> None:
    stage, stage_folder = context.recipe.stages[index], context.folder.stage_folder(index, context.recipe.stages[index].name)
    found = latest_checkpoint(stage_folder)
    first = found[0] if found else finished_chunks(stage_folder / PARTS)
    context.tracker.begin_stage(index, stage.name, stage.kind, total_steps=stages.total_steps(stage), first_step=first)
    started = time.monotonic()
    before = read_state(found[1])["seconds"] if found else 0.0
    saver = Saver(context, stage, stage_folder, started - before)
    checkpoint = found[1] if found else None
    if isinstance(stage, ModelTraining):
        model = extended(model, stage_folder / "start", theta=stage.rope_theta, positions=stage.max_position_embeddings)
    context.workers.use_model(model)
    evaluation = stages.run_stage(context, stage, model=model, output=stage_folder, checkpoint=checkpoint, first=first, saver=saver)
    context.workers.end_stage()
    seconds = time.monotonic() - started + before
    context.tracker.end_stage(seconds, evaluation)
    write_json(stage_folder / "done.json", {"name": stage.name, "kind": stage.kind, "seconds": seconds})


def _unfinished(recipe: Recipe, folder: RunFolder, only: str | None) -> list[int]:
    names = [stage.name for stage in recipe.stages]
    done = [index for index, name in enumerate(names) if (folder.stage_folder(index, name) / "done.json").exists()]
    if only is None:
        return [index for index in range(len(names)) if index not in done]
    if only not in names:
        raise RecipeError("--stage", f"no stage `{only}`", f"choose one of {', '.join(names)}")
    needed = needs(recipe, names.index(only))
    missing = next((name for i, name in enumerate(names) if name in needed and i not in done), None)
    if missing is not None:
        raise RecipeError("--stage", f"stage `{only}` needs what stage `{missing}` leaves, which is not finished", "run that one first")
    return [] if names.index(only) in done else [names.index(only)]


def _model_before(context: Context, index: int) -> Path:
    """The model that a stage starts from: of the stage it names, else of the nearest one before it that leaves one."""
    return context.model_of(context.recipe.stages[index].start_from or latest_model(context.recipe, index))


def _needs_engine(stage: Stage) -> bool:
    """Whether a stage samples from the model."""
    if isinstance(stage, SFTStage):
        return stage.gate is not None
    if isinstance(stage, LongCoTStage):
        return stage.generator.kind == "model"
    return not isinstance(stage, MergeStage | DPOStage)
