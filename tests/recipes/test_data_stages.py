"""The stages `curate` and `long_cot` from recipe to files, on an engine that answers by a script."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from chat_server import Server
from fakes import FunctionScorer, ListTracker

from bregman.config import parse
from bregman.data.config import ParquetSource
from bregman.data.images import open_image
from bregman.data.sources import read_conversations, read_problems, read_rows
from bregman.errors import DataError, RecipeError
from bregman.models.kimi_vl.image_processing import ImageSettings, KimiVLImageEncoder
from bregman.models.kimi_vl.tokenizer import IMAGE_PLACEHOLDER, tiny_tokenizer
from bregman.models.tiny.tokenizer import character_tokenizer
from bregman.tracking.run_folder import RunFolder
from bregman.types import Group, Segment, Trajectory
from recipes.context import Context, data_file
from recipes.data_stages import fate_table, run_curate, run_long_cot
from recipes.schema import Recipe, needs

ALPHABET = "0123456789+-=?abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,()\n"
REWARDS = {"functions": [{"function": "exact_answer"}]}


class ScriptedEngine:
    """`answer(problem, sample index, prompt text)` is the response."""

    def __init__(self, tokenizer, answer):
        self.tokenizer, self.answer, self.loaded, self.calls = tokenizer, answer, [], 0

    def load_weights(self, source, version):
        self.loaded.append(source)

    def rollout(self, problems, sampling, *, seed):
        self.calls += 1
        return [Group(problem=p, trajectories=tuple(self._one(p, index) for index in range(sampling.num_samples))) for p in problems]

    def _one(self, problem, index):
        text = self.answer(problem, index, self.tokenizer.decode(problem.prompt_ids))
        ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        segments = (Segment(policy_version=0, length=len(ids)),)
        return Trajectory(
            problem_id=problem.id,
            sample_index=index,
            token_ids=ids,
            logprobs=(0.0,) * len(ids),
            segments=segments,
            finish_reason="stop",
            text=text,
        )


def context(tmp_path, stages, engine_answer):
    tokenizer = character_tokenizer(ALPHABET)
    recipe = parse(
        Recipe,
        {
            "name": "test",
            "output_dir": str(tmp_path / "run"),
            "model": {"kind": "tiny_qwen3", "alphabet": ALPHABET},
            "engine": {"max_model_len": 512},
            "stages": stages,
        },
        "recipe",
    )
    engine = ScriptedEngine(tokenizer, engine_answer)
    right = FunctionScorer(lambda t: float(t.text.endswith("right")) if t.finish_reason == "stop" else None)
    workers = SimpleNamespace(engine=engine, rewards=SimpleNamespace(scorer=lambda rewards, base: right))
    return Context(
        recipe=recipe,
        base=tmp_path,
        folder=RunFolder(tmp_path / "run"),
        start=tmp_path / "model",
        tracker=ListTracker(),
        tokenizer=tokenizer,
        encoder=None,
        workers=workers,
    )


def write_problems(tmp_path, texts, **columns):
    rows = [{"id": f"p{n}", "prompt": text, "answer": str(n), **columns} for n, text in enumerate(texts)]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))


CURATE = {
    "name": "curate",
    "kind": "curate",
    "problems": {"kind": "jsonl", "path": "problems.jsonl"},
    "rewards": REWARDS,
    "sampling": {"num_samples": 4, "max_tokens": 16},
    "hack": {"sampling": {"num_samples": 2, "max_tokens": 8}},
    "chunk": 2,
}
LONG_COT = {
    "name": "cot",
    "kind": "long_cot",
    "problems": {"kind": "stage", "stage": "curate"},
    "rewards": REWARDS,
    "templates": ["plain", "mine"],
    "own_templates": {"mine": {"user": "Plan. {question}"}},
    "sampling": {"num_samples": 2, "max_tokens": 64},
    "quality": {"traits": {"check": ["so"]}, "min_traits": 1, "max_repeated_share": 1.0},
    "chunk": 3,
}


def test_curate_then_long_cot(tmp_path):
    texts = ["Prove that a = b", "first sum", "second sum", "third sum", "first SUM", "fourth sum"]
    write_problems(tmp_path, texts, level=3)

    def answer(problem, index, prompt):
        if "final answer only" in prompt:
            return "right" if problem.id == "p2" else "wrong"
        if "Plan." in prompt:
            return f"<think>so planned {index}</think>right"
        return "<think>hm</think>right" if index < 2 else "wrong"

    shared = context(tmp_path, [CURATE, LONG_COT], answer)
    folder = shared.folder.stage_folder(0, "curate")
    run_curate(shared, shared.recipe.stages[0], shared.start, folder)
    report = json.loads((folder / "report.json").read_text())
    fates = {fate: count for fate, count in report["fates"].items() if count}
    assert fates == {"proof": 1, "near_duplicate": 1, "easy_to_hack": 1, "kept": 3}
    assert {row["id"]: row["fate"] for row in read_rows(ParquetSource(path=str(folder / "fates.parquet")), tmp_path, 0)} == {
        "p0": "proof",
        "p1": "kept",
        "p2": "easy_to_hack",
        "p3": "kept",
        "p4": "near_duplicate",
        "p5": "kept",
    }
    problems = read_problems(ParquetSource(path=str(data_file(folder))), tmp_path, shared.tokenizer, 0, max_prompt_tokens=400)
    assert [(p.id, p.difficulty, p.answer, p.columns["level"], p.columns["domain"]) for p in problems] == [
        (identity, 0.5, identity[1], 3, "other") for identity in ("p1", "p3", "p5")
    ]
    last = shared.tracker.rows[-1]
    assert last[0] == 4 and last[1]["fate/kept"] == 3 and last[1]["problems"] == 6, "2 chunks of hacks, 2 of difficulty, the verdict"
    assert any("easy_to_hack" in note for note in shared.tracker.notes)
    assert shared.workers.engine.loaded == [shared.start]

    assert needs(shared.recipe, 1) == {"curate", "start"}
    output = shared.folder.stage_folder(1, "cot")
    run_long_cot(shared, shared.recipe.stages[1], shared.start, output)
    report = json.loads((output / "report.json").read_text())
    assert (report["samples"], report["right"], sum(report["fates"].values())) == (12, 12, 12)
    assert report["templates"] == {"plain": {"too_few_traits": 6}, "mine": {"kept": 6}}
    conversations = read_conversations(ParquetSource(path=str(data_file(output))), tmp_path, 0)
    first = conversations[0]
    assert [message["content"] for message in first.messages] == ["first sum", "<think>so planned 0</think>right"], (
        "no template in the data"
    )
    row = read_rows(ParquetSource(path=str(data_file(output))), tmp_path, 0)[0]
    assert (row["problem_id"], row["template"], row["sample_index"], row["generator"]) == ("p1", "mine", 2, "model:start")


def test_a_resumed_stage_makes_the_same_file(tmp_path):
    write_problems(tmp_path, [f"sum number {'abcdefg'[n] * 3}" for n in range(7)])
    stage = {**LONG_COT, "problems": {"kind": "jsonl", "path": "problems.jsonl"}}

    class Killed(Exception):
        pass

    def answer(problem, index, prompt):
        if dies[0] and problem.id == "p4":
            raise Killed
        return f"<think>so {problem.id} {index} {len(prompt)}</think>right"

    dies, folders = [True], [tmp_path / "killed", tmp_path / "whole"]
    shared = context(tmp_path, [stage], answer)
    with pytest.raises(Killed):
        run_long_cot(shared, shared.recipe.stages[0], shared.start, folders[0])
    dies[0] = False
    for folder in folders:
        run_long_cot(shared, shared.recipe.stages[0], shared.start, folder)
    rows = [list(read_rows(ParquetSource(path=str(data_file(folder))), tmp_path, 0)) for folder in folders]
    assert rows[0] == rows[1]


def test_long_cot_from_an_endpoint(tmp_path, monkeypatch):
    write_problems(tmp_path, ["first sum"])
    said = {"choices": [{"message": {"content": "right", "reasoning_content": "so it is"}, "finish_reason": "stop"}]}
    server = Server(script={"all": said})
    generator = {"kind": "endpoint", "base_url": server.address, "model": "teacher", "api_key_env": "TEACHER_KEY"}
    stage = {**LONG_COT, "problems": {"kind": "jsonl", "path": "problems.jsonl"}, "generator": generator}
    shared = context(tmp_path, [stage], None)
    output = tmp_path / "out"
    with pytest.raises(RecipeError, match="`TEACHER_KEY` is not set"):
        run_long_cot(shared, shared.recipe.stages[0], shared.start, output)
    monkeypatch.setenv("TEACHER_KEY", "secret")
    run_long_cot(shared, shared.recipe.stages[0], shared.start, output)
    server.shutdown()
    server.server_close()
    (row,) = read_rows(ParquetSource(path=str(data_file(output))), tmp_path, 0)
    assert row["messages"][-1]["content"] == "<think>so it is</think>right"
    assert row["generator"] == "endpoint:teacher"
    assert {body["messages"][-1]["content"] for body in server.bodies} == {"first sum", "Plan. first sum"}
    assert json.loads((output / "report.json").read_text())["fates"]["duplicate"] == 3
    assert shared.workers.engine.loaded == [], "the rollout workers have no part in it"


def test_a_column_that_cannot_be_kept_is_said_before_anything_is_sampled(tmp_path):
    rows = [{"prompt": "one sum", "answer": "1", "extra": 1}, {"prompt": "two sums", "answer": "2", "extra": "x"}]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shared = context(tmp_path, [CURATE], None)
    with pytest.raises(DataError, match="column `extra`"):
        run_curate(shared, shared.recipe.stages[0], shared.start, tmp_path / "out")
    assert shared.workers.engine.calls == 0


def test_nothing_left_is_one_line_and_the_report_stays(tmp_path):
    write_problems(tmp_path, ["Prove it."])
    shared = context(tmp_path, [CURATE], None)
    with pytest.raises(DataError, match=r"no row is left; see its report\.json"):
        run_curate(shared, shared.recipe.stages[0], shared.start, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["fates"]["proof"] == 1


def test_problems_with_images_keep_them_through_both_stages(tmp_path):
    from PIL import Image

    tokenizer = tiny_tokenizer(ALPHABET)
    encoder = KimiVLImageEncoder(ImageSettings(in_token_limit=64), tokenizer.get_vocab()[IMAGE_PLACEHOLDER])
    for colour in ("red", "blue"):
        Image.new("RGB", (56, 28), colour).save(tmp_path / f"{colour}.png")
    rows = [
        {"id": colour, "prompt": "<image>what colour", "images": [f"{colour}.png"], "answer": colour} for colour in ("red", "blue", "red")
    ]
    (tmp_path / "problems.jsonl").write_text("\n".join(json.dumps(row | {"id": f"p{n}"}) for n, row in enumerate(rows)))
    shown: list[tuple[str, int]] = []

    def answer(problem, index, prompt):
        shown.append((prompt, len(problem.image_positions)))
        return "wrong" if "final answer only" in prompt else f"<think>so {problem.answer} {index}</think>right"

    shared = replace(context(tmp_path, [CURATE, LONG_COT], answer), tokenizer=tokenizer, encoder=encoder)
    shared.workers.engine.tokenizer = tokenizer
    folders = [shared.folder.stage_folder(index, name) for index, name in enumerate(("curate", "cot"))]
    run_curate(shared, shared.recipe.stages[0], shared.start, folders[0])
    assert json.loads((folders[0] / "report.json").read_text())["fates"]["near_duplicate"] == 1, "the same picture, not another"
    run_long_cot(shared, shared.recipe.stages[1], shared.start, folders[1])
    assert {places for _, places in shown} == {2}
    assert any("Plan. " in prompt for prompt, _ in shown)
    conversations = read_conversations(ParquetSource(path=str(data_file(folders[1]))), tmp_path, 0)
    assert [c.messages[0]["content"] for c in conversations] == [[{"type": "image"}, {"type": "text", "text": "what colour"}]] * 4
    colours = [open_image(c.images[0], "row").getpixel((0, 0)) for c in conversations]
    assert colours == [(255, 0, 0)] * 2 + [(0, 0, 255)] * 2


def test_the_table_adds_up():
    assert fate_table({"kept": 3, "wrong": 1, "duplicate": 0}, "samples").splitlines() == [
        "samples         4",
        "kept            3   75.0%",
        "wrong           1   25.0%",
    ]
