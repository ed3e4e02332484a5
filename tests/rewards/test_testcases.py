"""Test cases by a generator and judged by references: k1.5's thresholds, bad generators, bad references."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bregman.errors import DataError
from rewards.code_tests import Case, judge
from rewards.sandbox import choose
from rewards.sandbox_tiers import Limits
from rewards.testcases import Rules, _keep, curate_file, make_cases

FEW = Rules(cases=3, references=3, agree=2, passing=2, isolation="best_effort", limits=Limits(cpu_seconds=1, wall_seconds=5))
GENERATOR = "import random\nrandom.seed(int(input()))\nprint(random.randint(10, 99), random.randint(0, 9))"
ADD = "a, b = map(int, input().split())\nprint(a + b)"
INPUTS = ["1", "2", "3"]


def votes(right: int, wrong: int = 0, failed: int = 0) -> list[str | None]:
    return ["r"] * right + ["w"] * wrong + [None] * failed


@pytest.mark.parametrize(
    ("outputs", "kept", "passing", "dropped"),
    [
        ([votes(10), votes(10), votes(10)], 3, 10, False),
        ([votes(9, 1), votes(9, 1), votes(9, 1)], 3, 9, False),  # the same one is wrong each time
        ([votes(9, 1), ["w", *votes(9)], votes(10)], 3, 8, True),  # two that are wrong once
        ([votes(7, 3), votes(10), votes(10)], 3, 7, True),  # kept with 7, but then only 7 pass
        ([votes(6, 4), votes(10), votes(10)], 2, 10, False),  # 6 are too few: the case goes, the problem stays
        ([votes(6, 0, 4), votes(10), votes(9, 0, 1)], 2, 9, False),  # a reference that fails agrees with none
        ([votes(5, 5), votes(6, 4), votes(0, 0, 10)], 0, 0, True),
        ([["a", "b"] * 5, votes(0, 10), votes(10)], 2, 10, False),  # outputs of cases need not be alike
    ],
)
def test_thresholds_of_the_paper(outputs: list[list[str | None]], kept: int, passing: int, dropped: bool) -> None:
    made = _keep(INPUTS, outputs, Rules())
    assert (len(made.cases), made.passing, bool(made.dropped)) == (kept, passing, dropped)
    assert made.disputed == 3 - kept


def test_defaults_are_those_of_the_paper() -> None:
    rules = Rules()
    assert (rules.cases, rules.references, rules.agree, rules.passing) == (50, 10, 7, 9)


def test_kept_cases_have_the_output_of_the_majority() -> None:
    made = make_cases(GENERATOR, [ADD, ADD.replace("+", "-"), ADD + "\n"], FEW)
    assert made.dropped == "" and (made.inputs, made.disputed, made.passing) == (3, 0, 2)
    for case in made.cases:
        assert int(case.output) == sum(map(int, case.input.split()))
    assert made == make_cases(GENERATOR, [ADD, ADD.replace("+", "-"), ADD + "\n"], FEW)  # the same cases again
    way = choose("best_effort")
    assert judge(ADD, made.cases, "python", way, FEW.limits, 20).right
    assert not judge(ADD.replace("+", "-"), made.cases, "python", way, FEW.limits, 20).right


@pytest.mark.parametrize(
    ("generator", "references", "dropped"),
    [
        (GENERATOR, [ADD] * 2, "2 references, 3 needed"),
        ("raise SystemExit(1)", [ADD] * 3, "the generator gave no input"),
        ("pass", [ADD] * 3, "the generator gave no input"),
        (GENERATOR, ["print(1)", "print(2)", "print(3)"], "0 of 3 cases kept, 1 needed"),
        (GENERATOR, ["1/0", "pass", "while True: pass"], "0 of 3 cases kept, 1 needed"),
    ],
)
def test_problems_that_are_dropped(generator: str, references: list[str], dropped: str) -> None:
    assert make_cases(generator, references, FEW).dropped == dropped


def test_equal_inputs_count_once() -> None:
    made = make_cases("print(5, 6)", [ADD] * 3, FEW)
    assert made.cases == (Case("5 6\n", "11\n"),) and made.inputs == 1
    too_few = Rules(cases=2, references=3, agree=2, passing=2, fewest=2, isolation="best_effort")
    assert make_cases("print(5, 6)", [ADD] * 3, too_few).dropped == "1 of 1 cases kept, 2 needed"


def test_thresholds_above_the_references() -> None:
    with pytest.raises(ValueError, match="between 1 and references 3"):
        make_cases(GENERATOR, [ADD] * 3, Rules(references=3, agree=4, passing=2))


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"id": "a", "prompt": "Add.", "generator": GENERATOR, "references": [ADD] * 3},
        {"id": "b", "prompt": "?", "generator": GENERATOR, "references": ["print(1)", "print(2)", "print(3)"]},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    counts = curate_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl", FEW)
    [kept] = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert (kept["id"], kept["prompt"], len(kept["tests"]), "references" in kept) == ("a", "Add.", 3, False)
    assert counts == {"kept": 1, "dropped": 1, "cases": 3}
    assert "row 1 dropped: 0 of 3 cases kept" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["{", "[]", '{"generator": "x"}', '{"references": []}', '{"generator": 1, "references": []}'])
def test_bad_rows(tmp_path: Path, line: str) -> None:
    (tmp_path / "in.jsonl").write_text(line)
    with pytest.raises(DataError):
        curate_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl", FEW)
    assert not (tmp_path / "out.jsonl").exists()
