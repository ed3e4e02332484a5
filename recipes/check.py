"""`bregman check` and `bregman show`: what a run would do and train on, before any worker is started.

Owns the order of the look and the memory plan; each kind of stage is looked at in `recipes.check_stages`.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from bregman.data.chat import tokenize_conversations
from bregman.data.config import StageSource
from bregman.data.inspect import colour_mask
from bregman.data.sources import image_folder, read_conversation, read_rows, source_name
from bregman.errors import RecipeError
from bregman.models.config import HFModelConfig
from recipes.check_stages import Look, check_stage
from recipes.models import recipe_encoder, recipe_tokenizer
from recipes.plan import config_file, plan_lines
from recipes.schema import Recipe, SFTStage


def check(recipe: Recipe, base: Path) -> None:
    """Print a section per stage.

    Raises:
        UserError: the first thing that would stop a run.
    """
    print(f"{recipe.name}: {len(recipe.stages)} stages, model {recipe.model.kind}, output in {recipe.output_dir}")
    _check_memory(recipe, base)
    look = Look(recipe=recipe, base=base, tokenizer=recipe_tokenizer(recipe), encoder=recipe_encoder(recipe))
    for index, stage in enumerate(recipe.stages):
        print(f"\n[{index + 1}/{len(recipe.stages)}] {stage.name} ({stage.kind})")
        check_stage(look, stage)
    print("\nthe recipe is ready to run")


def _check_memory(recipe: Recipe, base: Path) -> None:
    """The plan comes before anything that needs the model itself, which may be on another machine."""
    if not isinstance(recipe.model, HFModelConfig):
        return
    file = config_file(recipe.model, base)
    if file is not None:
        from bregman.models.meta import meta_model

        print("\n".join(plan_lines(recipe, meta_model(file))))


def show(recipe: Recipe, base: Path, stage_name: str | None, count: int) -> None:
    """Print the first `count` conversations of each source of a supervised stage, trained tokens coloured.

    Raises:
        RecipeError: the recipe has no such supervised stage.
    """
    stages = {stage.name: stage for stage in recipe.stages if isinstance(stage, SFTStage)}
    if not stages or (stage_name is not None and stage_name not in stages):
        fix = f"choose one of {', '.join(stages)}" if stages else "the recipe has none"
        raise RecipeError("--stage", f"no supervised stage `{stage_name or ''}`", fix)
    tokenizer, encoder = recipe_tokenizer(recipe), recipe_encoder(recipe)
    for name, stage in stages.items():
        if stage_name in (None, name):
            for source in stage.sources:
                if isinstance(source, StageSource):
                    print(f"--- {name}: stage {source.stage} makes the rows of {source_name(source)}")
                    continue
                rows, folder = read_rows(source, base, recipe.seed), image_folder(source, base)
                conversations = [read_conversation(rows, index, folder) for index in range(min(count, len(rows)))]
                sequences = tokenize_conversations(tokenizer, conversations, encoder=encoder)
                for conversation, sequence in zip(conversations, sequences, strict=True):
                    print(f"--- {name}, {source_name(source)}, row {conversation.id}: {len(sequence.token_ids)} tokens")
                    Console(highlight=False).print(colour_mask(tokenizer, sequence))
