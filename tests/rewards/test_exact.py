"""What `exact_answer` lets pass when the recipe asks for it; its strict form is tested with the other built-ins."""

from __future__ import annotations

from typing import Any

import pytest

from rewards.exact import exact_answer

NORMAL = {"normalise": True}
VALUE = {"tolerance": 1e-9}
LAST = {"last_number": True}

CASES: list[tuple[str, object, dict[str, Any], float | None]] = [
    ("Paris", ["Paris", "City of Paris"], {}, 1.0),
    ("City of Paris", ["Paris", "City of Paris"], {}, 1.0),
    ("Rome", ["Paris", "City of Paris"], {}, 0.0),
    ("Rome", ("Rome", None), {}, 1.0),
    ("Rome", [], {}, None),
    ("Rome", [None], {}, None),
    ("7", [6, 7], {}, 1.0),
    ("paris.", "Paris", {}, 0.0),
    ("paris.", "Paris", NORMAL, 1.0),
    ("  The  Eiffel Tower! ", "eiffel tower", NORMAL, 1.0),
    ("“Paris”", "Paris", NORMAL, 1.0),
    ("Straße", "STRASSE", NORMAL, 1.0),
    ("e\u0301te\u0301", "été", NORMAL, 1.0),
    ("don’t", "don't", NORMAL, 1.0),
    ("Paris, France", "Paris", NORMAL, 0.0),
    ("a", "a", NORMAL, 1.0),
    ("C", "C++", NORMAL, 0.0),
    ("C#", "C++", NORMAL, 0.0),
    ("C", "C#", NORMAL, 0.0),
    ("c++.", "C++", NORMAL, 1.0),
    ("5", "5!", NORMAL, 0.0),
    ("5!.", "5!", NORMAL, 1.0),
    ("n", "n!", NORMAL, 0.0),
    ("20", "20°", NORMAL, 0.0),
    ("5", "$5", NORMAL, 0.0),
    ("5", "€5", NORMAL, 0.0),
    ("5", "5 €", NORMAL, 0.0),
    ("5", "√5", NORMAL, 0.0),
    ("5", ".5", NORMAL, 0.0),
    ("Cl", "Cl-", NORMAL, 0.0),
    ("50", "50%", NORMAL, 0.0),
    ("**Paris**.", "Paris", NORMAL, 1.0),
    ("_`Paris`_", "Paris", NORMAL, 1.0),
    ("(Paris)", "Paris", NORMAL, 1.0),
    ("«Paris», ", "Paris", NORMAL, 1.0),
    ("¡Paris!", "Paris", NORMAL, 1.0),
    ('"Paris!"', "Paris", NORMAL, 1.0),
    ("Paris?!…", "Paris", NORMAL, 1.0),
    ("巴黎！", "巴黎", NORMAL, 1.0),
    ("?", "!", NORMAL, 0.0),
    ("." * 200_000 + "x", "x", NORMAL, 0.0),
    ("-5", "5", NORMAL, 0.0),
    ("５", "5", NORMAL, 1.0),
    ("٤٢", "42", NORMAL, 1.0),
    ("四", "4", NORMAL, 0.0),
    ("3.14", "3.14159", {"tolerance": 0.01}, 1.0),
    ("3.10", "3.14159", {"tolerance": 0.01}, 0.0),
    ("1005", 1000, {"relative_tolerance": 0.01}, 1.0),
    ("1015", 1000, {"relative_tolerance": 0.01}, 0.0),
    ("-1005", -1000, {"relative_tolerance": 0.01}, 1.0),
    ("0.001", 0, {"relative_tolerance": 0.01}, 0.0),
    ("5.0", "5", {}, 0.0),
    ("5.0", "5", VALUE, 1.0),
    ("1,234.5", "1234.5", VALUE, 1.0),
    ("12,34", "1234", VALUE, 0.0),
    ("1e3", "1000", VALUE, 1.0),
    (".5", "0.5", VALUE, 1.0),
    ("٣٫٥", "3.5", VALUE, 1.0),
    ("१२३", "123", VALUE, 1.0),
    ("−7", "-7", VALUE, 1.0),
    ("7 apples", "7", VALUE, 0.0),
    ("nan", "nan", VALUE, 1.0),  # as text
    ("inf", "1", VALUE, 0.0),
    ("1e999", "1", VALUE, 0.0),
    ("9" * 100_000, "9", VALUE, 0.0),
    ("-", "5", VALUE, 0.0),
    ("", "5", VALUE, 0.0),
    ("Paris", "Paris", VALUE, 1.0),
    ("so 3 + 4 = 7 apples.", "7", LAST, 1.0),
    ("so 3 + 4 = 7 apples, not 8", "7", LAST, 0.0),
    ("it costs 1,250 euros", "1250", LAST, 1.0),
    ("it is -7.", "-7", LAST, 1.0),
    ("it is 7.5.", "7.5", LAST, 1.0),
    ("it is 7.49", "7.5", {**LAST, "tolerance": 0.02}, 1.0),
    ("x7", "7", LAST, 0.0),
    ("none", "7", LAST, 0.0),
    ("<think>7</think>8", "7", LAST, 0.0),
]


@pytest.mark.parametrize(("text", "gold", "args", "score"), CASES, ids=range(len(CASES)))
def test_exact_answer(text: str, gold: object, args: dict[str, Any], score: float | None) -> None:
    assert exact_answer([[]], [[{"role": "assistant", "content": text}]], answer=[gold], **args) == [score]
