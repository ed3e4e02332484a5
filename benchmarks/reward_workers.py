"""Reward functions under isolation: rewards per second and latency of each kind, what isolation costs, and what hostile ones do.

    python benchmarks/reward_workers.py [--samples 2048] [--only speed|overhead|hostile]

`speed`: each built-in kind and both plugin forms in a pool of two processes, warm; latency is that of one call of up to 64 samples.
`overhead`: a reward that does nothing, in one process against the same call without isolation; goal 1 ms a sample.
`hostile`: a plugin that misbehaves on one sample of sixteen; the other fifteen must keep their scores, the guilty one must be named,
and the next batch must be scored. The exit code is 1 where that is not so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from bregman.errors import UserError
from bregman.types import Group, Problem, Trajectory
from rewards.call import call_reward, parameters_of
from rewards.config import RewardsConfig
from rewards.loader import load
from rewards.pool import RewardPool
from rewards.scorer import Scorer, samples_of
from rewards.trial import Calls, percentile

GROUP = 8
PROCESSES = 2
GOAL_MILLISECONDS = 1.0

PLUGIN = """
import os, signal, subprocess, sys, threading, time
from rewards.sample import RewardSample, single_sample

def nothing(completions, **_): return [1.0] * len(completions)

@single_sample
def one_sample(sample: RewardSample): return float(sample.final == sample.answer)

def each(completions, bad): return [bad() if c[0]["content"] == "bad" else 1.0 for c in completions]

def raises(completions, **_): return each(completions, lambda: {}["missing"])
def hangs(completions, **_): return each(completions, lambda: time.sleep(600))
def hangs_deaf(completions, **_):
    def stubborn():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM): signal.signal(number, signal.SIG_IGN)
        time.sleep(600)
    return each(completions, stubborn)
def forks(completions, **_):
    def start():
        for _ in range(20):
            if os.fork() == 0: time.sleep(600)
        os.fork()
        return 0.5
    return each(completions, start)
def exits(completions, **_): return each(completions, lambda: sys.exit(3))
def exits_at_once(completions, **_): return each(completions, lambda: os._exit(3))
def memory(completions, **_): return each(completions, lambda: len([bytearray(2**24) for _ in range(10**6)]))
def nan(completions, **_): return each(completions, lambda: float("nan"))
def wrong_length(completions, **_): return [1.0 for c in completions if c[0]["content"] != "bad"]
def prints(completions, **_):
    def flood():
        for _ in range(2000): print("x" * 10000); print("x" * 10000, file=sys.stderr)
        return 0.5
    return each(completions, flood)
def kills_itself(completions, **_): return each(completions, lambda: os.kill(os.getpid(), signal.SIGKILL))
def stops_itself(completions, **_): return each(completions, lambda: os.kill(os.getpid(), signal.SIGSTOP))
def threads(completions, **_):
    def start():
        for _ in range(50): threading.Thread(target=time.sleep, args=(600,)).start()
        return 0.5
    return each(completions, start)
SEEN = []
def global_state(completions, **_):
    def break_all():
        SEEN.append(1); os.chdir("/"); os.environ.clear(); sys.path.clear(); sys.setrecursionlimit(60)
        return 0.5
    return each(completions, break_all)
"""

SLOW_IMPORT = "import time; time.sleep(600)\n" + "def scores(completions, **_): return [1.0] * len(completions)\n"
LEISURELY_IMPORT = SLOW_IMPORT.replace("600", "2")


JUDGE_SECONDS, JUDGE_PORT = 0.05, 18763
JUDGE_URL = f"http://127.0.0.1:{JUDGE_PORT}/v1"


class JudgeHandler(BaseHTTPRequestHandler):
    """A chat endpoint that says `right` after `JUDGE_SECONDS`."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(JUDGE_SECONDS)
        reply = {"choices": [{"message": {"role": "assistant", "content": 'Equal.\n{"correct": true}'}}], "usage": {"total_tokens": 100}}
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing: the tables are the output."""


@contextmanager
def judge_server() -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", JUDGE_PORT), JudgeHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A reward to measure, and what it judges: `answer` is the gold one, `texts` the responses in turn, `columns` the problem's.

    `share` of the responses is judged: slow kinds need not judge them all. `settings` are those of the reward.
    """

    label: str
    function: str
    answer: str
    texts: Sequence[str]
    args: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0


THINKING = "Let x be the number of apples; then 2x + 3 = 17, so x = 7. Wait, check: 2 * 7 + 3 = 17. "
KINDS = [
    Kind(label="exact_answer", function="exact_answer", answer="7", texts=("7", "8")),
    Kind(label="math, integers", function="math", answer="7", texts=("The answer is \\boxed{7}.", "\\boxed{8}")),
    Kind(
        label="math, expressions, all different",
        function="math",
        answer="\\frac{\\sqrt{3}}{2}",
        texts=tuple(f"\\boxed{{\\frac{{{n}\\sqrt{{3}}}}{{{2 * n + n % 2}}}}}" for n in range(1, 2500)),
    ),
    Kind(label="choice", function="choice", answer="B", texts=("The answer is (B).", "C", "\\boxed{\\text{B}}")),
    Kind(label="think_format", function="think_format", answer="7", texts=("7",)),
    Kind(label="repetition_penalty", function="repetition_penalty", answer="7", texts=("7",)),
    Kind(label="overlong_penalty", function="overlong_penalty", answer="7", texts=("7",), args={"max_tokens": 2000, "cache_tokens": 500}),
    Kind(
        label="code, two cases",
        function="code",
        answer="7",
        texts=("```python\nprint(int(input()) + 1)\n```", "```python\nprint(input())\n```"),
        columns={"tests": [{"input": "6\n", "output": "7\n"}, {"input": "7\n", "output": "8\n"}]},
        args={"isolation": "best_effort"},
        settings={"timeout": 60, "batch": 8},
        share=0.0625,
    ),
    Kind(
        label=f"judge that takes {JUDGE_SECONDS} s, all different",
        function="judge",
        answer="7",
        texts=tuple(f"It is {number}." for number in range(2500)),
        args={"model": "a-judge", "base_url": JUDGE_URL},
        share=0.25,
    ),
    Kind(label="plugin, TRL form", function="plugin.py:nothing", answer="7", texts=("7",)),
    Kind(label="plugin, single sample", function="plugin.py:one_sample", answer="7", texts=("7",)),
]


def groups_of(kind: Kind, count: int, thinking: int = 20) -> list[Group]:
    """`count` responses in groups of 8, each with `thinking` sentences before its answer and about 800 token ids."""
    ids = tuple(index * 7919 % 5000 for index in range(40 * thinking))
    groups = []
    for number in range(count // GROUP):
        texts = [kind.texts[(number * GROUP + index) % len(kind.texts)] for index in range(GROUP)]
        texts = [f"<think>{THINKING * thinking}</think>{text}" for text in texts]
        groups.append(group(f"p{number}", kind.answer, texts, ids, kind.columns))
    return groups


def group(name: str, answer: str, texts: Sequence[str], ids: tuple[int, ...] = (1,), columns: Mapping[str, Any] | None = None) -> Group:
    trajectories = tuple(
        Trajectory(problem_id=name, sample_index=i, token_ids=ids, logprobs=(), segments=(), finish_reason="stop", text=text)
        for i, text in enumerate(texts)
    )
    problem = Problem(
        id=name, messages=({"role": "user", "content": "How many apples?"},), prompt_ids=(1,), answer=answer, columns=columns or {}
    )
    return Group(problem=problem, trajectories=trajectories)


def rewards_config(function: str, **changes: Any) -> RewardsConfig:
    own = {key: changes.pop(key) for key in ("args", "timeout", "load_timeout", "batch") if key in changes}
    return RewardsConfig.model_validate({"functions": [{"function": function, "name": "reward", **own}], "processes": PROCESSES, **changes})


def speed(folder: Path, count: int) -> None:
    print(f"\n## Speed: {count} responses of about 1,800 characters, {PROCESSES} processes\n")
    print("| reward | rewards/s | samples/call | p50 of a call, ms | p99, ms | ms/sample |\n|---|---|---|---|---|---|")
    for kind in KINDS:
        calls = Calls()
        groups = groups_of(kind, int(count * kind.share))
        settings = rewards_config(kind.function, args=kind.args, **kind.settings)
        with RewardPool(settings, folder, observe=lambda _, samples, seconds, calls=calls: calls.add(samples, seconds)) as pool:
            scorer = Scorer(settings, pool.run)
            scorer.score(groups[: 2 * PROCESSES * -(-settings.functions[0].batch // GROUP)])  # every process imports
            calls.seconds.clear()
            calls.samples.clear()
            started = time.perf_counter()
            scored = scorer.score(groups)
            seconds = time.perf_counter() - started
        errors = [t.reward_error for g in scored for t in g.trajectories if t.reward_error]
        if errors:
            raise RuntimeError(f"{kind.label}: {errors[0]}")
        p50, p99 = (1e3 * percentile(calls.seconds, share) for share in (0.5, 0.99))
        judged = sum(calls.samples)
        per_sample, per_call = 1e3 * sum(calls.seconds) / judged, judged / len(calls.samples)
        print(f"| {kind.label} | {judged / seconds:,.0f} | {per_call:.0f} | {p50:.1f} | {p99:.1f} | {per_sample:.3f} |", flush=True)


def overhead(folder: Path, count: int) -> bool:
    print(f"\n## Overhead of isolation: a reward that does nothing, {count} responses, one process\n")
    print("| characters | samples/call | isolated, ms/sample | in this process | overhead |\n|---|---|---|---|---|")
    good = True
    function = load("plugin.py:nothing", folder)
    parameters, loop = parameters_of(function, {}), asyncio.new_event_loop()
    kind = next(kind for kind in KINDS if kind.function == "plugin.py:nothing")
    for thinking, batch in ((2, 64), (20, 64), (20, 8), (400, 64)):
        samples = samples_of(groups_of(kind, count, thinking))
        with RewardPool(rewards_config("plugin.py:nothing", batch=batch, processes=1), folder) as pool:
            pool.run(samples[:64])
            started = time.perf_counter()
            pool.run(samples)
            isolated = time.perf_counter() - started
        started = time.perf_counter()
        for start in range(0, count, batch):
            call_reward(function, samples[start : start + batch], {}, parameters, loop)
        bare = time.perf_counter() - started
        cost = 1e3 * (isolated - bare) / count
        good &= cost <= GOAL_MILLISECONDS
        characters = len(samples[0].completion)
        print(f"| {characters:,} | {batch} | {1e3 * isolated / count:.3f} | {1e3 * bare / count:.3f} | {cost:.3f} ms |", flush=True)
    return good


HOSTILE = [
    "raises", "hangs", "hangs_deaf", "forks", "exits", "exits_at_once", "memory", "nan", "wrong_length", "prints", "kills_itself",
    "stops_itself", "threads", "global_state",
]  # fmt: skip


def hostile(folder: Path) -> bool:
    print("\n## Hostile plugins: one bad response of 16, time limit 2 s a call, 0.5 GiB\n")
    print("| plugin | others scored | next batch scored | seconds | left running | what the run says of the bad sample |")
    print("|---|---|---|---|---|---|")
    good = [_hostile(folder, name, f"plugin.py:{name}") for name in HOSTILE]
    (folder / "leisurely.py").write_text(LEISURELY_IMPORT)
    (folder / "slow.py").write_text(SLOW_IMPORT)
    good.append(_hostile(folder, "import takes 2 s", "leisurely.py:scores"))
    try:
        with RewardPool(rewards_config("slow.py:scores", load_timeout=1.0), folder) as pool:
            pool.load()
    except UserError as error:
        print(f"| import takes 600 s | - | - | - | - | before anything is sampled: {error} |", flush=True)
        good.append("importing it failed: no answer within 1.0 s" in str(error))
    return all(good)


def _hostile(folder: Path, label: str, function: str) -> bool:
    texts = ["fine"] * 16
    texts[11] = "bad"
    groups = [group("first", "7", texts[:8]), group("second", "7", texts[8:])]
    fine = [group("first", "7", ["fine"] * 8)]
    settings = rewards_config(function, timeout=2.0, memory_gib=0.5)
    before = _children()
    with RewardPool(settings, folder) as pool:
        scorer = Scorer(settings, pool.run)
        pool.load()
        started = time.perf_counter()
        scored = [t for g in scorer.score(groups) for t in g.trajectories]
        seconds = time.perf_counter() - started
        again = sum(t.reward == 1.0 for g in scorer.score(fine) for t in g.trajectories)
    time.sleep(0.2)
    left = len(_children() - before)
    bad = scored.pop(11)
    others = sum(t.reward == 1.0 for t in scored)
    said = bad.reward_error or f"score {bad.reward:g}"
    print(f"| {label} | {others} of 15 | {again} of 8 | {seconds:.1f} | {left} | {said} |", flush=True)
    return others == 15 and again == 8 and left == 0


def _children() -> set[int]:
    """Processes of reward workers: those with the marker of this benchmark in their environment."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int(entry.name) != os.getpid() and _MARK in (entry / "environ").read_bytes():
                found.add(int(entry.name))
        except OSError:
            continue
    return found


_MARK = f"BREGMAN_BENCHMARK={os.getpid()}".encode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--only", choices=("speed", "overhead", "hostile"))
    options = parser.parse_args()
    os.environ["BREGMAN_BENCHMARK"] = str(os.getpid())
    good = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "plugin.py").write_text(PLUGIN)
        if options.only in (None, "speed"):
            with judge_server():
                speed(folder, options.samples)
        if options.only in (None, "overhead"):
            good &= overhead(folder, options.samples)
        if options.only in (None, "hostile"):
            good &= hostile(folder)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
