"""`bregman eval` and `bregman export`: work on a model or a run folder outside a run."""

from __future__ import annotations

import shutil
from pathlib import Path

from bregman.errors import RecipeError, UserError
from bregman.tracking.disk import disk_errors
from bregman.tracking.run_folder import RunFolder, latest_checkpoint
from recipes.schema import EvalStage, Recipe


def evaluate_model(recipe: Recipe, base: Path, model: Path, stage_name: str | None) -> None:
    """Evaluate the HF folder `model` as an eval stage of `recipe` says, and print what came out.

    Raises:
        RecipeError: the recipe has no such eval stage.
        DataError: the folder is not a model.
    """
    stages = {stage.name: stage for stage in recipe.stages if isinstance(stage, EvalStage)}
    if not stages or (stage_name is not None and stage_name not in stages):
        known = f"choose one of {', '.join(stages)}" if stages else "add one"
        raise RecipeError("--stage", f"no eval stage `{stage_name or ''}` in the recipe", known)
    stage = stages[stage_name] if stage_name else list(stages.values())[-1]

    from bregman.data.sources import read_problems
    from bregman.models.loading import resolve_model
    from bregman.models.vision import load_image_encoder
    from bregman.tracking.console import PlainTracker
    from evals.evaluate import evaluate, warn_about_failures
    from recipes.models import load_tokenizer
    from recipes.workers import Workers

    folder = resolve_model(str(model))
    tokenizer = load_tokenizer(folder)
    room = recipe.engine.max_model_len - stage.sampling.max_tokens
    encoder = load_image_encoder(folder)
    problems = read_problems(stage.problems, base, tokenizer, seed=recipe.seed, max_prompt_tokens=room, encoder=encoder)
    tracker = PlainTracker()
    with Workers(recipe, folder, tokenizer, tracker, learner=False) as workers:
        workers.engine.load_weights(folder, version=0)
        result, groups = evaluate(workers.engine, workers.rewards.scorer(stage.rewards, base), problems, stage)
        warn_about_failures(groups, stage.name, tracker.warn)
    print(f"{stage.name}: accuracy {result.accuracy:.3f} over {result.num_problems} problems x {result.samples_per_problem} samples")
    print(f"pass@{result.samples_per_problem} {result.pass_at_k:.3f}")
    print(f"mean response {result.mean_tokens:.1f} tokens, {result.truncated:.1%} of the responses cut")
    for name, value in result.metrics.items():
        print(f"{name} {value:.3f}")


def export_model(run: Path, stage_name: str | None, to: Path) -> Path:
    """Copy the HF folder that a stage of the run at `run` left to `to`.

    Raises:
        UserError: no such run or stage, the stage has no model yet, or `to` exists.
    """
    recipe = RunFolder(run).read_recipe()
    if not recipe:
        raise UserError(str(run), "not a run folder (no recipe.resolved.yaml)", "give the `output_dir` of a recipe")
    if to.exists():
        raise UserError(str(to), "exists already", "give a folder that does not")
    names = [stage["name"] for stage in recipe["stages"]]
    if stage_name is not None and stage_name not in names:
        raise UserError("--stage", f"no stage `{stage_name}`", f"choose one of {', '.join(names)}")
    folders = [run / "stages" / f"{index:02d}_{name}" for index, name in enumerate(names) if stage_name in (None, name)]
    models = [folder / "model" for folder in folders if (folder / "model").exists()]
    if not models:
        raise UserError(str(run), _no_model(folders, stage_name), "finish the stage with `bregman run` first")
    part = to.with_name(f"{to.name}.part")
    with disk_errors(to):
        shutil.rmtree(part, ignore_errors=True)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(models[-1], part)
        return part.rename(to)


def _no_model(folders: list[Path], stage_name: str | None) -> str:
    unfinished = [found for folder in folders if (found := latest_checkpoint(folder)) is not None]
    what = f"stage `{stage_name}`" if stage_name else "no stage"
    if unfinished:
        return f"{what} is unfinished (its last checkpoint is at step {unfinished[-1][0]})"
    return f"{what} has left a model" if stage_name is None else f"{what} has left no model"
