"""Rows of published vision benchmarks (MMMU, MATH-Vision, MathVista) -> rows with the standard columns: prompt, images, answer.

Owns what those data sets' columns mean and how the question is put. Scoring is the rewards' of the same names
(`rewards.vision_benchmarks`); opening files is `bregman.data.readers`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from typing import Any

from bregman.errors import DataError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
BOXED = 'Please solve the problem step by step and put your answer in one "\\boxed{}".'
"""MATH-Vision's own instruction; MMMU's ("... directly") leaves a model that thinks no room."""
ONE_LETTER = 'If it is a multiple choice question, only one letter is allowed in the "\\boxed{}".'

_MMMU_IMAGE = re.compile(r"<image (\d+)>")
_MATHVISION_IMAGE = re.compile(r"<image ?(\d+)>")

Row = Mapping[str, Any]
Part = dict[str, Any]


def mmmu(row: Row, where: str) -> dict[str, Any]:
    """MMMU: `question` and `options` (a list in Python's notation) with places `<image 1>` to `<image 7>` for `image_1` to `image_7`.

    `answer` becomes the letter, or for open questions the list of answers that are right. Images that are shown twice are given
    twice; those that no text shows come first.

    Raises:
        DataError: naming the row: a column is missing or malformed, a shown image is not there, or the answer is not published.
    """
    question = _text(row, "question", where)
    options = _listed(row.get("options"), "options", where)
    is_open = row.get("question_type") == "open"
    answer: Any = _text(row, "answer", where)
    if answer == "?":
        raise DataError(where, "its answer is not published (`?`)", "use the `validation` or `dev` split")
    if is_open:
        answer = _listed(answer, "answer", where) if answer.startswith("[") else [answer]
    else:
        _check_letter(answer, options, where)
    pictures = {str(number): row.get(f"image_{number}") for number in range(1, 8)}
    text = question if is_open else f"{question}\n\n{_choices(options)}"
    ending = BOXED if is_open else f"{BOXED} {ONE_LETTER}"
    parts, images = _placed(f"{text}\n\n{ending}", _MMMU_IMAGE, pictures, where)
    kept = {"question_type": "open" if is_open else "multiple-choice", "subfield": row.get("subfield")}
    return _standard(row, "id", parts, images, answer, options if not is_open else None, kept)


def mathvision(row: Row, where: str) -> dict[str, Any]:
    """MATH-Vision: `question` with a place `<image1>` for `decoded_image`, `options` (empty where the answer is free).

    Options that are only letters stand in the picture and are not written out. Further places (`<image2>`) are parts of the same
    picture and stay text.

    Raises:
        DataError: naming the row: a column is missing or malformed, or the answer is none of the options.
    """
    question = _text(row, "question", where)
    options = _listed(row.get("options"), "options", where)
    answer = _text(row, "answer", where)
    if options:
        _check_letter(answer, options, where)
    if options and options != list(LETTERS[: len(options)]):
        question = f"{question}\n{_choices(options)}"
    first = _MATHVISION_IMAGE.search(question)
    pictures = {first[1] if first else "1": row.get("decoded_image")}
    parts, images = _placed(f"{question}\n{BOXED} {ONE_LETTER}", _MATHVISION_IMAGE, pictures, where, others_stay=True)
    kept = {"level": row.get("level"), "subject": row.get("subject")}
    return _standard(row, "id", parts, images, answer, options or None, kept)


def mathvista(row: Row, where: str) -> dict[str, Any]:
    """MathVista: `query` (question, unit and choices, with a hint at the form of the answer) about `decoded_image`.

    Without a `query` column the same text is made of `question`, `unit`, `choices`, `answer_type` and `precision`. `answer` stays
    the published text: an option's text, or a number rounded to `precision` decimals.

    Raises:
        DataError: naming the row: a column is missing or malformed, or the answer is not published or none of the choices.
    """
    choices = _listed(row.get("choices"), "choices", where)
    is_choice = _one_of(row, "question_type", ("multi_choice", "free_form"), where) == "multi_choice"
    answer_type = _one_of(row, "answer_type", ("text", "integer", "float", "list"), where)
    answer, precision = _text(row, "answer", where), row.get("precision")
    if is_choice and answer not in choices:
        raise DataError(where, f"its answer {answer!r} is none of its choices", "use the published columns as they are")
    if answer_type == "float" and not is_choice and not isinstance(precision, int | float):
        raise DataError(where, f"its `precision` is {precision!r}", "give the number of decimals")
    query = row.get("query") or _query(row, choices if is_choice else [], answer_type, where)
    parts, images = _placed(str(query), re.compile(r"(?!)"), {"1": row.get("decoded_image")}, where)
    kept = {"question_type": row["question_type"], "answer_type": answer_type, "precision": precision, "unit": row.get("unit")}
    return _standard(row, "pid", parts, images, answer, choices if is_choice else None, kept)


ADAPTERS: dict[str, Callable[[Row, str], dict[str, Any]]] = {"mmmu": mmmu, "mathvision": mathvision, "mathvista": mathvista}
"""Name in a source's `format` -> how its rows are read."""


def _standard(
    row: Row, identity: str, parts: list[Part], images: list[Any], answer: Any, options: list[str] | None, kept: dict[str, Any]
) -> dict[str, Any]:
    found = {"messages": [{"role": "user", "content": parts}], "images": images, "answer": answer, "options": options, **kept}
    return found if row.get(identity) is None else {"id": str(row[identity]), **found}


def _placed(
    text: str, place: re.Pattern[str], pictures: Mapping[str, Any], where: str, *, others_stay: bool = False
) -> tuple[list[Part], list[Any]]:
    """The text cut at its places for images, and the images in that order; images without a place come before the text."""
    shown = {match[1] for match in place.finditer(text)}
    images = [picture for number, picture in pictures.items() if picture is not None and number not in shown]
    parts: list[Part] = [{"type": "image"} for _ in images]
    end = 0
    for match in place.finditer(text):
        if others_stay and match[1] not in pictures:
            continue
        if pictures.get(match[1]) is None:
            raise DataError(where, f"its text shows `{match[0]}`, and there is no such image", "fill its column in, or drop the row")
        parts += [{"type": "text", "text": text[end : match.start()]}, {"type": "image"}]
        images.append(pictures[match[1]])
        end = match.end()
    parts.append({"type": "text", "text": text[end:]})
    if not images:
        raise DataError(where, "has no image", "fill its image column in, or drop the row")
    return [part for part in parts if part.get("text") != ""], images


def _query(row: Row, choices: list[str], answer_type: str, where: str) -> str:
    """MathVista's prompt, as its authors made the `query` column."""
    forms = {
        "integer": ("an integer answer", "value, e.g., 1, 2, 3"),
        "float": {
            1: ("a floating-point number with one decimal place", "value, e.g., 1.2, 1.3, 1.4"),
            2: ("a floating-point number with two decimal places", "value, e.g., 1.23, 1.34, 1.45"),
        }.get(int(row.get("precision") or 0), ("a floating-point number", "value")),
        "list": ("a Python list as an answer", "list, e.g., [1, 2, 3], [1.2, 1.3, 1.4]"),
        "text": ("an answer", "answer"),
    }
    kind, example = forms[answer_type]  # type: ignore[misc]
    hint = f"Please answer the question requiring {kind} and provide the final {example}, at the end."
    if choices:
        hint = "Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end."
    unit = f" (Unit: {row['unit']})" if row.get("unit") else ""
    listed = f"\nChoices:\n{_choices(choices)}" if choices else ""
    return f"Hint: {hint}\nQuestion: {_text(row, 'question', where)}{unit}{listed}"


def _choices(options: list[str]) -> str:
    return "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))


def _text(row: Row, column: str, where: str) -> str:
    value = row.get(column)
    if value is None or not str(value).strip():
        raise DataError(where, f"its `{column}` is {'empty' if column in row else 'missing'}", "use a split with that column filled in")
    return str(value).strip()


def _listed(value: Any, column: str, where: str) -> list[str]:
    """A list of texts, given as a list or written in Python's notation; None and "" are an empty one."""
    if isinstance(value, str) and value.strip():
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise DataError(where, f"its `{column}` is not a list ({value[:60]!r})", "use the published columns as they are") from None
    if not value:
        return []
    if not isinstance(value, list | tuple) or len(value) > len(LETTERS):
        raise DataError(where, f"its `{column}` is not a list of up to {len(LETTERS)}", "use the published columns as they are")
    return [str(one) for one in value]


def _one_of(row: Row, column: str, known: tuple[str, ...], where: str) -> str:
    value = row.get(column)
    if value not in known:
        raise DataError(where, f"its `{column}` is {value!r}", f"choose one of {', '.join(known)}")
    return str(value)


def _check_letter(answer: str, options: list[str], where: str) -> None:
    letters = LETTERS[: len(options)]
    if len(answer) != 1 or answer not in letters:
        found = f"its answer {answer!r} is none of its {len(options)} options"
        raise DataError(where, found, "use the published columns as they are")
