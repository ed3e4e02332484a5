"""Test cases for code problems, as Kimi k1.5 (arXiv 2501.12599, sec. 2.3.5) makes them: by a generator, judged by references.

A case is kept if enough reference solutions agree on its output, a problem if enough references pass every kept case. Owns making
and keeping cases; programs run in `rewards.sandbox`, the cases are for the reward `code`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bregman.errors import DataError
from rewards.code_tests import Case
from rewards.sandbox import Isolation, choose
from rewards.sandbox_languages import DoesNotCompile, Program, prepare
from rewards.sandbox_tiers import Limits, Way


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """How cases are made and kept; the defaults are k1.5's.

    Attributes:
        cases: inputs to make for a problem.
        references: the first so many reference solutions of a problem are used; with fewer the problem is dropped.
        agree: a case is kept if at least so many references print the same.
        passing: a problem is kept if at least so many references pass all its kept cases.
        fewest: a problem needs so many kept cases.
        workers: programs that run at once.
    """

    cases: int = 50
    references: int = 10
    agree: int = 7
    passing: int = 9
    fewest: int = 1
    workers: int = 2
    isolation: Isolation = "required"
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """What came of a problem.

    Attributes:
        cases: those kept, also where the problem is not.
        dropped: why the problem is not kept; empty if it is.
        inputs: different inputs that the generator gave.
        disputed: of those, how many too few references agreed on.
        passing: references that pass all kept cases.
    """

    cases: tuple[Case, ...] = ()
    dropped: str = ""
    inputs: int = 0
    disputed: int = 0
    passing: int = 0


def make_cases(
    generator: str,
    references: Sequence[str],
    rules: Rules,
    *,
    language: str = "python",
) -> Made:
    """Make the test cases of one problem.

    Args:
        generator: a Python program that reads a case number from 0 and prints one input; seed with the number, so that the same
            cases come again.
        references: solutions in `language`, known or believed to be right.

    Raises:
        RewardError: no isolation, language or compiler, or a sandbox did not start.
    """
    if not 0 < rules.agree <= rules.references or not 0 < rules.passing <= rules.references:
        raise ValueError(f"agree {rules.agree} and passing {rules.passing} must be between 1 and references {rules.references}")
    if len(references) < rules.references:
        return Made(dropped=f"{len(references)} references, {rules.references} needed")
    way = choose(rules.isolation)
    with ThreadPoolExecutor(rules.workers, thread_name_prefix="sandbox") as threads:
        made = list(threads.map(lambda number: _input(prepare(generator, "python", way), number, rules), range(rules.cases)))
        inputs = list(dict.fromkeys(text for text in made if text is not None))
        if not inputs:
            return Made(dropped="the generator gave no input")
        programs = list(threads.map(lambda code: _compiled(code, language, way), references[: rules.references]))
        runs = [[threads.submit(_output, program, text, rules) for program in programs] for text in inputs]
        outputs = [[run.result() for run in of_input] for of_input in runs]
    return _keep(inputs, outputs, rules)


def _keep(inputs: Sequence[str], outputs: Sequence[Sequence[str | None]], rules: Rules) -> Made:
    """The rules on what every reference printed for every input, `[input][reference]`, None where it failed."""
    cases: list[Case] = []
    passing = [True] * rules.references
    for text, printed in zip(inputs, outputs, strict=True):
        votes = Counter(output for output in printed if output is not None)
        output, count = votes.most_common(1)[0] if votes else ("", 0)
        if count < rules.agree:
            continue
        cases.append(Case(text, output))
        passing = [before and given == output for before, given in zip(passing, printed, strict=True)]
    good = sum(passing) if cases else 0
    dropped = ""
    if len(cases) < rules.fewest or not cases:
        dropped = f"{len(cases)} of {len(inputs)} cases kept, {max(1, rules.fewest)} needed"
    elif good < rules.passing:
        dropped = f"{good} of {rules.references} references pass the kept cases, {rules.passing} needed"
    return Made(cases=tuple(cases), dropped=dropped, inputs=len(inputs), disputed=len(inputs) - len(cases), passing=good)


def _input(generator: Program, number: int, rules: Rules) -> str | None:
    result = generator.run(f"{number}\n".encode(), rules.limits)
    text = result.stdout.decode(errors="replace")
    return text if result.ok and text.strip() else None


def _compiled(code: str, language: str, way: Way) -> Program | None:
    try:
        return prepare(code, language, way)
    except DoesNotCompile:
        return None


def _output(program: Program | None, text: str, rules: Rules) -> str | None:
    """What a reference prints, white space that does not count removed; None where it fails or prints nothing."""
    result = program.run(text.encode(), rules.limits) if program else None
    if result is None or not result.ok:
        return None
    lines = [line.rstrip() for line in result.stdout.decode(errors="replace").strip().splitlines()]
    return "\n".join(lines) + "\n" if any(lines) else None


def curate(rows: Iterable[Mapping[str, Any]], rules: Rules, *, language: str = "python") -> Iterator[tuple[dict[str, Any], Made]]:
    """Every row with its column `tests` filled in, and what came of it; rows to drop have `Made.dropped`.

    Args:
        rows: with `generator` (a program) and `references` (a list of programs); other columns are passed on, these two are not.

    Raises:
        DataError: a row without one of them.
        RewardError: as `make_cases`.
    """
    for number, row in enumerate(rows):
        for column, kind in (("generator", str), ("references", list)):
            if not isinstance(row.get(column), kind):
                raise DataError(f"row {number}", f"no column `{column}`", "give a generator program and a list of reference programs")
        made = make_cases(row["generator"], row["references"], rules, language=language)
        rest = {key: value for key, value in row.items() if key not in ("generator", "references")}
        yield {**rest, "tests": [asdict(case) for case in made.cases]}, made


def curate_file(source: Path, target: Path, rules: Rules, *, language: str = "python") -> Counter[str]:
    """Read problems from JSON lines, write the kept ones with their `tests`, print a line for each dropped one.

    Returns:
        how many were `kept` and `dropped`, and the number of `cases` kept.
    """
    counts: Counter[str] = Counter(kept=0, dropped=0, cases=0)
    partial = target.with_name(target.name + ".partial")
    with source.open(encoding="utf-8") as lines, partial.open("w", encoding="utf-8") as out:
        for number, (row, made) in enumerate(curate(_rows(lines, source), rules, language=language)):
            if made.dropped:
                counts["dropped"] += 1
                print(f"{source.name}, row {number} dropped: {made.dropped}")
                continue
            counts.update(kept=1, cases=len(made.cases))
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(partial, target)
    return counts


def _rows(lines: Iterable[str], source: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{source}:{number}", f"no JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{source}:{number}", "not an object")
        yield row
