"""The command line: every recipe passes `check`; mistakes come back as one line and exit code 2, never as a traceback."""

import copy
import json
from pathlib import Path

import pytest
import yaml

from recipes import cli

ROOT = Path(__file__).parents[2]
RECIPES = sorted(ROOT.glob("recipes/*/*.yaml"))
SELF_CONTAINED = [path for path in RECIPES if path.parent.name != "kimi_vl_thinking"]  # those need weights and data of the user's

TASK = """
def problems(*, seed, count=4):
    for i in range(count):
        yield {"prompt": f"{i}+1", "answer": str(i + 1), "difficulty": i / 10}

def conversations(*, seed, count=4):
    for i in range(count):
        yield {"prompt": f"{i}+1", "completion": str(i + 1)}

def empty(*, seed):
    return iter(())

def broken(*, seed):
    yield {"prompt": "1", "answer": "1"}
    raise KeyError("colour")

def right(prompts, completions, answer, **columns):
    return [float(c[-1]["content"] == a) for c, a in zip(completions, answer)]

def raises(prompts, completions, **columns):
    raise ZeroDivisionError("no")

def hangs(prompts, completions, **columns):
    import time
    time.sleep(60)

def short(prompts, completions, **columns):
    return []
"""


def source(function: str, **args):
    return {"kind": "python", "path": f"task.py:{function}", "args": args}


def rewards(function: str, **changes):
    return {"functions": [{"function": function, **changes}]}


RECIPE = {
    "name": "small",
    "output_dir": "unused",
    "model": {"kind": "tiny_qwen3", "alphabet": "0123456789+"},
    "engine": {"max_model_len": 32},
    "stages": [
        {
            "kind": "sft",
            "name": "sft",
            "steps": 2,
            "tokens_per_step": 64,
            "max_length": 20,
            "sources": [source("conversations")],
            "optimizer": {"kind": "adamw", "learning_rate": 0.001},
        },
        {
            "kind": "rl",
            "name": "rl",
            "iterations": 2,
            "num_problems": 4,
            "optimizer_steps": 2,
            "problems": source("problems"),
            "rollout": {"num_samples": 4, "max_tokens": 8},
            "rewards": rewards("task.py:right"),
            "optimizer": {"kind": "adamw", "learning_rate": 0.001},
        },
    ],
}


GATE = {
    "metric": "acuracy",
    "at_least": 0.5,
    "extend_steps": 1,
    "evaluation": {"problems": source("problems"), "sampling": {"max_tokens": 8}, "rewards": rewards("task.py:right")},
}


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "task.py").write_text(TASK)

    def write(change=lambda recipe: None) -> Path:
        data = copy.deepcopy(RECIPE)
        data["output_dir"] = str(tmp_path / "run")
        change(data)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(data))
        return path

    return write


def sft(**changes):
    return lambda data: data["stages"][0].update(changes)


def rl(**changes):
    return lambda data: data["stages"][1].update(changes)


def merge(*models):
    return lambda data: data["stages"].append({"kind": "merge", "name": "merged", "models": list(models)})


def one_line(capsys, code: int) -> str:
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("path", SELF_CONTAINED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_recipe_passes_check(path, capsys):
    assert cli.main(["check", str(path)]) == 0
    assert "the recipe is ready to run" in capsys.readouterr().out


def test_recipes_are_short():
    assert RECIPES
    for path in RECIPES:
        assert len(path.read_text().splitlines()) <= 100


def test_check_says_what_a_run_would_do(recipe, capsys):
    assert cli.main(["check", str(recipe(sft(too_long="skip", max_length=14, sources=[source("conversations", count=11)])))]) == 0
    text = capsys.readouterr().out
    assert "4 problems x 4 samples = 16 responses -> 2 optimizer steps of up to 2 groups (8 responses)" in text
    assert "right = 1" in text
    assert "11 rows: 9 used whole, 2 above max_length 14 skipped" in text


def test_check_warns_that_tau_has_no_effect_with_one_step(recipe, capsys):
    assert cli.main(["check", str(recipe(rl(optimizer_steps=1)))]) == 0
    assert "tau has no effect with one optimizer step per iteration" in capsys.readouterr().out
    assert cli.main(["check", str(recipe())]) == 0
    assert "tau has no effect" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (sft(sources=[source("conversation")]), "did you mean `conversations`"),
        (sft(sources=[{"kind": "python", "path": "tsk.py:conversations"}]), "tsk.py"),
        (sft(sources=[{"kind": "jsonl", "path": "missing.jsonl"}]), "missing.jsonl"),
        (sft(sources=[{"kind": "jsonl", "path": "rows.jsonl"}]), "rows.jsonl"),
        (sft(sources=[{**source("conversations"), "columns": {"completion": "ansr"}}]), "ansr"),
        (sft(sources=[source("empty")]), "task.py:empty"),
        (sft(sources=[source("broken")]), "colour"),
        (
            sft(max_length=13),
            "row 0: 14 tokens, max_length is 13 (4 of 4 conversations are longer); set max_length: 14, or too_long: skip (or truncate)",
        ),
        (sft(max_length=13, too_long="skip"), "no conversation is left"),
        (sft(optimizer={"kind": "moun", "learning_rate": 0.001}), "did you mean `muon`?"),
        (merge({"stage": "sft"}, {"stage": "rll"}), "models[1].stage: no earlier stage `rll` leaves a model; there is: start, sft, rl"),
        (merge({"stage": "sft"}, {"path": "missing"}), "missing; give a folder in Hugging Face format"),
        (merge({"stage": "sft"}, {"stage": "rl", "path": "x"}), "give `stage` or `path`, one of them"),
        (rl(start_from="merged"), "no earlier stage `merged` leaves a model; there is: start, sft"),
        (sft(name="start"), "`start` means the recipe's own model"),
        (rl(problems={"kind": "stage", "stage": "sft"}), "no earlier stage `sft` makes a data set; there is: none"),
        (sft(gate=GATE), "metric `acuracy` is not measured; choose one of accuracy"),
        (sft(sources=[source("conversations", cuont=3)]), "cuont"),
        (lambda data: data["model"].update(alphabet="01234567"), "+"),
        (lambda data: data["model"].update(kind="hf", path="no/such/folder"), "model"),
        (rl(problems=source("empty")), "task.py:empty"),
        (rl(rollout={"num_samples": 4, "max_tokens": 28}), "max_tokens"),
        (rl(rollout={"num_samples": 4, "max_tokens": 28}), "limit"),
        (rl(sampler={"kind": "curriculum", "phases": [{"start": 0, "min_difficulty": 0.9}]}), "no problem has a difficulty"),
        (rl(rewards=rewards("task.py:rigt")), "did you mean"),
        (rl(rewards=rewards("exact_anser")), "exact_answer"),
        (rl(rewards=rewards("task.py:raises")), "ZeroDivisionError: no"),
        (rl(rewards=rewards("task.py:hangs", timeout=1.0)), "no answer within 1"),
        (rl(rewards=rewards("task.py:short")), "short"),
        (rl(rollout={"num_samples": 4, "max_tokens": 8, "top_p": 0.9}), "top_p"),
        (rl(algorithm={"kind": "opmd", "tau": 0.0, "baseline": "logavgexp"}), "needs tau > 0"),
        (rl(algorithm={"kind": "omd"}), "did you mean `opmd`?"),
    ],
)
def test_check_finds_the_mistake(recipe, capsys, tmp_path, change, expected):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1", "completion": "2"}\n{"prompt": \n')
    path = recipe(change)
    if "max_tokens" in expected or expected == "limit":
        code = cli.main(["check", str(path), "--set", "engine.max_model_len=30"])
    else:
        code = cli.main(["check", str(path)])
    assert expected in one_line(capsys, code)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["check", "missing.yaml"], "missing.yaml: no such file"),
        (["run", "{recipe}", "--stage", "rll"], "no stage `rll`"),
        (["run", "{recipe}", "--stage", "rl"], "which is not finished"),
        (["run", "{recipe}", "--set", "sed=1"], "did you mean `seed`?"),
        (["eval", "{recipe}", "--model", "{folder}"], "no eval stage"),
        (["report", "{folder}"], "not a run folder"),
        (["export", "{folder}", "--to", "{folder}/out"], "not a run folder"),
    ],
)
def test_commands_say_what_is_wrong(recipe, capsys, tmp_path, arguments, expected):
    path = recipe()
    code = cli.main([argument.format(recipe=path, folder=tmp_path) for argument in arguments])
    assert expected in one_line(capsys, code)


class TestExport:
    @pytest.fixture
    def run_folder(self, tmp_path):
        folder = tmp_path / "run"
        (folder / "stages" / "00_sft" / "model").mkdir(parents=True)
        (folder / "stages" / "00_sft" / "model" / "config.json").write_text("{}")
        (folder / "recipe.resolved.yaml").write_text(yaml.safe_dump(RECIPE))
        return folder

    def test_copies_the_last_model(self, run_folder, tmp_path, capsys):
        assert cli.main(["export", str(run_folder), "--to", str(tmp_path / "out")]) == 0
        assert (tmp_path / "out" / "config.json").read_text() == "{}"
        assert str(tmp_path / "out") in capsys.readouterr().out

    @pytest.mark.parametrize(("stage", "expected"), [("rl", "stage `rl` has left no model"), ("x", "choose one of sft, rl")])
    def test_no_such_model(self, run_folder, tmp_path, capsys, stage, expected):
        code = cli.main(["export", str(run_folder), "--stage", stage, "--to", str(tmp_path / "out")])
        assert expected in one_line(capsys, code)

    def test_unfinished_stage_is_named(self, run_folder, tmp_path, capsys):
        (run_folder / "stages" / "01_rl" / "checkpoints" / "step_000003").mkdir(parents=True)
        code = cli.main(["export", str(run_folder), "--stage", "rl", "--to", str(tmp_path / "out")])
        assert "unfinished (its last checkpoint is at step 3)" in one_line(capsys, code)

    def test_never_overwrites(self, run_folder, tmp_path, capsys):
        code = cli.main(["export", str(run_folder), "--to", str(tmp_path)])
        assert "exists already" in one_line(capsys, code)


def test_a_bug_keeps_its_traceback(recipe, monkeypatch):
    monkeypatch.setattr(cli, "_check", lambda options: json.loads("{"))
    parser = cli._parser()
    options = parser.parse_args(["check", str(recipe())])
    options.command = cli._check
    monkeypatch.setattr(cli, "_parser", lambda: type("P", (), {"parse_args": lambda self, a: options})())
    with pytest.raises(json.JSONDecodeError):
        cli.main(["check"])
