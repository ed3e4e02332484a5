"""Built-in `code`: the program in the answer passes its test cases, run in a sandbox that does not know what they expect.

Owns finding the program, reading test cases and verdicts. The sandbox is `rewards.sandbox`, assertions are `rewards.code_assertions`.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bregman.errors import RewardError
from rewards.code_assertions import CHECK, EVALUATE, put_together, read_values, take_apart
from rewards.sandbox import Isolation, choose
from rewards.sandbox_languages import LANGUAGES, DoesNotCompile, Program, prepare
from rewards.sandbox_tiers import Limits, Way
from rewards.text import completion_text, split_thinking

FENCED = re.compile(r"^[ \t]*```[ \t]*([\w+#-]*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Case:
    """Input and expected output of a program that reads and prints."""

    input: str
    output: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a program: how many of its cases it passed before the first that it failed (or of all), and why it failed."""

    passed: int
    total: int
    reason: str = ""

    @property
    def right(self) -> bool:
        return self.passed == self.total


def code(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    tests: Sequence[Any],
    language: str = "python",
    isolation: Isolation = "required",
    partial: bool = False,
    tolerance: float = 0.0,
    cpu_seconds: float = 4.0,
    wall_seconds: float = 8.0,
    total_seconds: float = 9.0,
    memory_mib: int = 512,
    processes: int = 16,
    file_mib: int = 16,
    output_kib: int = 1024,
    **_: Any,
) -> list[float | None]:
    """1.0 where the program passes every case, else 0.0; None where the problem has no cases.

    The program is the last fenced block of the language after the thinking, or the whole answer if there is none.

    Args:
        tests: for each sample a list of `{"input", "output"}` or of assertion statements (Python only), or the JSON of one.
        language: `python` or `cpp`.
        isolation: `required` is an error where the machine has no namespaces; `best_effort` then runs with resource limits alone.
        partial: the share of cases passed instead of all or nothing.
        tolerance: numbers in the output may differ by this much, absolutely or relatively; 0 compares text.
        total_seconds: for all cases of a sample, compiling not included; what is not done by then counts as failed.
        cpu_seconds, wall_seconds, memory_mib, processes, file_mib, output_kib: of one case, see `Limits`.

    Raises:
        RewardError: test cases of another form, no compiler, no isolation.
        SandboxError: a sandbox did not start.
    """
    limits = Limits(cpu_seconds, wall_seconds, memory_mib, processes, file_mib, output_kib)
    way = choose(isolation)

    def score(completion: Any, cases: Any) -> float | None:
        read = read_tests(cases)
        if not read:
            return None
        program = extract_program(completion_text(completion), language)
        verdict = judge(program, read, language, way, limits, total_seconds, partial=partial, tolerance=tolerance)
        return verdict.passed / verdict.total if partial else float(verdict.right)

    return [score(completion, cases) for completion, cases in zip(completions, tests, strict=True)]


def _prepare(language: str = "python", isolation: Isolation = "required", **_: Any) -> None:
    """Raises RewardError where this machine lacks the isolation or the compiler that the recipe asks for."""
    prepare("int main() { return 0; }", language, choose(isolation))


code.prepare = _prepare  # type: ignore[attr-defined]


def extract_program(text: str, language: str) -> str:
    """The last fenced block of the language after the thinking, else the last one without a label, else the whole answer."""
    answer = split_thinking(text.replace("\r\n", "\n"))[1]
    blocks = [(label.lower(), body) for label, body in FENCED.findall(answer)]
    for labels in (LANGUAGES.get(language, ()), ("",)):
        fitting = [body for label, body in blocks if label in labels]
        if fitting:
            return fitting[-1]
    return answer


def read_tests(tests: Any) -> list[Case] | list[str]:
    """Test cases in any of their forms; empty if there are none.

    Raises:
        RewardError: another form.
    """
    if isinstance(tests, str) and tests.lstrip().startswith(("[", "{")):
        try:
            tests = json.loads(tests)
        except ValueError:
            raise RewardError("column `tests`", "a text that is no JSON", "see `code` in docs/rewards.md") from None
    if isinstance(tests, str):
        tests = [tests] if tests.strip() else []
    if isinstance(tests, Mapping) and {"input", "output"} <= tests.keys():
        tests = _listed(tests["input"], tests["output"])
    if tests is None or len(tests) == 0:
        return []
    if all(isinstance(test, str) for test in tests):
        return list(tests)
    if all(isinstance(test, Mapping) and "input" in test and "output" in test for test in tests):
        return [Case(str(test["input"]), str(test["output"])) for test in tests]
    fix = "give a list of {input, output} or of assertion statements"
    raise RewardError("column `tests`", f"test cases of an unknown form: {str(tests)[:60]}", fix)


def _listed(inputs: Any, outputs: Any) -> list[dict[str, Any]]:
    """The cases of one mapping: of a text each, or of two lists of one length."""
    if isinstance(inputs, str) and isinstance(outputs, str):
        return [{"input": inputs, "output": outputs}]
    if any(isinstance(each, str) or not isinstance(each, Sequence) for each in (inputs, outputs)):
        raise RewardError("column `tests`", "`input` and `output` are neither two texts nor two lists", "give a list of {input, output}")
    if len(inputs) != len(outputs):
        raise RewardError("column `tests`", f"{len(inputs)} of `input` but {len(outputs)} of `output`", "give one output for each input")
    return [{"input": i, "output": o} for i, o in zip(inputs, outputs, strict=True)]


def judge(
    code: str,
    tests: Sequence[Case] | Sequence[str],
    language: str,
    way: Way,
    limits: Limits,
    total_seconds: float,
    *,
    partial: bool = False,
    tolerance: float = 0.0,
) -> Verdict:
    """Run a program on its test cases; stops at the first that fails unless `partial`. Errors as in `code`."""
    if not code.strip():
        return Verdict(0, len(tests), "no program")
    if isinstance(tests[0], str):
        if language != "python":
            raise RewardError("reward `code`", f"assertion cases for `{language}`", "they are for python; give {input, output}")
        return _judge_assertions(code, [str(test) for test in tests], way, limits, total_seconds)
    cases = [test for test in tests if isinstance(test, Case)]
    try:
        program = prepare(code, language, way)
    except DoesNotCompile as error:
        return Verdict(0, len(cases), f"does not compile: {error}")
    deadline = time.monotonic() + total_seconds
    passed, reason = 0, ""
    for index, case in enumerate(cases):
        why = _fails(program, case, limits, deadline, tolerance)
        passed += not why
        if why:
            reason = reason or f"case {index}: {why}"
            if not partial:
                break
    return Verdict(passed, len(cases), reason)


def _fails(program: Program, case: Case, limits: Limits, deadline: float, tolerance: float) -> str:
    left = deadline - time.monotonic()
    if left <= 0:
        return "total time"
    result = program.run(case.input.encode(errors="replace"), replace(limits, wall_seconds=min(limits.wall_seconds, left)))
    if result.limit:
        return result.limit
    if result.exit_code:
        return f"exit code {result.exit_code}: {result.stderr.strip().rpartition(chr(10))[2][:120]}"
    return "" if same_output(result.stdout.decode(errors="replace"), case.output, tolerance) else "wrong output"


def _judge_assertions(code: str, tests: Sequence[str], way: Way, limits: Limits, total_seconds: float) -> Verdict:
    apart = take_apart(tests)
    total = len(apart.checks)
    limits = replace(limits, wall_seconds=min(limits.wall_seconds, total_seconds))
    side = Program(way, "python", {"main.py": EVALUATE.encode(), "solution.py": code.encode(errors="replace")})
    result = side.run(json.dumps(apart.steps).encode(), limits)
    checks = put_together(apart, read_values(result.stdout))
    whole = [check for check in checks if check is not None]
    verdicts: Any = []
    if whole:
        other = Program(way, "python", {"main.py": CHECK.encode()}).run(json.dumps([apart.imports, whole]).encode(), limits)
        try:
            verdicts = json.loads(other.stdout)
        except ValueError:
            return Verdict(0, total, f"the assertions could not be checked: {other.limit or other.stderr[-120:]}")
        if isinstance(verdicts, dict):
            fix = "assertions may import the standard library alone"
            raise RewardError("column `tests`", f"imports of assertions fail: {verdicts['imports']}", fix)
    passed = sum(verdicts)
    why = result.limit or (result.stderr.strip().rpartition("\n")[2][:120] if result.exit_code else "an assertion does not hold")
    return Verdict(passed, total, "" if passed == total else why)


def same_output(printed: str, expected: str, tolerance: float = 0.0) -> bool:
    """Equal line by line, white space at the ends of lines and of the text apart; with a tolerance, word by word as numbers."""
    if _normal(printed) == _normal(expected):
        return True
    if not tolerance:
        return False
    left, right = printed.split(), expected.split()
    return len(left) == len(right) and all(a == b or _close(a, b, tolerance) for a, b in zip(left, right, strict=True))


def _normal(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def _close(left: str, right: str, tolerance: float) -> bool:
    try:
        return math.isclose(float(left), float(right), rel_tol=tolerance, abs_tol=tolerance)
    except ValueError:
        return False
