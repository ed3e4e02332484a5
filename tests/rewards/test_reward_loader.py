"""Finding reward functions: every way to name one, and what each mistake says."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from bregman.errors import RewardError
from rewards import loader
from rewards.exact import exact_answer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "task.py").write_text(
        "LOADS = []\nLOADS.append(1)\nNUMBER = 3\n"
        "def verify_answer(completions, **_):\n    return [1.0] * len(completions)\n"
        "class Judge:\n    def __call__(self, completions, **_):\n        return [0.5] * len(completions)\njudge = Judge()\n"
    )
    (tmp_path / "broken.py").write_text("import math\n\nx = math.sqrt(-1)\n")
    (tmp_path / "syntax.py").write_text("def f(:\n    pass\n")
    (tmp_path / "needs.py").write_text("import a_library_that_is_not_there\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit('bye')\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "other.py").write_text("def g(completions, **_): return [2.0] * len(completions)\n")
    return tmp_path


def test_every_way_to_name_a_function(folder: Path) -> None:
    one = [[{"role": "assistant", "content": "x"}]]
    assert loader.load("exact_answer", folder) is exact_answer
    assert loader.load("task.py:verify_answer", folder)(completions=one) == [1.0]
    assert loader.load("task.py:judge", folder)(completions=one) == [0.5]
    assert loader.load("sub/other.py:g", folder)(completions=one) == [2.0]
    assert loader.load(f"{folder / 'sub' / 'other.py'}:g", Path("/")) is loader.load("sub/other.py:g", folder)
    assert loader.load("rewards.exact:exact_answer", folder) is exact_answer
    assert loader.load("math", folder).__name__ == "math_answer"
    assert callable(loader.load("think_format", folder))


def test_a_file_loads_once_under_a_stable_name(folder: Path) -> None:
    first = loader.load("task.py:verify_answer", folder)
    second = loader.load("./sub/../task.py:verify_answer", folder)
    assert first is second
    assert sys.modules[first.__module__].LOADS == [1]


def test_entry_points(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("good", "rewards.exact:exact_answer", loader.ENTRY_POINT_GROUP),
        EntryPoint("gone", "rewards.nowhere:f", loader.ENTRY_POINT_GROUP),
        EntryPoint("number", "math:pi", loader.ENTRY_POINT_GROUP),
    ]
    monkeypatch.setattr(loader, "entry_points", lambda group: points if group == "bregman.rewards" else [])
    assert loader.load("good", folder) is exact_answer
    for name, error in [
        ("gone", "importing entry point rewards.nowhere:f failed: ModuleNotFoundError"),
        ("number", "entry point math:pi is a float, not a function"),
        ("goot", "did you mean `good`?"),
    ]:
        with pytest.raises(RewardError, match=f"reward `{name}`") as caught:
            loader.load(name, folder)
        assert error in str(caught.value)


MISTAKES = [
    ("exact_anser", "no built-in or installed reward of this name; did you mean `exact_answer`?"),
    ("zzz", f"no built-in or installed reward of this name; choose one of {', '.join(loader.BUILT_IN)}, or write path.py:name"),
    ("task.py", "a file, but not which function of it; write task.py:NAME"),
    ("tusk.py:verify_answer", "tusk.py; did you mean `task.py`?"),
    ("nowhere/task.py:f", "nowhere; paths are relative to the recipe's folder"),
    ("task.py:verify_anser", "no function `verify_anser` in task.py; did you mean `verify_answer`?"),
    ("task.py:zzz", "no function `zzz` in task.py; it has verify_answer, Judge, judge"),
    ("empty.py:f", "no function `f` in empty.py; it has no functions"),
    ("task.py:NUMBER", "`NUMBER` in task.py is a int, not a function"),
    ("broken.py:f", "importing broken.py failed: ValueError: math domain error (broken.py:3)"),
    ("syntax.py:f", "importing syntax.py failed: SyntaxError: invalid syntax (syntax.py:1)"),
    ("needs.py:f", "importing needs.py failed: ModuleNotFoundError: No module named 'a_library_that_is_not_there' (needs.py:1)"),
    ("leaves.py:f", "importing leaves.py failed: SystemExit: bye (leaves.py:2)"),
    ("no_such_package.rewards:f", "no module `no_such_package`; install it, or write path.py:name for a file"),
    ("rewards.exact:exact_answr", "no function `exact_answr` in exact.py; did you mean `exact_answer`?"),
]


@pytest.mark.parametrize(("function", "error"), MISTAKES, ids=[function for function, _ in MISTAKES])
def test_mistakes_are_one_line(folder: Path, function: str, error: str) -> None:
    with pytest.raises(RewardError) as caught:
        loader.load(function, folder)
    line = str(caught.value)
    assert line.startswith(f"reward `{function}`: ")
    assert error in line
    assert "\n" not in line


def test_a_file_that_failed_is_read_again(folder: Path) -> None:
    with pytest.raises(RewardError):
        loader.load("broken.py:f", folder)
    (folder / "broken.py").write_text("def f(completions, **_): return [1.0] * len(completions)  # longer than before, so not cached\n")
    assert callable(loader.load("broken.py:f", folder))
