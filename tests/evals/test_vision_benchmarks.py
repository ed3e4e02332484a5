"""MMMU, MATH-Vision and MathVista: rows in the published schemas read from Parquet, and their scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from bregman.data.benchmarks import ADAPTERS, BOXED, ONE_LETTER
from bregman.data.config import ParquetSource
from bregman.data.sources import read_problems
from bregman.errors import DataError
from bregman.models.kimi_vl.chat_template import IMAGE_PLACEHOLDER
from bregman.models.kimi_vl.image_processing import ImageSettings, KimiVLImageEncoder
from bregman.models.kimi_vl.tokenizer import tiny_tokenizer
from recipes.schema import EvalStage
from rewards.loader import load

PICTURE = Image.new("RGB", (28, 28), "red")
WIDE = Image.new("RGB", (56, 28), "blue")

MMMU: dict[str, Any] = {
    "id": "validation_Art_1",
    "question": "<image 1> Which is like <image 2>?",
    "options": "['<image 3>', 'two \"rows\" here', 'none']",
    "explanation": "",
    "image_1": PICTURE,
    "image_2": WIDE,
    "image_3": PICTURE,
    **{f"image_{number}": None for number in range(4, 8)},
    "img_type": "['Painting']",
    "answer": "B",
    "topic_difficulty": "Easy",
    "question_type": "multiple-choice",
    "subfield": "Art History",
}
MMMU_OPEN = {
    **MMMU,
    "id": "validation_Art_2",
    "question": "How wide is <image 1>?",
    "options": "[]",
    "answer": "['28', '28.0']",
    "question_type": "open",
}
MATHVISION: dict[str, Any] = {
    "id": "4",
    "question": "Which kite has the longest string?\n<image1>",
    "options": ["A", "B", "C"],
    "image": "images/4.jpg",
    "decoded_image": PICTURE,
    "answer": "C",
    "solution": None,
    "level": 2,
    "subject": "metric geometry - length",
}
MATHVISION_FREE = {**MATHVISION, "id": "5", "question": "How long? <image1> and <image2>", "options": [], "answer": "3\\sqrt{2}"}
MATHVISTA: dict[str, Any] = {
    "pid": "1",
    "question": "What is the average?",
    "image": "images/1.jpg",
    "decoded_image": PICTURE,
    "choices": None,
    "unit": "cm",
    "precision": 1.0,
    "answer": "14.6",
    "question_type": "free_form",
    "answer_type": "float",
    "metadata": {"category": "vqa"},
    "query": "Hint: a float, at the end.\nQuestion: What is the average? (Unit: cm)",
}
MATHVISTA_CHOICE = {
    **MATHVISTA,
    "pid": "2",
    "choices": ["larger than", "equal to"],
    "answer": "equal to",
    "question_type": "multi_choice",
    "answer_type": "text",
    "precision": None,
    "unit": None,
    "query": "Hint: a letter.\nQuestion: Is it?\nChoices:\n(A) larger than\n(B) equal to",
}


def problems(tmp_path: Path, name: str, rows: list[dict[str, Any]]) -> list[Any]:
    import datasets

    columns = {key: [row[key] for row in rows] for key in rows[0]}
    pictures = [key for key in columns if key.startswith("image_") or key == "decoded_image"]
    table = datasets.Dataset.from_dict({key: values for key, values in columns.items() if key not in pictures})
    for key in pictures:
        table = table.add_column(key, [None] * len(rows)).cast_column(key, datasets.Image())
        table = datasets.Dataset.from_list([{**row, key: columns[key][index]} for index, row in enumerate(table)], features=table.features)
    table.to_parquet(str(tmp_path / "test.parquet"))
    tokenizer = tiny_tokenizer("")
    encoder = KimiVLImageEncoder(ImageSettings(), tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER))
    source = ParquetSource(path="test.parquet", format=name)
    return read_problems(source, tmp_path, tokenizer, seed=0, max_prompt_tokens=2000, encoder=encoder)


def shown(problem: Any) -> str:
    """The user's turn with its images as [i]."""
    return "".join(part.get("text", "[i]") for part in problem.messages[0]["content"])


def test_mmmu(tmp_path: Path) -> None:
    choice, free = problems(tmp_path, "mmmu", [MMMU, MMMU_OPEN])
    assert shown(choice) == f'[i] Which is like [i]?\n\n(A) [i]\n(B) two "rows" here\n(C) none\n\n{BOXED} {ONE_LETTER}'
    assert [patches.grid for patches in choice.patches] == [(2, 2), (2, 4), (2, 2)]
    assert len(choice.image_positions) == 1 + 2 + 1
    assert (choice.id, choice.answer, choice.columns["subfield"]) == ("validation_Art_1", "B", "Art History")
    assert choice.columns["options"] == ["<image 3>", 'two "rows" here', "none"]
    # the images that the text does not show come first
    assert shown(free) == f"[i][i]How wide is [i]?\n\n{BOXED}"
    assert free.columns["answer"] == ["28", "28.0"]


def test_mathvision(tmp_path: Path) -> None:
    choice, free = problems(tmp_path, "mathvision", [MATHVISION, MATHVISION_FREE])
    assert shown(choice) == f"Which kite has the longest string?\n[i]\n{BOXED} {ONE_LETTER}"  # options that are letters are in the picture
    assert (choice.id, choice.answer, choice.columns["level"]) == ("4", "C", 2)
    assert shown(free) == f"How long? [i] and <image2>\n{BOXED} {ONE_LETTER}"
    written = ADAPTERS["mathvision"]({**MATHVISION, "options": ["4", "6", "8"]}, "row 0")
    assert written["messages"][0]["content"][-1]["text"].startswith("\n(A) 4\n(B) 6\n(C) 8\n")


def test_mathvista(tmp_path: Path) -> None:
    free, choice = problems(tmp_path, "mathvista", [MATHVISTA, MATHVISTA_CHOICE])
    assert shown(free) == "[i]" + MATHVISTA["query"]
    assert (free.id, free.answer, free.columns["precision"]) == ("1", "14.6", 1.0)
    assert (choice.answer, choice.columns["options"]) == ("equal to", ["larger than", "equal to"])


@pytest.mark.parametrize(
    ("changes", "query"),
    [
        (
            {},
            "Hint: Please answer the question requiring a floating-point number with one decimal place and provide the final value, "
            "e.g., 1.2, 1.3, 1.4, at the end.\nQuestion: What is the average? (Unit: cm)",
        ),
        (
            {"choices": ["x", "y"], "question_type": "multi_choice", "answer": "y", "answer_type": "text", "unit": None},
            "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.\n"
            "Question: What is the average?\nChoices:\n(A) x\n(B) y",
        ),
        (
            {"answer_type": "integer", "unit": ""},
            "Hint: Please answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end.\n"
            "Question: What is the average?",
        ),
    ],
)
def test_mathvista_without_a_query_column(changes: dict, query: str) -> None:
    row = ADAPTERS["mathvista"]({**MATHVISTA, "query": None, **changes}, "row 0")
    assert row["messages"][0]["content"] == [{"type": "image"}, {"type": "text", "text": query}]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("mmmu", {**MMMU, "image_2": None}, "shows `<image 2>`, and there is no such image"),
        ("mmmu", {**MMMU, "answer": "?"}, "not published .*`validation`"),
        ("mmmu", {**MMMU, "answer": "D"}, "'D' is none of its 3 options"),
        ("mmmu", {**MMMU, "options": "[broken"}, "its `options` is not a list"),
        ("mmmu", {**MMMU, "options": "{}[0]"}, "its `options` is not a list"),
        ("mmmu", {**MMMU, "question": " "}, "its `question` is empty"),
        ("mmmu", {"answer": "A"}, "its `question` is missing"),
        ("mathvision", {**MATHVISION, "decoded_image": None}, "there is no such image"),
        ("mathvision", {**MATHVISION, "question": "Q", "decoded_image": None}, "has no image"),
        ("mathvision", {**MATHVISION, "answer": "E"}, "none of its 3 options"),
        ("mathvista", {**MATHVISTA, "precision": None}, "its `precision` is None"),
        ("mathvista", {**MATHVISTA, "answer": ""}, "its `answer` is empty"),
        ("mathvista", {**MATHVISTA, "question_type": "other"}, "choose one of multi_choice, free_form"),
        ("mathvista", {**MATHVISTA_CHOICE, "answer": "less"}, "none of its choices"),
    ],
)
def test_bad_rows_are_named(name: str, row: dict, message: str) -> None:
    with pytest.raises(DataError, match=f"^the row: .*{message}"):
        ADAPTERS[name](row, "the row")


MMMU_SCORES = [
    (MMMU, "so \\boxed{B}", 1.0),
    (MMMU, "◁think▷it is A◁/think▷The answer is (B).", 1.0),
    (MMMU, 'The answer is two "rows" here', 1.0),
    (MMMU, "The answer is A", 0.0),
    (MMMU, "B? no: \\boxed{C}", 0.0),
    (MMMU, "◁think▷\\boxed{B}", 0.0),  # never stopped thinking
    (MMMU, "", 0.0),
    (MMMU_OPEN, "\\boxed{28}", 1.0),
    (MMMU_OPEN, "The answer is 28.004 pixels.", 1.0),
    (MMMU_OPEN, "\\boxed{28.1}", 0.0),
    (MMMU_OPEN, "29 or 28", 0.0),
    (MMMU_OPEN, "\\boxed{28 \\text{ cm}^2}", 1.0),
    (MMMU_OPEN, "\\boxed{28^2}", 0.0),
    ({**MMMU_OPEN, "answer": "Monet"}, "The answer is Claude Monet.", 1.0),
    ({**MMMU_OPEN, "answer": "Monet"}, "Not Monet. The answer is Manet.", 0.0),
    ({**MMMU_OPEN, "answer": "art"}, "The answer is party", 0.0),
]
MATHVISION_SCORES = [
    (MATHVISION, "\\boxed{C}", 1.0),
    (MATHVISION, "\\boxed{A}", 0.0),
    ({**MATHVISION, "options": ["4", "6", "8"]}, "\\boxed{8}", 1.0),
    (MATHVISION_FREE, "\\boxed{\\sqrt{18}}", 1.0),
    (MATHVISION_FREE, "\\boxed{3}", 0.0),
]
MATHVISTA_SCORES = [
    (MATHVISTA, "The answer is 14.6 cm", 1.0),
    (MATHVISTA, "\\boxed{14.62}", 1.0),  # rounded to one decimal
    (MATHVISTA, "\\boxed{14.66}", 0.0),
    (MATHVISTA, "14 or 15", 0.0),
    ({**MATHVISTA, "answer": "1.20", "precision": 2.0}, "\\boxed{1.2}", 1.0),
    ({**MATHVISTA, "answer": "0.5", "precision": 1.0}, "\\boxed{\\frac{1}{2}}", 1.0),
    ({**MATHVISTA, "answer": "-3.5", "precision": 1.0}, "\\boxed{-3\\frac{1}{2}}", 1.0),
    ({**MATHVISTA, "answer": "30.5", "precision": 1.0}, "\\boxed{3\\frac{1}{2}}", 0.0),
    *(({**MATHVISTA, "answer": "9.8", "precision": 1.0}, f"The answer is 9.8 {unit}", 1.0) for unit in ("m/s^2", "m s^{-2}", "cm2", "in³")),
    ({**MATHVISTA, "answer": "200", "answer_type": "integer"}, "Answer: 2e2", 1.0),
    ({**MATHVISTA, "answer": "1200", "answer_type": "integer"}, "The answer is $1,200$.", 1.0),
    ({**MATHVISTA, "answer": "7", "answer_type": "integer"}, "Answer: 7.9", 1.0),  # decimals are cut off, as published
    ({**MATHVISTA, "answer": "7", "answer_type": "integer"}, "Answer: -7", 0.0),
    ({**MATHVISTA, "answer": "7", "answer_type": "integer"}, "Answer: 1e999", 0.0),
    ({**MATHVISTA, "answer": "[1, 2.5]", "answer_type": "list"}, "The answer is [1, 2.5].", 1.0),
    ({**MATHVISTA, "answer": "[1, 2.5]", "answer_type": "list"}, "The answer is [2.5, 1]", 0.0),
    ({**MATHVISTA, "answer": "[1, 2.5]", "answer_type": "list"}, "[1, 2.5", 0.0),
    ({**MATHVISTA, "answer": "Blue", "answer_type": "text"}, "The answer is blue.", 1.0),
    (MATHVISTA_CHOICE, "So the answer is (B) equal to.", 1.0),
    (MATHVISTA_CHOICE, "equal to", 1.0),
    (MATHVISTA_CHOICE, "A", 0.0),
    (MATHVISTA_CHOICE, "hard to say", 0.0),
]
SCORES = [
    *(("mmmu", *case) for case in MMMU_SCORES),
    *(("mathvision", *case) for case in MATHVISION_SCORES),
    *(("mathvista", *case) for case in MATHVISTA_SCORES),
]


@pytest.mark.parametrize(("name", "row", "response", "score"), SCORES)
def test_scores(name: str, row: dict, response: str, score: float) -> None:
    columns = ADAPTERS[name](row, "row 0")
    given = {key: [value] for key, value in columns.items() if key not in ("messages", "images")}
    assert load(name, Path())([None], [response], **given) == [score]


def test_stages_in_the_documentation_are_valid() -> None:
    text = (Path(__file__).parents[2] / "docs" / "vision_benchmarks.md").read_text()
    stages = yaml.safe_load(text.split("```yaml")[1].split("```")[0])["stages"]
    assert {stage["name"] for stage in stages} == set(ADAPTERS)
    for stage in stages:
        checked = EvalStage.model_validate(stage)
        assert checked.problems.format == checked.rewards.functions[0].function == stage["name"]
