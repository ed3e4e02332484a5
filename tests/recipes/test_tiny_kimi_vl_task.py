"""The tiny Kimi-VL's tasks: what pictures show, what the verifier accepts, what demonstrations do, and that held-out stays held out."""

from __future__ import annotations

import importlib
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from recipes.schema import load_recipe
from recipes.tiny_thinking import task as search

FOLDER = Path(__file__).parents[2] / "recipes" / "tiny_kimi_vl"
OWN = ("task", "scans", "drawing")


@pytest.fixture(scope="module")
def task() -> Iterator[ModuleType]:
    """The recipe's `task.py`, imported as a run does: with the files beside it within reach."""
    for name in OWN:  # another test may have imported modules of these names
        sys.modules.pop(name, None)
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("task")
    finally:
        sys.path.remove(str(FOLDER))
        for name in OWN:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def scans(task: ModuleType) -> ModuleType:
    return sys.modules["scans"]


@pytest.fixture(scope="module")
def drawing(task: ModuleType) -> ModuleType:
    return sys.modules["drawing"]


@pytest.fixture(scope="module")
def joint(task: ModuleType) -> list[dict[str, Any]]:
    return list(task.joint_sft(seed=3, count=1_500))


@pytest.fixture(scope="module")
def demonstrations(task: ModuleType) -> list[dict[str, Any]]:
    return list(task.long_cot_sft(seed=3, count=3_000))


@pytest.fixture(scope="module")
def problems(task: ModuleType) -> dict[str, list[dict[str, Any]]]:
    return {
        "train": list(task.train_problems(seed=1, text=40, pictures=40, scans_each=60)),
        "text": list(task.held_out_text()),
        "pictures": list(task.held_out_pictures()),
    }


def _question_and_answer(row: dict[str, Any]) -> tuple[str, str]:
    """The user's text without pictures, and the assistant's."""
    content, answer = (message["content"] for message in row["messages"])
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content), answer


def _score(module: ModuleType, metric: str, completion: Any, **columns: Any) -> float | None:
    row = {"task": "text", "digits": "616", "target": 3, "lines": "", "id": "a", **columns}
    (score,) = getattr(module, metric)(prompts=["x"], completions=[completion], **{key: [value] for key, value in row.items()})
    return score


CHART = {"task": "chart", "digits": "", "target": 2, "lines": "0+5=5\n5+6=1\n1+1=2"}


# --- pictures ---------------------------------------------------------------------------------------------------------------


def test_every_character_has_a_cell_of_its_own(drawing: ModuleType) -> None:
    """Something is drawn in the middle of each cell, and nothing on the outermost pixels, so that no character reaches into another cell."""
    for seed in range(30):
        picture = drawing.draw_text(["0123456", "789+-*="], random.Random(seed))
        assert picture.mode == "RGB" and picture.size == (7 * 28, 2 * 28)
        cells = np.asarray(picture, np.int64).reshape(2, 28, 7, 28, 3).transpose(0, 2, 1, 3, 4)
        drawn = np.abs(cells - cells[:, :, :1, :1]).max(-1) > 60
        assert drawn[:, :, 5:23, 5:23].any((2, 3)).all()
        frame = np.ones((28, 28), bool)
        frame[1:27, 1:27] = False
        assert not drawn[:, :, frame].any()


def test_pictures_vary_but_repeat(drawing: ModuleType) -> None:
    grid = [[("red", "circle"), ("green", "square"), ("blue", "triangle")]]
    for draw, shown in ((drawing.draw_text, ["6+1"]), (drawing.draw_shapes, grid), (drawing.draw_bars, [3, 9])):
        one, again, other = (draw(shown, random.Random(seed)).tobytes() for seed in (1, 1, 2))
        assert one == again != other


def test_shapes_have_their_colours(drawing: ModuleType) -> None:
    """Red is the largest value at the centre of a red shape, and so on."""
    for seed in range(20):
        grid = [
            [("red", "circle"), ("green", "square"), ("blue", "triangle")],
            [("blue", "square"), ("red", "triangle"), ("green", "circle")],
        ]
        pixels = np.asarray(drawing.draw_shapes(grid, random.Random(seed)))
        strongest = pixels[15::28, 14::28].argmax(-1)
        assert strongest.tolist() == [[0, 1, 2], [2, 0, 1]]


def test_bars_have_their_lengths(drawing: ModuleType) -> None:
    for seed in range(20):
        lengths = [random.Random(seed).randint(1, 9) for _ in range(4)]
        pixels = np.asarray(drawing.draw_bars(lengths, random.Random(seed)), np.int64)
        middle = pixels[14::28]
        coloured = (middle.max(-1) - middle.min(-1) > 90).sum(-1)
        assert coloured.tolist() == [9 * length + 1 for length in lengths]


# --- verifier and metrics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "columns", "score"),
    [
        ("6+1+6", {}, 1.0),
        ("6*1+6", {}, 0.0),
        ("◁think▷6+1=7+6=3-3=0◁/think▷6+1+6", {}, 1.0),
        ("◁think▷6+1=7+6=3-3=0◁/think▷6+1+6", {"task": "picture"}, 1.0),
        ("◁think▷6+1=7+6=3-3=0", {}, 0.0),  # never closed
        ("2", CHART, 1.0),
        ("◁think▷whatever◁/think▷ 2\n", CHART, 1.0),
        ("3", CHART, 0.0),
        ("12", CHART, 0.0),
        ("6+1+6", {**CHART, "target": 3}, 0.0),
        ("◁think▷2", CHART, 0.0),
        ("", CHART, 0.0),
    ],
)
def test_verifier(task: ModuleType, completion: str, columns: dict[str, Any], score: float) -> None:
    assert _score(task, "right_answer", completion, **columns) == score
    assert _score(task, "right_answer", [{"role": "assistant", "content": completion}], **columns) == score
    scan = columns.get("task") == "chart"
    assert _score(task, "right_scan", completion, **columns) == (score if scan else None)
    assert _score(task, "right_search", completion, **columns) == (None if scan else score)


@pytest.mark.parametrize(
    ("completion", "gave_up", "flawed"),
    [
        ("◁think▷0+5=5\n5+6=1\n1+1=2◁/think▷2", 0, 0),
        ("◁think▷0+5=5?◁/think▷5", 1, 0),
        ("◁think▷0+5=5\n5+6=1?◁/think▷1", 1, 0),
        ("◁think▷0+5=5\n5+6=1◁/think▷1", 0, 1),  # stops early without saying so
        ("◁think▷0+5=5\n5+6=1\n1+1=2?◁/think▷2", 1, 1),  # gives up at the end
        ("◁think▷0+5=5\n5+6=1\n1+1=2◁/think▷3", 0, 1),
        ("◁think▷0+5=5\n5+7=2\n2+1=3◁/think▷3", 0, 1),  # misread
        ("◁think▷0+5=5\n5+6=1\n1+1=2\n2+1=3◁/think▷3", 0, 1),  # a row too many
        ("◁think▷◁/think▷2", 0, 1),
        ("◁think▷?◁/think▷", 1, 1),
        ("2", 0, 1),
    ],
)
def test_metrics_of_scans(task: ModuleType, completion: str, gave_up: float, flawed: float) -> None:
    assert _score(task, "gave_up", completion, **CHART) == gave_up
    assert _score(task, "flawed_thinking", completion, **CHART) == flawed


def test_flawed_searches(task: ModuleType) -> None:
    assert _score(task, "flawed_thinking", "◁think▷6+1=7+6=3-3=0◁/think▷6+1+6", task="picture") == 0.0
    assert _score(task, "flawed_thinking", "◁think▷6+1=7+6=3-3=1◁/think▷6+1+6", task="picture") == 1.0


# --- supervised data --------------------------------------------------------------------------------------------------------


def test_pictured_and_written_worksheets_are_right(joint: list[dict[str, Any]]) -> None:
    assert {row["source"] for row in joint} == {"reading", "naming", "worksheets", "scanning", "direct"}
    pictured = 0
    for row in joint:
        question, answer = _question_and_answer(row)
        if row["source"] == "worksheets":
            lines = answer.split("\n")
            for line in lines:
                steps = re.findall(r"(?=(?:^|=)(\d)([+*-])(\d)=(\d))", line)
                assert steps and all(search.apply(int(a), operator, int(b)) == int(c) for a, operator, b, c in steps)
            pictured += bool(row["images"])
            if row["images"]:
                assert row["images"][0].height == 28 * len(lines) and not question
        if row["source"] == "reading":
            assert row["images"][0].width == 28 * len(answer)
    assert 0.4 < pictured / sum(row["source"] == "worksheets" for row in joint) < 0.6


def test_demonstrations_are_sound_and_mostly_give_up(task: ModuleType, demonstrations: list[dict[str, Any]]) -> None:
    gave_up = {True: [], False: []}
    for row in demonstrations:
        question, answer = _question_and_answer(row)
        gave_up[question.endswith("?") and not question[0].isdigit()].append("?◁/think▷" in answer)
        if not row["images"]:
            columns = {"digits": question[:3], "target": int(question[4])}
            assert _score(task, "flawed_thinking", answer, **columns) == 0.0
            assert _score(task, "right_answer", answer, **columns) == float("?" not in answer)
    assert all(0.5 < sum(marks) / len(marks) < 0.8 for marks in gave_up.values())


@pytest.mark.parametrize("give_up", [0.0, 0.5, 1.0])
def test_scans_are_demonstrated_soundly(task: ModuleType, scans: ModuleType, give_up: float) -> None:
    rng = random.Random(0)
    for _ in range(300):
        scan = scans.random_scan(rng, rng.choice(("count", "chart")), held_out=False)
        answer = scans.demonstration(scan, give_up, rng)
        columns = {"task": scan.task, "target": scan.total, "lines": "\n".join(scan.lines)}
        assert _score(task, "flawed_thinking", answer, **columns) == 0.0
        if give_up in (0.0, 1.0):
            assert _score(task, "gave_up", answer, **columns) == give_up
        if "?" not in answer:
            assert _score(task, "right_answer", answer, **columns) == 1.0


def test_a_count_counts_red_shapes(scans: ModuleType) -> None:
    grid = ((("red", "circle"), ("green", "square"), ("red", "triangle")), (("blue", "circle"), ("red", "circle"), ("green", "circle")))
    rng = random.Random(0)
    while (scan := scans.random_count(rng, 2)).amounts != (2, 1):
        pass
    assert [[colour for colour, _ in row].count("red") for row in scan.grid] == [2, 1]
    assert scans.Scan("count", "red?", (2, 1), grid).lines == ("0+2=2", "2+1=3")
    assert scan.total == 3


# --- problems ---------------------------------------------------------------------------------------------------------------


def test_problems_are_labelled(problems: dict[str, list[dict[str, Any]]]) -> None:
    kinds = {part: {row["task"] for row in rows} for part, rows in problems.items()}
    assert kinds == {"train": {"text", "picture", "count", "chart"}, "text": {"text"}, "pictures": {"picture", "count", "chart"}}
    for rows in problems.values():
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            assert 0 <= row["difficulty"] < 1
            assert len(row["images"]) == (row["task"] != "text")
            if row["lines"]:
                assert row["target"] == int(row["lines"][-1])
                assert row["images"][0].height == 28 * len(row["lines"].split("\n"))


def test_held_out_is_in_no_training_row(
    joint: list[dict[str, Any]], demonstrations: list[dict[str, Any]], problems: dict[str, list[dict[str, Any]]], task: ModuleType
) -> None:
    held_out = {row["id"].split(" ", 1)[1] for part in ("text", "pictures") for row in problems[part]}
    train = {row["id"].split(" ", 1)[1] for row in problems["train"]}
    for row in [*joint, *demonstrations]:
        question, answer = _question_and_answer(row)
        text = f"{question}\n{answer}"
        train |= {f"{digits}={target}?" for digits, target in re.findall(r"(\d{3})=(\d)\?", text)}
        train |= {f"{a}{b}{c}={target}?" for a, b, c, target in re.findall(r"(\d)[+*-](\d)=\d[+*-](\d)=\d-(\d)=\d", text)}
    assert len(train) > 1_000 and not train & held_out


def test_held_out_scans_are_a_part_of_their_own(scans: ModuleType) -> None:
    rng = random.Random(0)
    for held_out in (True, False):
        for kind in ("count", "chart"):
            assert all(scans.random_scan(rng, kind, held_out=held_out).held_out == held_out for _ in range(30))


def test_generators_repeat(task: ModuleType) -> None:
    def flat(rows: Any) -> list[Any]:
        return [{**row, "images": [image.tobytes() for image in row["images"]]} for row in rows]

    for name, few in (
        ("joint_sft", {"count": 30}),
        ("long_cot_sft", {"count": 30}),
        ("train_problems", {"text": 9, "pictures": 9, "scans_each": 9}),
    ):
        generator = getattr(task, name)
        one, again, other = (flat(generator(seed=seed, **few)) for seed in (1, 1, 2))
        assert one == again != other
    assert flat(task.held_out_pictures(seed=1)) == flat(task.held_out_pictures(seed=2))


def test_recipe_is_short_and_valid() -> None:
    path = FOLDER / "recipe.yaml"
    assert len(path.read_text().splitlines()) <= 100
    recipe = load_recipe(path)
    assert [stage.kind for stage in recipe.stages].count("rl") == 1
