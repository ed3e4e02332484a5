"""What a recipe says about ranks that share their tokens, and about a longer window."""

from __future__ import annotations

from pathlib import Path

import pytest

from bregman.errors import RecipeError
from recipes.schema import load_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "tiny_thinking" / "recipe.yaml"


def test_ranks_must_be_a_multiple_of_those_that_share() -> None:
    with pytest.raises(RecipeError, match=r"cluster\.learner_workers \(3\) is no multiple of learner\.context_parallel \(2\)"):
        load_recipe(RECIPE, ["cluster.learner_workers=3", "learner.context_parallel=2"])
    assert load_recipe(RECIPE, ["cluster.learner_workers=4", "learner.context_parallel=2"]).learner.context_parallel == 2


def test_a_stage_may_have_another_base_and_window() -> None:
    recipe = load_recipe(RECIPE, ["stages.rl.rope_theta=800000", "stages.rl.max_position_embeddings=131072"])
    stage = next(stage for stage in recipe.stages if stage.name == "rl")
    assert (stage.rope_theta, stage.max_position_embeddings) == (800_000, 131_072)
    with pytest.raises(RecipeError, match="rope_theta"):
        load_recipe(RECIPE, ["stages.rl.rope_theta=-1"])
