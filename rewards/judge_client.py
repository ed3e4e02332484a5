"""Chat completions from an OpenAI-compatible endpoint: retries with back-off, a bound on cost, and a cache of what was answered.

Owns the traffic. What is asked and what an answer means is `rewards.judge`.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx

LONGEST_BACKOFF = 20.0
"""Seconds."""


class Unanswered(Exception):
    """A request got no answer: one line that says why."""


@dataclass(kw_only=True, slots=True)
class Endpoint:
    """Where and how to ask, and what it may cost.

    Attributes:
        api_key: sent as a bearer token if not empty.
        timeout: seconds for one attempt.
        retries: further attempts after 408, 429, 5xx, time-outs and broken connections.
        backoff: seconds before the second attempt, doubled from then on; a random half of it is left out.
        max_requests: attempts that this process may make in all, those in the cache file included; None: no bound.
        max_tokens_total: tokens, by the endpoint's own count, after which nothing new is asked; None: no bound.
    """

    base_url: str
    api_key: str = field(repr=False)
    timeout: float
    retries: int
    backoff: float
    max_requests: int | None
    max_tokens_total: int | None


@dataclass(slots=True)
class Spent:
    """What this process has spent at an endpoint, what the cache file remembers included."""

    requests: int = 0
    tokens: int = 0


async def complete(client: httpx.AsyncClient, endpoint: Endpoint, body: Mapping[str, Any], spent: Spent) -> tuple[str, int]:
    """The text of the first choice, and the tokens that the request used.

    Raises:
        Unanswered: refused, out of retries, out of budget, or not a chat completion.
    """
    headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    url = endpoint.base_url.rstrip("/") + "/chat/completions"
    for attempt in range(endpoint.retries + 1):
        if endpoint.max_requests is not None and spent.requests >= endpoint.max_requests:
            raise Unanswered(f"cost bound reached: {spent.requests} requests")
        if endpoint.max_tokens_total is not None and spent.tokens >= endpoint.max_tokens_total:
            raise Unanswered(f"cost bound reached: {spent.tokens} tokens")
        spent.requests += 1
        wait = endpoint.backoff * 2**attempt
        try:
            response = await client.post(url, json=body, headers=headers, timeout=endpoint.timeout)
        except httpx.TimeoutException:
            why = f"no answer within {endpoint.timeout:.1f} s"
        except (httpx.TransportError, httpx.InvalidURL) as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        else:
            if response.status_code == 200:
                return _content(response, spent)
            why = f"HTTP {response.status_code}"
            if response.status_code not in (408, 429) and response.status_code < 500:
                raise Unanswered(f"{why}: {' '.join(response.text.split())[:100]}")
            wait = max(wait, _retry_after(response))
        if attempt < endpoint.retries:
            await asyncio.sleep(min(wait, LONGEST_BACKOFF) * random.uniform(0.5, 1.0))
    raise Unanswered(f"{why}, {endpoint.retries + 1} attempts")


def _content(response: httpx.Response, spent: Spent) -> tuple[str, int]:
    try:
        answer = response.json()
        content = answer["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        raise Unanswered("the endpoint's answer is no chat completion") from None
    usage = answer.get("usage") or {}
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    tokens = tokens if isinstance(tokens, int) else 0
    spent.tokens += tokens
    return (content if isinstance(content, str) else ""), tokens


def _retry_after(response: httpx.Response) -> float:
    try:
        return float(response.headers.get("retry-after", "0"))
    except ValueError:  # a date
        return 0.0


@cache
def ssl_context() -> ssl.SSLContext:
    """Made once: it reads every certificate of the machine."""
    return ssl.create_default_context()


class VerdictCache:
    """Verdicts by key, in memory and, where a file is named, in a JSONL file that processes of one machine may share."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._known: dict[str, bool | None] = {}
        self.requests, self.tokens = 0, 0
        if file is not None and file.is_file():
            for line in file.read_text(errors="replace").splitlines():
                self._take(line)

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> bool | None:
        return self._known[key]

    def add(self, key: str, verdict: bool | None, tokens: int) -> None:
        """Remember a verdict, None for a malformed one; in the file it is one line, written at once."""
        self._known[key] = verdict
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        # A line begins with a line break, so that one that was cut off by a kill spoils nothing but itself.
        line = "\n" + json.dumps({"key": key, "correct": verdict, "tokens": tokens})
        descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def _take(self, line: str) -> None:
        try:
            entry = json.loads(line)
            key, verdict, tokens = str(entry["key"]), entry["correct"], int(entry["tokens"])
        except (ValueError, LookupError, TypeError):  # cut off, or empty
            return
        if verdict is None or isinstance(verdict, bool):
            self._known[key] = verdict
            self.requests += 1
            self.tokens += tokens
