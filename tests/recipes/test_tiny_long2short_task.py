"""The long2short recipe's task: its demonstrations are sound searches, look twice where they should, and fit the windows of the recipe."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest

from recipes.schema import load_recipe
from recipes.tiny_thinking import task as search

RECIPE = Path(__file__).parents[2] / "recipes" / "tiny_long2short" / "recipe.yaml"
_SPEC = importlib.util.spec_from_file_location("tiny_long2short_task", RECIPE.with_name("task.py"))
task = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(task)

PUZZLE = next(puzzle for puzzle in search.split()[0] if puzzle.solutions == ("-+",))


def thought(text: str) -> list[str]:
    return search.parts(text)[0].split("\n")


def at_first_look(text: str) -> str:
    return "<think>" + "\n".join(line for line in thought(text) if not line.startswith(task.AGAIN)) + "</think>" + search.parts(text)[1]


@pytest.mark.parametrize(("doubt", "fewest", "most"), [(0.0, 0, 0), (0.5, 1, 6), (1.0, 4, 6)])
def test_doubt_looks_again_and_changes_nothing_else(doubt, fewest, most):
    plain = task.demonstration(PUZZLE, random.Random(0))
    assert len(thought(plain)) == 4, "three failed attempts before the hit, in the order of the choices"
    for seed in range(50):
        long = task.demonstration(PUZZLE, random.Random(seed), doubt=doubt)
        assert at_first_look(long) == plain
        assert fewest <= task.second_looks([""], [long])[0] <= most


def test_giving_up_answers_the_last_attempt():
    texts = {task.demonstration(PUZZLE, random.Random(seed), give_up=0.9) for seed in range(50)}
    assert search.gave_up([""] * len(texts), sorted(texts)).count(1.0) >= 1
    assert set(search.flawed_thinking([""] * len(texts), sorted(texts), [PUZZLE.digits] * len(texts), [PUZZLE.target] * len(texts))) == {0}


@pytest.mark.parametrize("source", ["long_cot_sft", "short_cot_sft"])
def test_demonstrations_are_sound_and_of_training_puzzles(source):
    held_out = {puzzle.question for puzzle in search.split()[0]}
    rows = [row["messages"] for row in getattr(task, source)(seed=3, count=300)]
    assert not held_out & {question["content"] for question, _ in rows}
    digits, targets = [q["content"][:3] for q, _ in rows], [int(q["content"][4]) for q, _ in rows]
    plain = [at_first_look(answer["content"]) for _, answer in rows]
    assert set(search.flawed_thinking(plain, plain, digits, targets)) == {0.0}
    right = search.operator_search(plain, [answer["content"] for _, answer in rows], digits, targets)
    assert (min(right) == 1.0) == (source == "long_cot_sft"), "the short ones give up"
    assert rows == [row["messages"] for row in getattr(task, source)(seed=3, count=300)]


def test_everything_fits_the_windows_of_the_recipe():
    recipe = load_recipe(RECIPE)
    stages = {stage.name: stage for stage in recipe.stages}
    hardest = max(search.split()[1], key=lambda puzzle: search.CHOICES.index(puzzle.solutions[0]))
    marks = len("<think></think>") - 3  # a token each, and the end token
    longest = max(len(task.demonstration(hardest, random.Random(seed), doubt=1.0)) - marks for seed in range(20))
    plain = len(task.demonstration(hardest, random.Random(0))) - marks
    assert longest <= stages["shortest"].sampling.max_tokens, "every demonstration can be sampled to its end"
    assert plain <= stages["rl"].rollout.max_tokens < longest, "the window is cut, and leaves room for every attempt once"


@pytest.mark.parametrize(
    ("completion", "looks"),
    [("1+1+1", 0.0), ("<think>a\n?a\nb\n?b</think>x", 2.0), ("<think>a\n?a", 1.0), ("<think>a?</think>x", 0.0), ("", 0.0)],
)
def test_second_looks(completion, looks):
    assert task.second_looks([""], [completion]) == [looks]
