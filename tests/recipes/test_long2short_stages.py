"""The stages `rejection`, `merge` and `dpo` from recipe to files: an engine that answers by a script, tensors of a few numbers, no Ray."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fakes import ListTracker
from safetensors.torch import load_file, save_file
from test_data_stages import context, write_problems

from bregman.config import parse
from bregman.data.config import ParquetSource
from bregman.data.sources import read_conversations, read_rows
from bregman.errors import DataError, RecipeError
from bregman.types import Problem
from recipes import model_stages, workers
from recipes.context import data_file
from recipes.model_stages import run_dpo, run_merge
from recipes.rejection import run_rejection
from recipes.schema import Recipe, needs
from sft.dpo import read_pairs

SHORTEST = {
    "name": "shortest",
    "kind": "rejection",
    "keep": "shortest",
    "problems": {"kind": "jsonl", "path": "problems.jsonl"},
    "rewards": {"functions": [{"function": "exact_answer"}]},
    "sampling": {"num_samples": 4, "max_tokens": 64},
    "chunk": 2,
}
PAIRS = {**SHORTEST, "name": "pairs", "keep": "pairs"}
DPO = {"name": "dpo", "kind": "dpo", "pairs": {"kind": "stage", "stage": "pairs"}, "max_length": 128, "learning_rate": 1e-3}
MERGE = {"name": "merge", "kind": "merge", "models": [{"stage": "start", "weight": 3}, {"path": "other"}]}

ANSWERS = {  # the scorer takes what ends in "right" as right
    "p0": ["so and so right", " so right", "wrong", "right"],
    "p1": ["wrong", "so wrong", "wrong", "wrong"],
    "p2": ["right", "right", "right", "right"],
    "p3": ["wrong", "wrong", "so right", "so on right"],
    "p4": ["right", "wrong wrong", "wrong", "a right"],
}


def answer(problem, index, prompt):
    return ANSWERS[problem.id][index]


def prepared(tmp_path, stages, engine_answer=answer):
    write_problems(tmp_path, [f"sum {letter}" for letter in "abcde"])
    return context(tmp_path, stages, engine_answer)


def run(shared, name):
    """Run a rejection stage; its folder and its report."""
    index = [stage.name for stage in shared.recipe.stages].index(name)
    folder = shared.folder.stage_folder(index, name)
    run_rejection(shared, shared.recipe.stages[index], shared.start, folder)
    return folder, json.loads((folder / "report.json").read_text())


def rows_of(folder, tmp_path):
    return list(read_rows(ParquetSource(path=str(data_file(folder))), tmp_path, 0))


def test_the_shortest_right_answers_become_conversations(tmp_path):
    shared = prepared(tmp_path, [SHORTEST])
    folder, report = run(shared, "shortest")
    conversations = read_conversations(ParquetSource(path=str(data_file(folder))), tmp_path, 0)
    assert [(c.id, [m["content"] for m in c.messages]) for c in conversations] == [
        ("p0", ["sum a", "right"]),
        ("p2", ["sum c", "right"]),
        ("p3", ["sum d", "so right"]),
        ("p4", ["sum e", "right"]),
    ]
    assert report["fates"] == {"kept": 4, "never_right": 1}
    assert report["mean_tokens_chosen"] == pytest.approx((5 + 5 + 8 + 5) / 4)
    assert report["mean_tokens_sampled"] == pytest.approx(sum(map(len, sum(ANSWERS.values(), []))) / 20)
    assert shared.tracker.rows[-1][1]["yield"] == pytest.approx(0.8)


def test_pairs_are_what_preference_tuning_reads(tmp_path):
    shared = prepared(tmp_path, [{**PAIRS, "max_pairs": 2}])
    folder, report = run(shared, "pairs")
    assert [(row["id"], row["chosen"], row["rejected"], row["rejected_is_right"]) for row in rows_of(folder, tmp_path)] == [
        ("p0#0", "right", "so and so right", True),  # the two longest of three
        ("p0#1", "right", "so right", True),
        ("p3#0", "so right", "wrong", False),
        ("p4#1", "right", "wrong wrong", False),
        ("p4#2", "right", "wrong", False),
    ]
    assert report["fates"] == {"kept": 3, "never_right": 1, "nothing_to_reject": 1}
    pairs = read_pairs(ParquetSource(path=str(data_file(folder))), tmp_path, shared.tokenizer, 0, 128)
    assert [shared.tokenizer.decode(pair.rejected_ids) for pair in pairs[:2]] == ["so and so right<|im_end|>", "so right<|im_end|>"]


def test_a_killed_stage_makes_the_same_file(tmp_path):
    class Killed(Exception):
        pass

    def dying(problem, index, prompt):
        if dies[0] and problem.id == "p4":
            raise Killed
        return answer(problem, index, prompt)

    dies = [True]
    shared = prepared(tmp_path, [SHORTEST, {**SHORTEST, "name": "whole", "chunk": 5}], dying)
    with pytest.raises(Killed):
        run(shared, "shortest")
    dies[0] = False
    calls = shared.workers.engine.calls
    killed, report = run(shared, "shortest")
    assert shared.workers.engine.calls == calls + 1, "only the chunk that was missing"
    whole, expected = run(shared, "whole")
    assert rows_of(killed, tmp_path) == rows_of(whole, tmp_path)
    assert report == expected


@pytest.mark.parametrize(
    ("change", "sampled_again"),
    [
        ({}, False),
        ({"longer": 2.0}, False),
        ({"sampling": {"num_samples": 4, "max_tokens": 64, "temperature": 0.9}}, True),
        ({"start_from": "merge"}, True),
    ],
)
def test_samples_of_the_same_question_are_shared(tmp_path, change, sampled_again):
    shared = prepared(tmp_path, [MERGE, {**SHORTEST, "start_from": "start"}, {**PAIRS, "start_from": "start", **change}])
    run(shared, "shortest")
    shared.workers.engine.calls = 0
    folder, _ = run(shared, "pairs")
    assert bool(shared.workers.engine.calls) == sampled_again
    assert (folder / "parts").exists() == sampled_again
    assert {row["chosen"] for row in rows_of(folder, tmp_path)} == {"right", "so right"}


def test_samples_of_an_unfinished_stage_are_not_shared(tmp_path):
    shared = prepared(tmp_path, [SHORTEST, PAIRS])
    shared.folder.stage_folder(0, "shortest").joinpath("parts").mkdir(parents=True)
    run(shared, "pairs")
    assert shared.workers.engine.calls == 3


def test_pairs_with_images_stop_before_sampling(tmp_path, monkeypatch):
    shared = prepared(tmp_path, [PAIRS])
    shown = Problem(id="p1", messages=({"role": "user", "content": "sum"},), prompt_ids=(1,), images=("a.png",))
    monkeypatch.setattr(type(shared), "problems", lambda *_: [shown])
    with pytest.raises(DataError, match=r"problem p1: has images.*keep: shortest"):
        run(shared, "pairs")
    assert shared.workers.engine.calls == 0


def test_no_right_answer_is_one_line(tmp_path):
    shared = prepared(tmp_path, [SHORTEST], lambda *_: "wrong")
    with pytest.raises(DataError, match=r"stage shortest: no row is left; see its report\.json"):
        run(shared, "shortest")


@pytest.mark.parametrize("sampling", [{"num_samples": 1, "max_tokens": 64}, {"num_samples": 8, "max_tokens": 64, "temperature": 0}])
def test_one_answer_is_no_choice(tmp_path, sampling):
    with pytest.raises(RecipeError, match="there is nothing to choose from"):
        prepared(tmp_path, [{**SHORTEST, "sampling": sampling}])


def test_merge_averages_the_models_it_names(tmp_path):
    shared = prepared(tmp_path, [MERGE])
    for name, value in (("model", 1.0), ("other", 5.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
        save_file({"weight": torch.full((2,), value)}, tmp_path / name / "model.safetensors")
    output = shared.folder.stage_folder(0, "merge")
    run_merge(shared, shared.recipe.stages[0], output)
    assert load_file(output / "model" / "model.safetensors")["weight"].tolist() == [2.0, 2.0]
    assert (output / "model" / "config.json").read_text() == "model"
    assert shared.tracker.notes == ["averaged 1 tensors of 2 models"]


def test_a_merge_needs_the_models_it_names(tmp_path):
    shared = prepared(tmp_path, [MERGE, {**MERGE, "name": "again", "models": [{"stage": "merge"}, {"stage": "start"}]}])
    assert needs(shared.recipe, 1) == {"merge", "start"}
    for models, expected in (
        ([{"stage": "merge"}, {"stage": "later"}], r"models\[1\]\.stage: no earlier stage `later` leaves a model"),
        ([{"stage": "start"}, {}], "give `stage` or `path`"),
        ([{"stage": "start"}], "at least 2"),
    ):
        with pytest.raises(RecipeError, match=expected):
            recipe = shared.recipe.model_dump(mode="json")
            parse(Recipe, {**recipe, "stages": [MERGE, {**MERGE, "name": "again", "models": models}]}, "recipe")


def test_dpo_trains_on_the_pairs_of_a_stage_and_logs_every_step(tmp_path, monkeypatch):
    shared = prepared(tmp_path, [PAIRS, DPO])
    run(shared, "pairs")
    called = {}

    def run_alone(function, config, model, output, pairs, **options):
        called.update(options, model=model, output=output, pairs=pairs)
        return [{"loss": 0.69, "rewards/margins": 0.0, "epoch": 0.5}, {"loss": 0.5, "rewards/margins": 0.2, "epoch": 1.0}]

    monkeypatch.setattr(model_stages.cluster, "run_alone", run_alone)
    shared.workers.lend_gpus_of_learner = lambda: called.update(lent=True)
    output = tmp_path / "out"
    run_dpo(shared, shared.recipe.stages[1], shared.start, output)
    assert called["lent"]
    assert (called["model"], called["output"], called["on_gpu"], len(called["pairs"])) == (shared.start, output / "model", False, 6)
    assert shared.tracker.rows[-2:] == [(0, {"loss": 0.69, "dpo/margins": 0.0}), (1, {"loss": 0.5, "dpo/margins": 0.2})]
    assert shared.tracker.planned == 2


def test_dpo_of_a_model_with_images_is_one_line(tmp_path):
    shared = replace(prepared(tmp_path, [PAIRS, DPO]), encoder=object())
    with pytest.raises(RecipeError, match="stage dpo: preference tuning takes text models, and this one takes images"):
        run_dpo(shared, shared.recipe.stages[1], shared.start, tmp_path / "out")


def test_dpo_needs_a_stage_that_makes_pairs(tmp_path):
    with pytest.raises(RecipeError, match="no earlier stage `pairs` makes a data set"):
        prepared(tmp_path, [DPO])
    with pytest.raises(RecipeError, match="stage `shortest` makes no preference pairs"):
        prepared(tmp_path, [SHORTEST, {**DPO, "pairs": {"kind": "stage", "stage": "shortest"}}])
    sft = {
        "name": "sft",
        "kind": "sft",
        "steps": 1,
        "tokens_per_step": 64,
        "max_length": 64,
        "optimizer": {"kind": "adamw", "learning_rate": 1e-3},
    }
    with pytest.raises(RecipeError, match="stage `pairs` makes preference pairs; use `keep: shortest`"):
        prepared(tmp_path, [PAIRS, {**sft, "sources": [{"kind": "stage", "stage": "pairs"}]}])
    prepared(tmp_path, [PAIRS, {**sft, "sources": [{"kind": "stage", "stage": "pairs", "columns": {"completion": "chosen"}}]}])


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_learner_whose_gpus_were_lent_is_started_anew(tmp_path, monkeypatch, gpus):
    started, closed = [], []

    def start(learner, cluster_config):
        started.append(SimpleNamespace(ready=lambda: None, close=lambda: closed.append(1)))
        return started[-1]

    monkeypatch.setattr(workers.cluster, "start", lambda config: None)
    monkeypatch.setattr(workers.LearnerWorkers, "start", start)
    recipe = prepared(tmp_path, [MERGE]).recipe
    recipe = recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update={"gpus_per_learner_worker": gpus})})
    group = workers.Workers(recipe, tmp_path, None, ListTracker(), engine=False)
    first = group.learner
    group.lend_gpus_of_learner()
    assert (len(closed), group.learner is first, len(started)) == ((1, False, 2) if gpus else (0, True, 1))
