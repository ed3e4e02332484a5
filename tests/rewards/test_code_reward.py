"""The reward `code`: finding the program, comparing, verdicts of right, wrong and cheating programs, and running in the reward pool."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from bregman.errors import RewardError
from rewards import code_tests
from rewards.call import Failure, Sample
from rewards.code_assertions import put_together, read_values, take_apart
from rewards.code_tests import Case, Verdict, code, extract_program, judge, read_tests, same_output
from rewards.config import RewardConfig, RewardsConfig
from rewards.pool import RewardPool
from rewards.sandbox import choose
from rewards.sandbox_tiers import Limits, Way, available

WAY: Way = choose("best_effort")
LIMITS = Limits(cpu_seconds=1, wall_seconds=4, memory_mib=256)
ADD = "a, b = map(int, input().split())\nprint(a + b)"
SUMS = [{"input": "1 2\n", "output": "3\n"}, {"input": "30 4\n", "output": "34\n"}]


def fenced(program: str, label: str = "python") -> str:
    return f"<think>hm</think>Here:\n```{label}\n{program}\n```\nDone."


@pytest.mark.parametrize(
    ("text", "language", "program"),
    [
        (fenced("x = 1"), "python", "x = 1\n"),
        (fenced("x = 1", "py"), "python", "x = 1\n"),
        (fenced("x = 1", "Python3"), "python", "x = 1\n"),
        (fenced("int x;", "c++"), "cpp", "int x;\n"),
        (fenced("int x;", "cpp"), "cpp", "int x;\n"),
        ("```python\nfirst\n```\nno:\n```python\nsecond\n```", "python", "second\n"),
        ("```python\nright\n```\nrun it:\n```bash\npython x.py\n```", "python", "right\n"),
        ("```python\nright\n```\nprints:\n```\n3\n```", "python", "right\n"),
        ("```\nfirst\n```\n```\nsecond\n```", "python", "second\n"),
        ("<think>```python\nin thought\n```</think>print(1)", "python", "print(1)"),
        ("<think>```python\nin thought\n```", "python", ""),
        ("print(1)", "python", "print(1)"),
        ("```python title=x\r\nx = 1\r\n```", "python", "x = 1\n"),
        ("  ```python\n  x = 1\n  ```", "python", "  x = 1\n"),
        ("```python\nx = '```'\n```", "python", "x = '```'\n"),
        ("```cpp\nint x;\n```", "python", "```cpp\nint x;\n```"),
        ("```python\nnever closed", "python", "```python\nnever closed"),
        ("", "python", ""),
    ],
)
def test_extract_program(text: str, language: str, program: str) -> None:
    assert extract_program(text, language) == program


@pytest.mark.parametrize(
    ("printed", "expected", "tolerance", "same"),
    [
        ("3\n", "3", 0, True),
        ("1 2 \n3\n\n", "1 2\n3", 0, True),
        ("1 2 3", "1 2\n3", 0, False),
        ("3.0", "3", 0, False),
        ("3.0", "3", 1e-6, True),
        ("0.33333", "0.333333333", 1e-4, True),
        ("0.334", "0.333", 1e-4, False),
        ("YES 1.0001", "YES 1", 1e-2, True),
        ("yes 1", "YES 1", 1e-2, False),
        ("1 2", "1", 1, False),
        ("nan", "1", 1, False),
        ("", "", 0, True),
        ("x", "", 0, False),
    ],
)
def test_same_output(printed: str, expected: str, tolerance: float, same: bool) -> None:
    assert same_output(printed, expected, tolerance) is same


@pytest.mark.parametrize(
    ("tests", "read"),
    [
        (SUMS, [Case("1 2\n", "3\n"), Case("30 4\n", "34\n")]),
        ({"input": ["1"], "output": ["2"]}, [Case("1", "2")]),
        ({"input": "12", "output": "34"}, [Case("12", "34")]),
        ('{"input": "12", "output": "34"}', [Case("12", "34")]),
        ('[{"input": "1", "output": "2"}]', [Case("1", "2")]),
        ('["assert f(1) == 2"]', ["assert f(1) == 2"]),
        ("assert f(1) == 2", ["assert f(1) == 2"]),
        (["assert f(1) == 2"], ["assert f(1) == 2"]),
        ([], []),
        (None, []),
        ("", []),
    ],
)
def test_read_tests(tests: Any, read: Any) -> None:
    assert read_tests(tests) == read


@pytest.mark.parametrize(
    "tests",
    [
        *([1], [{"input": "1"}], "[1", ["assert x", {"input": "", "output": ""}]),
        *({"input": ["1", "2"], "output": ["1"]}, {"input": "1", "output": ["1"]}, {"input": 1, "output": 2}),
    ],
)
def test_test_cases_of_another_form(tests: Any) -> None:
    with pytest.raises(RewardError, match="column `tests`"):
        read_tests(tests)


STDIN = {
    "right": (ADD, Verdict(2, 2)),
    "one right": ("print(3)", Verdict(1, 2, "case 1: wrong output")),
    "wrong": ("print(4)", Verdict(0, 2, "case 0: wrong output")),
    "raises": ("raise KeyError('x')", Verdict(0, 2, "case 0: exit code 1: KeyError: 'x'")),
    "right but fails at the end": (ADD + "\nraise SystemExit(3)", Verdict(0, 2, "case 0: exit code 3: SystemExit: 3")),
    "no python": ("hello there", Verdict(0, 2, "case 0: exit code 1: SyntaxError: invalid syntax")),
    "hangs": ("while True: pass", Verdict(0, 2, "case 0: cpu time")),
    "empty": (" \n", Verdict(0, 2, "no program")),
}


@pytest.mark.parametrize("name", STDIN)
def test_stdin_cases(name: str) -> None:
    program, verdict = STDIN[name]
    found = judge(program, read_tests(SUMS), "python", WAY, LIMITS, 8)
    if name == "right but fails at the end":  # exit codes count, whatever the message
        assert (found.passed, found.right) == (0, False)
        assert found.reason.startswith("case 0: exit code 3")
    else:
        assert found == verdict


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nprint(3)\nexit()\nprint(4)",
        "def main():\n    print(n)\nn = 3\nif __name__ == '__main__':\n    main()\n    quit(0)",
        "import sys\nsys.setrecursionlimit(10**6)\ndef f(n): return n if n < 4 else f(n - 1)\nprint(f(50000))",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    n: int\nimport pickle\nprint(pickle.loads(pickle.dumps(A(3))).n)",
        "# -*- coding: latin-1 -*-\nprint(len('\xe4\xe4') - 1)",
        "from functools import *\nimport heapq, math, collections, itertools, bisect, re\nprint(reduce(lambda a, b: a + b, [1, 2]))",
        "import sys\nassert sys.argv[1:] == [] and __file__.endswith('main.py') and 'sys' in globals()\nprint(3)",
    ],
)
def test_programs_as_people_write_them(program: str) -> None:
    assert judge(program, [Case("", "3")], "python", WAY, LIMITS, 8) == Verdict(1, 1)


def test_partial_score_goes_on_after_a_failed_case() -> None:
    cases = [{"input": "", "output": str(n)} for n in (1, 3, 3, 2)]
    assert judge("print(3)", read_tests(cases), "python", WAY, LIMITS, 8, partial=True) == Verdict(2, 4, "case 0: wrong output")
    said = [[{"role": "assistant", "content": "print(3)"}]] * 2
    assert code([[]] * 2, said, tests=[cases, None], partial=True, isolation="best_effort") == [0.5, None]
    assert code([[]] * 2, said, tests=[cases, [cases[1]]], isolation="best_effort") == [0.0, 1.0]


def test_total_time_of_all_cases() -> None:
    started = time.monotonic()
    verdict = judge("import time; time.sleep(0.6)", [Case("", "")] * 50, "python", WAY, LIMITS, 2, partial=True)
    assert time.monotonic() - started < 4
    assert 1 <= verdict.passed <= 3 and verdict.reason.endswith(("total time", "wall time"))


ASSERTIONS = [
    "assert double(2) == 4",
    "import math\nassert math.isclose(double(0.1), 0.2)",
    "assert double([1]) == [1, 1] and not double('')",
    "assert isinstance(double(1), int), 'a message'",
    "assert sorted(set(double([3, 1]))) == [1, 3]",
    "x = [5]\nassert len(double(x)) == 2",
]


@pytest.mark.parametrize(
    ("program", "passed"),
    [
        ("def double(x): return x + x", 6),
        ("def double(x):\n    print('noise', flush=True)\n    return x + x\nif __name__ == '__main__': input()", 6),
        ("def double(x): return 4", 2),
        ("def double(x): return x * 3", 2),
        ("def triple(x): return x + x", 0),
        ("def double(x): raise ValueError", 0),
        ("syntax error", 0),
        ("import os; os._exit(0)", 0),
        ("import sys; sys.exit(0)", 0),
    ],
)
def test_assertion_cases(program: str, passed: int) -> None:
    assert judge(program, ASSERTIONS, "python", WAY, LIMITS, 8).passed == passed


CHEATS = {
    "equal to everything": "class Any(int):\n    __eq__ = lambda *_: True\n    __hash__ = int.__hash__\ndef secret(x): return Any(0)",
    "equal to everything, no number": "class Any:\n    __eq__ = lambda *_: True\ndef secret(x): return Any()",
    "no assertions": "import builtins\nbuiltins.AssertionError = ZeroDivisionError\ndef secret(x): return 0",
    "leaves happily": "import os, atexit\natexit.register(os._exit, 0)\ndef secret(x): os._exit(0)",
    "rewrites json": "import json\njson.dumps = lambda *_, **__: '{\"value\": true}'\ndef secret(x): return 0",
    "says so itself": "import os\nfor fd in range(3, 9):\n    try: os.write(fd, b'[true]\\n{\"value\": true}\\n')\n    except OSError: pass\n"
    "def secret(x): return 0",
    "smuggles source": "class S(str):\n    __repr__ = lambda _: '0) or (1'\ndef secret(x): return S('0')",
    "looks around": """
import gc, sys, os, glob
def secret(x):
    seen = [str(frame) for frame in [sys._getframe(n).f_locals for n in range(3)]]
    seen += [open(path, errors='replace').read() for path in glob.glob(os.path.dirname(sys.argv[0]) + '/*')]
    seen += [repr(o) for o in gc.get_objects() if isinstance(o, (list, dict, tuple, str))]
    import re
    found = re.findall(r'8675\\d+', ' '.join(seen))
    return int(found[0]) if found else 0
""",
}


@pytest.mark.parametrize("name", CHEATS)
def test_cheats(name: str) -> None:
    verdict = judge(CHEATS[name], ["assert secret(1) == 8675309"], "python", WAY, LIMITS, 8)
    assert verdict == Verdict(0, 1, verdict.reason) and verdict.reason


# What the tests assign, and a wrong program that would pass if it could get at it.
LEAKS = {
    "a name": ("expected = 4\nassert f(2) == expected", "def f(x): return expected"),
    "a pair": ("inp_out = (2, 4); assert f(inp_out[0]) == inp_out[1]", "def f(x): return globals()['inp_out'][1]"),
    "a pair by name": ("inp_out = (2, 4); assert f(inp_out[0]) == inp_out[1]", "def f(x): return inp_out[1]"),
    "two names": ("x, y = 2, 4\nassert f(x) == y", "def f(x): return y"),
    "a name of a name": ("x = 4\ny = x\nassert f(2) == y", "def f(x): return globals().get('x') or y"),
    "computed": ("y = sum([1, 3])\nassert f(2) == y", "def f(x): return y"),
    "with an import": ("import math\ny = math.isqrt(16)\nassert f(2) == y", "def f(x): return y"),
    "beside a call": ("pair = f(2), 4\nassert pair[0] == pair[1]", "def f(x): return 0\npair = (0, 0)"),
    "in the steps": (
        "case = {'x': 2, 'y': 8675309}\nassert f(case['x']) == case['y']",
        "import gc, re\ndef f(x):\n    found = re.findall('8675[0-9]+', repr([o for o in gc.get_objects() if type(o) in (list, dict, tuple)]))\n"
        "    return int(found[0]) if found else 0",
    ),
}


@pytest.mark.parametrize("name", LEAKS)
def test_what_tests_assign_stays_outside(name: str) -> None:
    test, program = LEAKS[name]
    assert judge(program, [test], "python", WAY, LIMITS, 8).passed == 0
    value = "8675309" if name == "in the steps" else "4"
    assert judge(f"def f(x): return {value}", [test], "python", WAY, LIMITS, 8) == Verdict(1, 1)


@pytest.mark.parametrize(
    "test",
    [
        "from solution import f\nassert f(2) == 4",
        "from solution import *\nassert f(2) == 4",
        "import solution\nassert solution.f(2) == 4",
        "y = f(2)\nassert y == 4",
        "y = sorted([f(3), f(2)])\nassert y == [4, 6] and y[0] == 4",
        "candidate = f\nassert candidate(2) == 4",
        "x = [1]\ngrow(x)\nassert x == [1, 0]",
        "x = y = [1]\ngrow(x)\nassert x == [1, 0]",
        "x = [1, 2]\nassert f(x) == x + x and f(x.copy()) == f(x[:])",
        "x = 2\nassert f(x) == 4\nx = 3\nassert f(x) == 6",
        "import random\nrandom.seed(1)\nx = random.random()\nassert abs(f(x)) <= 2",
        "'a note'\nprint(f(2))\nassert f(2) == 4",
        "sum = 4\nassert f(2) == sum",
        "box = Box(3)\nbox.add(2)\nassert box.n == 5",
        "from collections import Counter\nassert Counter(f('ab')) == Counter(a=2, b=2)",
    ],
)
def test_right_programs_pass_tests_as_people_write_them(test: str) -> None:
    program = "def f(x): return x + x\ndef grow(x): x.append(0)\nclass Box:\n    def __init__(self, n): self.n = n\n"
    program += "    def add(self, n): self.n += n\n"
    verdict = judge(program, [test], "python", WAY, LIMITS, 8)
    assert verdict == Verdict(verdict.total, verdict.total)


def test_imports_that_the_checking_side_lacks_are_no_verdict() -> None:
    with pytest.raises(RewardError, match="column `tests`: imports of assertions fail: ModuleNotFoundError: No module named 'no_such'"):
        judge("def f(x): return x + x", ["import no_such as n\nassert f(2) == 4"], "python", WAY, LIMITS, 8)


def test_a_program_that_reads_cannot_see_what_is_expected() -> None:
    program = """
import glob, os, sys
seen = sys.stdin.read() + repr(dict(os.environ)) + repr(sys.argv)
for path in glob.glob(os.path.dirname(__file__) + '/*') + glob.glob('/proc/[0-9]*/cmdline') + glob.glob('/proc/[0-9]*/environ') + glob.glob('/tmp/**'):
    try: seen += open(path, errors='replace').read()
    except OSError: pass
print('8675309' if '8675' + '309' in seen.replace("'8675309' if", '') else 'not found')
"""
    assert judge(program, [Case("1", "8675309")], "python", WAY, LIMITS, 8).reason == "case 0: wrong output"
    assert judge(program, [Case("8675309", "8675309")], "python", WAY, LIMITS, 8).right  # it would have found it


def test_assertions_taken_apart() -> None:
    apart = take_apart(["from math import pi\ny = g(1)\nassert abs(f(2) - pi) < f(3).x[0]", "assert f(1) == {'a': [1, (2,)]}, f(9)"])
    assert apart.steps == (
        ("run", "from math import pi"),
        ("run", "y = g(1)"),
        ("value", "f(2)"),
        ("value", "f(3).x[0]"),
        ("value", "f(1)"),
    )
    assert apart.checks == (("assert abs(_value_0 - pi) < _value_1", (0, 1)), ("assert _value_2 == {'a': [1, (2,)]}", (2,)))
    assert "8" not in str(take_apart(["assert f(2) == 8"]).steps)
    assert put_together(apart, ["1", None, "3"]) == [None, "_value_2 = 3\nassert _value_2 == {'a': [1, (2,)]}"]
    values = read_values(
        b'{"value": {"tuple": [{"int": "1"}, "a\'b"]}}\n{"error": "x"}\nnonsense\n{"value": {"int": {"x": 1}}}\n{"value": 5}\n'
    )
    assert values == ["tuple([int('1'), \"a'b\"])", None, None, None, None]


@pytest.mark.parametrize(
    "test",
    [
        *("x = 1", "assert f(", "def check(f): assert f(1)", "for x in [1]: assert f(x)", "assert all(f(x) == x for x in [1])"),
        "d = {'x': 2, 'y': 4}\nassert f(d.get('x')) == 4",
        "d = tuple([2, 4])\nassert f(d[0]) == d[1]",
        "d = {}\nd[2] = 4\nassert f(2) == d[2]",
        "d = []\nd.append(4)\nassert f(2) == d[0]",
        "y = f(1) + 1\nassert f(y) == 4",
        "x = 4\nassert [x for x in f(2)] == [x]",
        "import random\nx = random.random()\nassert f(x) == x + x",
        "a, b = f(2) + 1, *[3]\nassert a == b",
    ],
)
def test_assertions_that_cannot_be_used(test: str) -> None:
    with pytest.raises(RewardError, match="column `tests`: assertion"):
        take_apart([test])


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_cpp() -> None:
    right = "#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << a + b; }"
    texts = [fenced(right, "cpp"), fenced(right.replace("+", "-"), "cpp"), fenced("int main() {", "cpp")]
    said = [[{"role": "assistant", "content": text}] for text in texts]
    assert code([[]] * 3, said, tests=[SUMS] * 3, language="cpp", isolation="best_effort") == [1.0, 0.0, 0.0]
    with pytest.raises(RewardError, match="assertion cases for `cpp`"):
        code([[]], said[:1], tests=[["assert f(1)"]], language="cpp", isolation="best_effort")


def test_no_compiler_and_no_such_language(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RewardError, match="no language `cobol`; choose one of python, cpp"):
        judge("x", [Case("", "")], "cobol", WAY, LIMITS, 8)
    monkeypatch.setattr("rewards.sandbox_languages.shutil.which", lambda *_, **__: None)
    with pytest.raises(RewardError, match=r"no C\+\+ compiler .*apt-get install g\+\+"):
        judge("x", [Case("", "")], "cpp", WAY, LIMITS, 8)


def test_no_isolation_is_an_error_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(isolation: str) -> Way:
        if isolation == "required":
            raise RewardError("sandbox", "no isolation on this machine")
        return available("rlimits")[0] or WAY

    monkeypatch.setattr(code_tests, "choose", refuse)
    said = [[{"role": "assistant", "content": ADD}]]
    with pytest.raises(RewardError, match="no isolation"):
        code([[]], said, tests=[SUMS])
    assert code([[]], said, tests=[SUMS], isolation="best_effort") == [1.0]


def sample(index: int, text: str, tests: Any) -> Sample:
    return Sample(problem_id="p", sample_index=index, prompt=(), completion=text, completion_ids=(1,), columns={"tests": tests})


def test_in_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a run: by name, in a process of its own; one that the pool kills leaves nothing behind."""
    mark = uuid.uuid4().hex
    half, rest = mark[:16], mark[16:]
    stay = f"import os, sys; os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(600)', '{half}' + '{rest}'])"
    args = {"isolation": "best_effort", "wall_seconds": 60, "total_seconds": 60}
    rewards = RewardsConfig(functions=[RewardConfig(function="code", args=args, timeout=3)])
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, RewardPool(rewards, Path(os.curdir)) as pool:
        os.chmod(folder, 0o755)
        monkeypatch.setenv("TMPDIR", folder)  # of the killed process, which cannot tidy up
        [outcomes] = pool.run([sample(0, fenced(ADD), SUMS), sample(1, fenced("print(3)"), SUMS), sample(2, "x", None)])
        assert outcomes == [1.0, 0.0, None]
        [[late]] = pool.run([sample(0, stay, SUMS)])
        assert isinstance(late, Failure) and "no answer within 3.0 s" in late.text
        deadline = time.monotonic() + 5
        while (left := running(mark)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert left == []
        [again] = pool.run([sample(0, fenced(ADD), SUMS)])
        assert again == [1.0]


def test_what_the_machine_lacks_shows_before_anything_is_sampled() -> None:
    rewards = RewardsConfig(functions=[RewardConfig(function="code", args={"isolation": "best_effort", "language": "rust"})])
    with RewardPool(rewards, Path(os.curdir)) as pool, pytest.raises(RewardError, match="no language `rust`; choose one of"):
        pool.load()


def running(mark: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(str(path))
        except OSError:
            continue
    return found
