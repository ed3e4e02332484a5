"""What the user sees, and that seeing never breaks a run."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_run import make_evaluation

from bregman.tracking import console as console_module
from bregman.tracking.console import Console, duration, print_summary, summary_table


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console_module, "time", clock)
    return clock


def test_plain_lines(clock: Clock) -> None:
    stream = io.StringIO()
    console = Console(6, stream=stream, live=False)
    console.begin_stage(4, "rl", "rl", 40, 0)
    for step in range(5):
        clock.now += 2
        console.step(step, {"accuracy": 0.5, "response_tokens/mean": 31.25, "parity/logprob_diff_max": 2e-6, "time/rollout": 1.0})
    console.note("look")
    console.warn("beware")
    clock.now += 2
    console.step(5, {"eval/accuracy": 0.25})
    console.end_stage(125, make_evaluation(0.5, 30.0))
    console.close()
    assert stream.getvalue().splitlines() == [
        "stage 5/6 rl (rl): 40 iterations",
        "  iteration 1/40  accuracy 0.500  tokens 31.2  parity 2.0e-06",
        "  iteration 4/40  accuracy 0.500  tokens 31.2  parity 2.0e-06  ETA 72 s",
        "  look",
        "  warning: beware",
        "  iteration 6/40  accuracy 0.500  held-out accuracy 0.250  tokens 31.2  parity 2.0e-06  ETA 68 s",
        "stage 5/6 rl finished in 2:05: accuracy 0.500, 30.0 tokens per response, 256 problems",
    ]


def test_a_resumed_and_extended_stage(clock: Clock) -> None:
    stream = io.StringIO()
    console = Console(1, stream=stream, live=False)
    console.begin_stage(0, "sft", "sft", 10, 8)
    for step in range(8, 12):
        clock.now += 10
        console.step(step, {"loss": 0.5})
    console.close()
    assert stream.getvalue().splitlines() == [
        "stage 1/1 sft (sft): 10 steps, goes on after 8",
        "  step 9/10  loss 0.5",
        "  step 10/10  loss 0.5",
        "  step 11 (beyond the planned 10)  loss 0.5",
        "  step 12 (beyond the planned 10)  loss 0.5",
    ]


def test_a_stuck_wait_is_mentioned_now_and_then(clock: Clock) -> None:
    stream = io.StringIO()
    console = Console(1, stream=stream, live=False)
    console.waiting_for("the rollout workers (vLLM) to start")
    for _ in range(90):
        clock.now += 1
        console._mention_wait()
    console.waiting_for("the rollout")
    clock.now += 9
    console._mention_wait()
    console.begin_stage(0, "rl", "rl", 40, 0)
    console.step(0, {})
    clock.now += 60
    console._mention_wait()
    console.close()
    assert [line for line in stream.getvalue().splitlines() if "still" in line] == [
        f"  still waiting for the rollout workers (vLLM) to start ({seconds} s)" for seconds in (10, 40, 70)
    ]


def test_the_background_thread_mentions_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "FIRST_WAIT", 0.2)
    stream = io.StringIO()
    console = Console(1, stream=stream, live=False)
    console.waiting_for("godot")
    deadline = time.monotonic() + 10
    while "still waiting for godot" not in stream.getvalue():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    console.close()


class ClosedPipe(io.StringIO):
    def write(self, _text: str) -> int:
        raise BrokenPipeError("the reader is gone")


@pytest.mark.parametrize("live", [False, True])
def test_a_broken_stream_never_breaks_the_run(live: bool, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(1, stream=ClosedPipe(), live=live)
    console.begin_stage(0, "rl", "rl", 40, 0)
    console.step(0, {"accuracy": 1.0})
    console.waiting_for("x")
    console.warn("y")
    console.end_stage(1.0, None)
    console.close()
    assert console.failed
    assert capsys.readouterr().err.count("the progress display failed") == 1


LIVE = """
import time
from bregman.tracking.console import Console
console = Console(6)
console.begin_stage(4, "rl", "rl", 40, 0)
for step in range(30):
    console.step(step, {"accuracy": 0.5})
    print("a line of somebody else") if step == 3 else None
    console.warn(f"beware {step}")
console.waiting_for("the rollout")
time.sleep(0.8)
console.end_stage(125, None)
console.close()
print("after the end")
"""


def test_live_view_in_a_real_terminal() -> None:
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", LIVE], stdout=child, stderr=child, env=environment)
    os.close(child)
    shown = b""
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:  # the terminal's other end is closed
            break
        if not part:
            break
        shown += part
    os.close(parent)
    assert process.wait(timeout=20) == 0
    text = shown.decode()
    expected = ("stage 5/6 rl", "iteration 30/40", "accuracy 0.500", "waiting for the rollout (0 s)", "warning: beware 29", "after the end")
    for wanted in (*expected, "a line of somebody else", "stage 5/6 rl finished in 2:05"):
        assert wanted in text, text
    assert "failed" not in text and "Traceback" not in text
    assert text.rstrip().endswith("after the end")


def test_importing_the_console_does_not_import_rich() -> None:
    code = (
        "import sys, bregman.tracking.tracker; print([m for m in ('rich', 'torch', 'pyarrow', 'tensorboard', 'ray') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0 s"), (7.6, "8 s"), (99.4, "99 s"), (99.6, "1:40"), (125, "2:05"), (3725, "1:02:05"), (90_000, "25:00:00")],
)
def test_duration(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def test_summary_table_shows_evaluations_only() -> None:
    rows = [
        {"name": "sft", "kind": "sft", "seconds": 93.0},
        {"name": "long_cot", "kind": "sft", "seconds": 60.0, "accuracy": 0.99, "mean_tokens": 4.0, "num_problems": 64},
        {"name": "after_long_cot", "kind": "eval", "seconds": 2.0, "accuracy": 0.3164, "mean_tokens": 27.31, "num_problems": 256},
        {"name": "after_rl", "kind": "eval", "seconds": 2.4, "accuracy": 0.972, "mean_tokens": 60.0, "num_problems": 256},
    ]
    assert summary_table(rows).splitlines() == [
        "stage            accuracy  mean response tokens  problems  time",
        "---------------  --------  --------------------  --------  ----",
        "long_cot (gate)     0.990                   4.0        64  60 s",
        "after_long_cot      0.316                  27.3       256   2 s",
        "after_rl            0.972                  60.0       256   2 s",
    ]
    assert summary_table(rows[:1]) == "no stage has been evaluated yet"


def test_print_summary(fake_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(fake_run)
    assert capsys.readouterr().out.splitlines()[-1] == "6 stages finished in 3:38"
    print_summary(tmp_path)
    assert capsys.readouterr().out == "no stage has been evaluated yet\n"
