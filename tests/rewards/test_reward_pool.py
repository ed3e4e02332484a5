"""Hostile reward functions: the guilty sample gets the error, every other sample its score, and nothing is left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bregman.errors import RewardError
from rewards.call import Failure, Sample
from rewards.config import RewardConfig, RewardsConfig
from rewards.pool import RewardPool, _batches

PLUGIN = '''
import asyncio, ctypes, os, random, re, signal, subprocess, sys, threading, time
from dataclasses import dataclass

def text(completion): return completion[0]["content"]

def each(completions, bad):
    """1.0 for every completion; `bad()` is run or returned for the one that says bad."""
    return [bad() if text(c) == "bad" else 1.0 for c in completions]

class Unpicklable(Exception):
    def __init__(self, a, b): super().__init__(f"{a} and {b}"); self.lock = threading.Lock()

class NoText(Exception):
    def __str__(self): raise RuntimeError("no text for you")

def fail(error): raise error

def raises(completions, **_): return each(completions, lambda: fail(ValueError("three\\nlines\\nlong")))
def raises_unpicklable(completions, **_): return each(completions, lambda: fail(Unpicklable(1, 2)))
def raises_without_text(completions, **_): return each(completions, lambda: fail(NoText()))
def exits(completions, **_): return each(completions, lambda: sys.exit(3))
def exits_at_once(completions, **_): return each(completions, lambda: os._exit(3))
def kills_itself(completions, **_): return each(completions, lambda: os.kill(os.getpid(), signal.SIGKILL))
def crashes(completions, **_): return each(completions, lambda: ctypes.string_at(0))
def interrupts(completions, **_): return each(completions, lambda: fail(KeyboardInterrupt()))
def recurses(completions, **_):
    def deeper(): return deeper() + 1
    return each(completions, deeper)
def hangs(completions, **_): return each(completions, lambda: time.sleep(600))
def hangs_in_c(completions, **_): return each(completions, lambda: re.match("(a+)+b", "a" * 80))
def hangs_and_ignores_signals(completions, **_):
    def stubborn():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM): signal.signal(number, signal.SIG_IGN)
        time.sleep(600)
    return each(completions, stubborn)
async def hangs_async(completions, **_):
    for c in completions:
        await asyncio.sleep(600 if text(c) == "bad" else 0)
    return [1.0] * len(completions)
def stops_itself(completions, **_): return each(completions, lambda: os.kill(os.getpid(), signal.SIGSTOP))
def nan(completions, **_): return each(completions, lambda: float("nan"))
def infinite(completions, **_): return each(completions, lambda: float("-inf"))
def too_large(completions, **_): return each(completions, lambda: 10**400)
def string(completions, **_): return each(completions, lambda: "1.0")
def a_list(completions, **_): return each(completions, lambda: [1.0])
def too_short(completions, **_): return [1.0 for c in completions if text(c) != "bad"]
def too_long(completions, **_): return [1.0 for c in completions for _ in range(2 if text(c) == "bad" else 1)]
def no_list(completions, **_): return None if any(text(c) == "bad" for c in completions) else [1.0] * len(completions)
def one_number(completions, **_): return 0.5 if any(text(c) == "bad" for c in completions) else [1.0] * len(completions)
def eats_memory(completions, **_): return each(completions, lambda: len([bytearray(64 * 2**20) for _ in range(10**6)]))
def closes_everything(completions, **_): return each(completions, lambda: os.closerange(0, 1000))
def crowds(completions, **_):
    def start():
        for _ in range(20): threading.Thread(target=time.sleep, args=(600,)).start()
        os._exit(5)
    return each(completions, start)
def leaves_child_and_dies(completions, mark, **_):
    def start():
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", mark])
        os._exit(6)
    return each(completions, start)

# These do harm that must not cost any sample its score.
def floods(completions, **_):
    for stream in (sys.stdout, sys.stderr):
        for _ in range(200): stream.write("flood " * 2000)
    os.write(1, b"flood" * 10000)
    return [1.0] * len(completions)
def forks(completions, **_):
    os.fork()
    return [1.0] * len(completions)
def leaves_child(completions, mark, **_):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", mark])
    return [1.0] * len(completions)
def spoils_globals(completions, **_):
    os.chdir("/"); os.environ.clear(); sys.stdout = None; sys.path.clear(); random.seed(0); sys.setrecursionlimit(200)
    return [1.0] * len(completions)
def leaves_threads(completions, **_):
    threading.Thread(target=time.sleep, args=(600,)).start()
    return [1.0] * len(completions)
def spoils_arguments(prompts, completions, **columns):
    n = len(completions)
    for value in (prompts, completions, *columns.values()):
        if isinstance(value, list): value.clear()
    return [1.0] * n

def slow(completions, **_):
    time.sleep(0.04 * len(completions))
    return [1.0] * len(completions)
def group_mean(completions, **_):
    return [float(len(completions))] * len(completions)
def where(completions, **_):
    return [float(os.getcwd() == os.environ["PWD_WANTED"])] * len(completions)
def not_applicable(completions, **_): return [None if text(c) == "bad" else 1 for c in completions]
def odd_numbers(completions, **_):
    import numpy
    return numpy.array([True] * len(completions))
def pids(completions, **_): return [float(os.getpid())] * len(completions)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "plugin.py").write_text(PLUGIN)
    return folder


def sample(problem: int, index: int, text: str = "fine", **columns: object) -> Sample:
    return Sample(
        problem_id=f"p{problem}",
        sample_index=index,
        prompt=({"role": "user", "content": "question"},),
        completion=text,
        completion_ids=(1, 2),
        columns=columns,
    )


def samples_with_one_bad(count: int = 6, bad: int = 3) -> list[Sample]:
    return [sample(i // 2, i % 2, "bad" if i == bad else "fine") for i in range(count)]


def pool_of(folder: Path, name: str, **settings: object) -> RewardPool:
    rewards = {key: settings.pop(key) for key in ("processes", "memory_gib", "total_timeout") if key in settings}
    function = RewardConfig(function=f"plugin.py:{name}", **settings)  # type: ignore[arg-type]
    return RewardPool(RewardsConfig(functions=[function], **rewards), folder)  # type: ignore[arg-type]


HOSTILE = [
    ("raises", "ValueError: three lines long (plugin.py:"),
    ("raises_unpicklable", "Unpicklable: 1 and 2 (plugin.py:"),
    ("raises_without_text", "NoText: (its message cannot be printed) (plugin.py:"),
    ("exits", "SystemExit: 3 (plugin.py:"),
    ("interrupts", "KeyboardInterrupt (plugin.py:"),
    ("recurses", "RecursionError: maximum recursion depth exceeded"),
    ("exits_at_once", "its process ended with exit code 3"),
    ("kills_itself", "its process was killed by signal 9 (SIGKILL, out of memory?)"),
    ("crashes", "its process was killed by signal 11 (SIGSEGV)"),
    ("hangs", "no answer within 1.0 s"),
    ("hangs_in_c", "no answer within 1.0 s"),
    ("hangs_and_ignores_signals", "no answer within 1.0 s"),
    ("hangs_async", "no answer within 1.0 s"),
    ("stops_itself", "no answer within 1.0 s"),
    ("nan", "returned nan, expected a finite number or None"),
    ("infinite", "returned -inf, expected a finite number or None"),
    ("too_large", "(int), expected a number or None"),
    ("string", "returned '1.0' (str), expected a number or None"),
    ("a_list", "returned [1.0] (list), expected a number or None"),
    ("too_short", "returned 0 scores for 1 samples"),
    ("too_long", "returned 2 scores for 1 samples"),
    ("no_list", "returned None (NoneType), expected a list of 1 scores"),
    ("one_number", "returned 0.5 (float), expected a list of 1 scores"),
    ("eats_memory", "MemoryError (plugin.py:"),
    ("closes_everything", "its process "),
    ("crowds", "its process ended with exit code 5"),
]


@pytest.mark.parametrize(("name", "error"), HOSTILE, ids=[name for name, _ in HOSTILE])
def test_only_the_guilty_sample_fails(folder: Path, name: str, error: str) -> None:
    timeout = 1.0 if "no answer" in error else 20.0  # only a hang has to wait for it
    with pool_of(folder, name, timeout=timeout, memory_gib=0.5) as pool:
        started = time.monotonic()
        [outcomes] = pool.run(samples_with_one_bad())
        assert time.monotonic() - started < 15
        guilty = outcomes.pop(3)
        assert outcomes == [1.0] * 5
        assert isinstance(guilty, Failure)
        assert error in guilty.text
        assert "\n" not in guilty.text
        assert pool.run([sample(9, 0)]) == [[1.0]]  # and it goes on


@pytest.mark.parametrize("name", ["floods", "forks", "leaves_child", "spoils_globals", "leaves_threads", "spoils_arguments"])
def test_harm_that_costs_no_score(folder: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    mark = f"left-by-{os.getpid()}-{name}"
    with pool_of(folder, name, args={"mark": mark}, timeout=30) as pool:
        for _ in range(3):
            assert pool.run(samples_with_one_bad()) == [[1.0] * 6]
        if name == "leaves_child":
            assert processes_with(mark) == 3
    assert wait_until(lambda: processes_with(mark) == 0)
    assert capfd.readouterr() == ("", "")


def test_children_of_a_dead_process_are_killed_and_do_not_delay(folder: Path) -> None:
    mark = f"left-by-{os.getpid()}"
    with pool_of(folder, "leaves_child_and_dies", args={"mark": mark}, timeout=60) as pool:
        started = time.monotonic()
        [outcomes] = pool.run(samples_with_one_bad())
        assert time.monotonic() - started < 20  # the child holds the pipes of the dead process open
        assert outcomes[3] == Failure("its process ended with exit code 6")
        assert wait_until(lambda: processes_with(mark) == 0)


def test_slow_function_is_not_guilty_and_gets_smaller_calls(folder: Path) -> None:
    samples = [sample(i, 0) for i in range(24)]
    with pool_of(folder, "slow", timeout=0.6) as pool:
        assert pool.run(samples) == [[1.0] * 24]  # 0.96 s in one call: too late; alone 0.04 s each
        started = time.monotonic()
        assert pool.run(samples) == [[1.0] * 24]
        assert time.monotonic() - started < 0.96 + 0.6  # no second wasted call


def test_total_time_is_bounded(folder: Path) -> None:
    samples = [sample(i, 0, "bad") for i in range(50)]
    with pool_of(folder, "hangs", timeout=0.3, total_timeout=1.5) as pool:
        started = time.monotonic()
        [outcomes] = pool.run(samples)
        assert time.monotonic() - started < 4
    assert all(isinstance(outcome, Failure) for outcome in outcomes)
    assert outcomes[0] == Failure("no answer within 0.3 s")
    assert outcomes[-1] == Failure("not scored: the 1.5 s for all rewards of a batch ran out (rewards.total_timeout)")


def test_slow_import_does_not_count_as_a_slow_call(folder: Path) -> None:
    (folder / "late.py").write_text("import time\ntime.sleep(1.0)\ndef f(completions, **_): return [1.0] * len(completions)\n")
    rewards = RewardsConfig(functions=[RewardConfig(function="late.py:f", timeout=0.3)])
    with RewardPool(rewards, folder) as pool:
        assert pool.run([sample(0, 0)]) == [[1.0]]
    too_late = RewardsConfig(functions=[RewardConfig(function="late.py:f", load_timeout=0.3)])
    with RewardPool(too_late, folder) as pool, pytest.raises(RewardError, match=r"late\.py:f.*no answer within 0\.3 s.*load_timeout"):
        pool.load()


def test_function_that_cannot_be_imported_again_fails_its_samples_only(folder: Path) -> None:
    source = "import os, pathlib\nmark = pathlib.Path(__file__ + '.once')\nif mark.exists(): raise OSError('second time')\nmark.touch()\n"
    (folder / "once.py").write_text(source + "def f(completions, **_): os._exit(1)\n")
    with RewardPool(RewardsConfig(functions=[RewardConfig(function="once.py:f")]), folder) as pool:
        [outcomes] = pool.run([sample(0, 0), sample(1, 0)])
    assert all(isinstance(o, Failure) and "could not be started again" in o.text and "second time" in o.text for o in outcomes)


def test_processes_work_side_by_side_and_keep_the_order(folder: Path) -> None:
    samples = [sample(i, 0, "bad" if i == 5 else "fine") for i in range(12)]
    with pool_of(folder, "not_applicable", processes=3, batch=2) as pool:
        assert pool.run(samples) == [[None if i == 5 else 1.0 for i in range(12)]]
    with pool_of(folder, "slow", processes=2, batch=6) as pool:
        pool.run(samples[:2])  # one batch: the second process is not up yet
        pool.run(samples)
        started = time.monotonic()
        pool.run(samples)
        assert time.monotonic() - started < 0.42  # 0.48 s one after the other


def test_several_functions_have_processes_of_their_own(folder: Path) -> None:
    functions = [RewardConfig(function=f"plugin.py:{name}") for name in ("pids", "kills_itself", "pids")]
    with RewardPool(RewardsConfig(functions=functions), folder) as pool:
        first, _, second = pool.run(samples_with_one_bad())
        again, _, _ = pool.run(samples_with_one_bad())
    assert first == again
    assert first != second


def test_values_that_are_numbers_are_taken(folder: Path) -> None:
    with pool_of(folder, "odd_numbers") as pool:
        assert pool.run(samples_with_one_bad()) == [[1.0] * 6]


def test_groups_stay_whole(folder: Path) -> None:
    samples = [sample(problem, index) for problem in range(5) for index in range(3)]
    assert _batches(samples, 4) == [(0, 6), (6, 12), (12, 15)]
    assert _batches(samples, 1) == [(0, 3), (3, 6), (6, 9), (9, 12), (12, 15)]
    assert _batches(samples, 100) == [(0, 15)]
    with pool_of(folder, "group_mean", batch=1) as pool:
        assert pool.run(samples) == [[3.0] * 15]


def test_working_folder_is_the_recipe_s(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWD_WANTED", str(folder.resolve()))
    with pool_of(folder, "where") as pool:
        assert pool.run([sample(0, 0)]) == [[1.0]]


def test_a_file_beside_the_plugin_is_importable_but_shadows_no_library(folder: Path) -> None:
    (folder / "json.py").write_text("raise RuntimeError('shadowed')\n")
    (folder / "beside_the_plugin.py").write_text("SCORE = 0.25\n")
    (folder / "imports.py").write_text(
        "import json\nfrom beside_the_plugin import SCORE\ndef f(completions, **_): return [SCORE] * len(completions)\n"
    )
    try:
        with RewardPool(RewardsConfig(functions=[RewardConfig(function="imports.py:f")]), folder) as pool:
            assert pool.run([sample(0, 0)]) == [[0.25]]
    finally:
        (folder / "json.py").unlink()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A test run started in the background ignores SIGINT; Python would then not raise KeyboardInterrupt."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupt_ends_the_wait_at_once(folder: Path, interruptible: None) -> None:
    with pool_of(folder, "hangs", timeout=30) as pool:
        pool.load()
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            pool.run(samples_with_one_bad())
        assert time.monotonic() - started < 3
        assert pool.run([sample(0, 0)]) == [[1.0]]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal on a closed pipe is Linux's")
def test_reward_processes_end_with_a_killed_parent(folder: Path) -> None:
    mark = f"lifeline-{os.getpid()}"
    (folder / "stuck.py").write_text(f"import re\ndef f(completions, **_): return re.match('(a+)+b', 'a' * 80)  # {mark}\n")
    driver = (
        "from pathlib import Path; from rewards.call import Sample; from rewards.config import *; from rewards.pool import RewardPool\n"
        "s = Sample(problem_id='p', sample_index=0, prompt=(), completion='', completion_ids=(), columns={})\n"
        f"pool = RewardPool(RewardsConfig(functions=[RewardConfig(function='stuck.py:f', timeout=60)]), Path({str(folder)!r}))\n"
        "pool.load(); print(pool._functions[0]._all[0]._process.pid, flush=True); pool.run([s])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", driver], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(0.3)  # now it backtracks, with the interpreter lock held
    assert is_running(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_until(lambda: not is_running(child))


LOAD_ERRORS = [
    ({"function": "plugin.py:rases"}, "no function `rases` in plugin.py; did you mean `raises`?"),
    ({"function": "plugin.py:slow", "args": {"speed": 1}}, None),
    ({"function": "narrow.py:f", "args": {"speed": 1}}, "takes no argument `speed`; it takes prompts, completions, digits"),
    ({"function": "narrow.py:f"}, "needs the column `digits`; the data has answer, target; map it in the data source"),
]


@pytest.mark.parametrize(("settings", "error"), LOAD_ERRORS)
def test_mistakes_in_the_recipe(folder: Path, settings: dict[str, object], error: str | None) -> None:
    (folder / "narrow.py").write_text("def f(prompts, completions, digits): return [1.0] * len(completions)\n")
    with RewardPool(RewardsConfig(functions=[RewardConfig(**settings)]), folder) as pool:  # type: ignore[arg-type]
        if error is None:
            assert pool.run([sample(0, 0, answer="1", target=2)]) == [[1.0]]
            return
        with pytest.raises(RewardError) as caught:
            pool.run([sample(0, 0, answer="1", target=2)])
    assert str(settings["function"]) in str(caught.value)
    assert error in str(caught.value)


def test_nothing_to_score(folder: Path) -> None:
    with pool_of(folder, "raises") as pool:
        assert pool.run([]) == [[]]


def test_import_is_light() -> None:
    code = "import sys, rewards, rewards.pool, rewards.scorer, rewards.length_reward, rewards.loader; print(sorted(sys.modules))"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("'torch'", "'ray'", "'vllm'", "'sympy'", "'transformers'", "'numpy'"):
        assert heavy not in names


def processes_with(mark: str) -> int:
    count = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            count += mark.encode() in path.read_bytes()
        except OSError:
            continue
    return count


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: object, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.05)
    return False
