"""The `judge` reward against a real HTTP server on the loopback interface."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bregman.chat_client import Unanswered
from bregman.errors import RewardError
from rewards.call import Failure, Sample
from rewards.config import RewardConfig, RewardsConfig
from rewards.judge import _state, judge, read_verdict
from rewards.pool import RewardPool


class Judge(ThreadingHTTPServer):
    """Answers by a word in the student's answer."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()
        self.at_once = self.most_at_once = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Judge

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        said = body["messages"][0]["content"].split("<student>")[1].split("</student>")[0].strip()
        with self.server.lock:
            self.server.seen[said] += 1
            times = self.server.seen[said]
            self.server.bodies.append(body)
            self.server.keys.append(self.headers.get("authorization"))
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        status, reply = 200, 'They differ. {"correct": false}'
        if "slow" in said:
            time.sleep(1.0)
        if "pause" in said:
            time.sleep(0.05)
        if "right" in said:
            reply = 'Let me compare.\n```json\n{"correct": true}\n```'
        if "malformed" in said:
            reply = "I believe it is correct."
        if "busy" in said and times <= 2:
            status = 429
        if "down" in said:
            status = 500
        if "forbidden" in said:
            status = 403
        answer = {"choices": [{"message": {"content": reply}}], "usage": {"total_tokens": 10}} if "odd" not in said else ["odd"]
        data = json.dumps(answer).encode()
        with self.server.lock:
            self.server.at_once -= 1
        try:
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # the client has given up
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    _state.cache_clear()
    running = Judge()
    thread = threading.Thread(target=running.serve_forever, args=(0.02,))
    thread.start()
    yield running
    running.shutdown()
    thread.join(5)
    running.server_close()


def ask(url: str, *texts: str, gold: Any = "4", **args: Any) -> list[float | None]:
    prompts = [[{"role": "user", "content": "2+2?"}]] * len(texts)
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    settings: dict[str, Any] = {"backoff": 0.01, "unjudged": "none", **args}
    return asyncio.run(judge(prompts, completions, [gold] * len(texts), base_url=url, model="m", **settings))


@pytest.mark.parametrize(
    ("text", "score", "requests"),
    [
        ("right", 1.0, 1),
        ("wrong", 0.0, 1),
        ("<think>right</think>wrong", 0.0, 1),
        ("<think>right", 0.0, 0),  # no answer: no question
        ("malformed", None, 1),
        ("odd", None, 1),
        ("busy, right", 1.0, 3),
        ("down", None, 4),
        ("forbidden", None, 1),  # asking again would not help
        ('{"correct": true} wrong', 0.0, 1),
        ("{reference} right {question}", 1.0, 1),
    ],
)
def test_verdicts(server: Judge, text: str, score: float | None, requests: int) -> None:
    assert ask(server.url, text) == [score]
    assert sum(server.seen.values()) == requests


def test_the_question(server: Judge) -> None:
    ask(server.url, "<think>no</think>{reference} right", gold="{answer}")
    [message] = server.bodies[0]["messages"]
    assert (
        "<question>\n2+2?\n</question>\n<reference>\n{answer}\n</reference>\n<student>\n{reference} right\n</student>" in message["content"]
    )
    assert server.bodies[0]["model"] == "m" and server.keys == [None]


def test_no_gold_answer_is_not_applicable(server: Judge) -> None:
    assert ask(server.url, "right", gold=None) == [None]
    assert not server.seen


def test_missing_verdicts_fail_with_their_reason(server: Judge) -> None:
    for text, reason in [("malformed", "malformed verdict"), ("down", "HTTP 500, 4 attempts"), ("forbidden", "HTTP 403")]:
        with pytest.raises(Unanswered, match=reason):
            ask(server.url, "right", text, unjudged="fail")


def test_slow_replies_time_out(server: Judge) -> None:
    started = time.monotonic()
    with pytest.raises(Unanswered, match=r"no answer within 0.1 s, 2 attempts"):
        ask(server.url, "slow 1", unjudged="fail", request_seconds=0.1, retries=1)
    with pytest.raises(Unanswered, match=r"no verdict within 0.2 s"):
        ask(server.url, "slow 2", "right", unjudged="fail", call_seconds=0.2)
    assert time.monotonic() - started < 1.5


def test_connection_refused() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(Unanswered, match=r"ConnectError.*2 attempts"):
        ask(url, "right", unjudged="fail", retries=1)


def test_same_question_is_asked_once(server: Judge) -> None:
    assert ask(server.url, "right", "right", "wrong", "malformed") == [1.0, 1.0, 0.0, None]
    assert ask(server.url, "right", "malformed", "wrong") == [1.0, None, 0.0]
    assert server.seen == {"right": 1, "wrong": 1, "malformed": 1}


def test_failures_are_remembered_for_the_repeated_call(server: Judge) -> None:
    assert ask(server.url, "down") == ask(server.url, "down") == [None]
    assert server.seen["down"] == 4


def test_cache_file_outlasts_the_process_and_a_torn_line(server: Judge, tmp_path: Path) -> None:
    file = tmp_path / "cache" / "judge.jsonl"
    assert ask(server.url, "right", "malformed", cache_file=str(file)) == [1.0, None]
    with file.open("a") as stream:
        stream.write('\n{"key": "cut o')
    for _ in range(2):
        _state.cache_clear()
        assert ask(server.url, "right", "malformed", "wrong", cache_file=str(file)) == [1.0, None, 0.0]
    assert server.seen == {"right": 1, "malformed": 1, "wrong": 1}


def test_what_was_spent_is_known_after_a_restart(server: Judge, tmp_path: Path) -> None:
    file = str(tmp_path / "judge.jsonl")
    ask(server.url, *(f"right {index}" for index in range(4)), cache_file=file)
    for bound in ({"max_requests": 4}, {"max_tokens_total": 40}):
        _state.cache_clear()
        assert ask(server.url, "right 9", "right 0", cache_file=file, **bound) == [None, 1.0]
    _state.cache_clear()
    assert ask(server.url, "right 9", cache_file=file, max_requests=5, max_tokens_total=41) == [1.0]


@pytest.mark.parametrize("bound", [{"max_requests": 2}, {"max_tokens_total": 20}])
def test_cost_bound(server: Judge, bound: dict[str, int]) -> None:
    texts = [f"right {index}" for index in range(5)]
    assert ask(server.url, *texts, concurrency=1, **bound) == [1.0, 1.0, None, None, None]
    assert sum(server.seen.values()) == 2
    with pytest.raises(Unanswered, match="cost bound reached"):
        ask(server.url, "right 9", unjudged="fail", **bound)
    assert ask(server.url, "right 0", **bound) == [1.0]  # what is known costs nothing


def test_concurrency(server: Judge) -> None:
    ask(server.url, *(f"pause {index}" for index in range(12)), concurrency=3)
    assert server.most_at_once == 3


def test_api_key_comes_from_the_environment(server: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_TEST_KEY", "secret")
    ask(server.url, "right", api_key_env="JUDGE_TEST_KEY")
    assert server.keys == ["Bearer secret"]
    monkeypatch.delenv("JUDGE_TEST_KEY")
    with pytest.raises(RewardError, match="JUDGE_TEST_KEY is not set"):
        ask(server.url, "right", api_key_env="JUDGE_TEST_KEY")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"api_key_env": "JUDGE_KEY_THAT_IS_NOT_SET"}, "environment variable JUDGE_KEY_THAT_IS_NOT_SET is not set"),
        ({"template": "Is {answer} right?"}, r"its template has no \{reference\}"),
        ({"template": "Is {completion} equal to {reference}?"}, r"its template has no \{answer\}"),
        ({"template": "Is {answer} equal to {reference}?"}, None),
    ],
)
def test_what_the_judge_lacks_shows_at_load(tmp_path: Path, args: dict[str, str], expected: str | None) -> None:
    args = {"base_url": "http://127.0.0.1:9/v1", "model": "m", **args}
    with RewardPool(RewardsConfig(functions=[RewardConfig(function="judge", args=args)]), tmp_path) as pool:
        if expected is None:
            pool.load()
            return
        with pytest.raises(RewardError, match=expected) as caught:
            pool.load()
    assert "\n" not in str(caught.value)


def test_metrics_count_what_has_no_verdict(server: Judge) -> None:
    logged: dict[str, float] = {}
    ask(server.url, "right", "malformed 1", "malformed 2", "forbidden", log_metric=logged.__setitem__)
    assert logged == {"judge_malformed": 2.0, "judge_failed": 1.0}


def test_in_the_pool_only_the_unjudged_samples_fail(server: Judge, tmp_path: Path) -> None:
    args = {"base_url": server.url, "model": "m", "backoff": 0.01, "retries": 1}
    rewards = RewardsConfig(functions=[RewardConfig(function="judge", args=args)])
    texts = ["right", "malformed", "wrong", "down", "right"]
    samples = [
        Sample(problem_id="p", sample_index=i, prompt=(), completion=text, completion_ids=(), columns={"answer": "4"})
        for i, text in enumerate(texts)
    ]
    with RewardPool(rewards, tmp_path) as pool:
        [outcomes] = pool.run(samples)
    assert [outcomes[i] for i in (0, 2, 4)] == [1.0, 0.0, 1.0]
    assert isinstance(outcomes[1], Failure) and "malformed verdict" in outcomes[1].text
    assert isinstance(outcomes[3], Failure) and "HTTP 500" in outcomes[3].text
    assert server.seen == {"right": 1, "malformed": 1, "wrong": 1, "down": 2}  # the repeated call asks nothing again


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ('{"correct": true}', True),
        ('so {"correct": false}\n', False),
        ('{"correct": true} or rather {"correct": false}', False),
        ('{"correct": true}, I think', None),
        ('{"correct": "true"}', None),
        ('{"correct": 1}', None),
        ('{"verdict": true}', None),
        ('{"correct": tr', None),
        ("}", None),
        ("", None),
    ],
)
def test_read_verdict(reply: str, verdict: bool | None) -> None:
    assert read_verdict(reply) is verdict
