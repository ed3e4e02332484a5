"""Recipe mistakes come back as one line with the place, the finding and a way out."""

import copy
from pathlib import Path

import pytest

from bregman.config import apply_overrides, parse, read_yaml
from bregman.errors import RecipeError
from recipes.schema import Recipe

RECIPE = {
    "name": "x",
    "output_dir": "runs/x",
    "model": {"kind": "tiny_qwen3", "alphabet": "abc"},
    "engine": {"max_model_len": 128},
    "stages": [
        {
            "kind": "eval",
            "name": "look",
            "problems": {"kind": "python", "path": "task.py:problems"},
            "sampling": {"max_tokens": 10},
            "rewards": {"functions": [{"function": "exact_answer"}]},
        }
    ],
}


def _stage(**changes):
    return lambda recipe: recipe["stages"][0].update(changes)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda r: r.update(sed=1), "sed: unknown key `sed`; did you mean `seed`?"),
        (_stage(samplin={}), "stages[0].samplin: unknown key `samplin`; did you mean `sampling`?"),
        (_stage(sampling={"max_token": 3}), "stages[0].sampling.max_token: unknown key `max_token`; did you mean `max_tokens`?"),
        (_stage(kind="evl"), "stages[0].kind: unknown kind `evl`; did you mean `eval`?"),
        (lambda r: r["stages"][0].pop("kind"), "stages[0].kind: this key is required"),
        (lambda r: r["model"].update(hiden_size=3), "model.hiden_size: unknown key `hiden_size`; did you mean `hidden_size`?"),
        (_stage(sampling={"max_tokens": 300}), "stages[0].sampling.max_tokens (300) leaves no room for a prompt"),
        (_stage(sampling={"max_tokens": "many"}), "stages[0].sampling.max_tokens: input should be a valid integer"),
        (_stage(rewards={"functions": []}), "stages[0].rewards.functions: list should have at least 1 item"),
        (lambda r: r.pop("name"), "name: this key is required"),
        (lambda r: r["stages"].append(r["stages"][0]), "two stages are named `look`"),
        (_stage(name="a/b"), "stages[0].name: string should match pattern"),
    ],
)
def test_mistake_is_one_line(change, expected):
    recipe = copy.deepcopy(RECIPE)
    change(recipe)
    with pytest.raises(RecipeError) as error:
        parse(Recipe, recipe, "recipe.yaml")
    assert str(error.value).startswith("recipe.yaml")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_overrides_reach_into_lists_by_name_and_index():
    changed = apply_overrides(RECIPE, ["stages.look.sampling.max_tokens=20", "stages.0.seed=3", "cluster.rollout_workers=2"])
    recipe = parse(Recipe, changed, "recipe.yaml")
    assert recipe.stages[0].sampling.max_tokens == 20
    assert recipe.stages[0].seed == 3
    assert recipe.cluster.rollout_workers == 2
    assert RECIPE["stages"][0]["sampling"]["max_tokens"] == 10


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "expected KEY=VALUE"),
        ("stages.lok.seed=1", "no list item `lok`; choose one of look"),
        ("name.x.y=1", "inside a value that is not a section"),
        ("name.x=1", "inside a value that is not a section"),
        ("seed=[", "not valid YAML"),
    ],
)
def test_bad_override(override, expected):
    with pytest.raises(RecipeError, match=r"--set ") as error:
        apply_overrides(RECIPE, [override])
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, "no such file"), ("a: [1", "not valid YAML"), ("- a", "expected a mapping"), ("\x00", "")],
)
def test_unreadable_recipe(tmp_path: Path, text, expected):
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecipeError) as error:
        read_yaml(path)
    assert expected in str(error.value)
    assert str(path) in str(error.value)
