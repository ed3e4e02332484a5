"""Requests to an OpenAI-compatible chat endpoint: retries with back-off, and a bound on what may be spent.

Owns the traffic. What is asked and what an answer means is the caller's (`rewards.judge`, `bregman.engines.endpoint`).
"""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
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


async def ask(client: httpx.AsyncClient, endpoint: Endpoint, body: Mapping[str, Any], spent: Spent) -> tuple[dict[str, Any], int]:
    """The first choice of the answer, which has a `message`, and the tokens that the request used.

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
                return _choice(response, spent)
            why = f"HTTP {response.status_code}"
            if response.status_code not in (408, 429) and response.status_code < 500:
                raise Unanswered(f"{why}: {' '.join(response.text.split())[:100]}")
            wait = max(wait, _retry_after(response))
        if attempt < endpoint.retries:
            await asyncio.sleep(min(wait, LONGEST_BACKOFF) * random.uniform(0.5, 1.0))
    raise Unanswered(f"{why}, {endpoint.retries + 1} attempts")


def _choice(response: httpx.Response, spent: Spent) -> tuple[dict[str, Any], int]:
    try:
        answer = response.json()
        choice = answer["choices"][0]
        choice["message"]["content"]
    except (ValueError, LookupError, TypeError):
        raise Unanswered("the endpoint's answer is no chat completion") from None
    usage = answer.get("usage") or {}
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    tokens = tokens if isinstance(tokens, int) else 0
    spent.tokens += tokens
    return choice, tokens


def _retry_after(response: httpx.Response) -> float:
    try:
        return float(response.headers.get("retry-after", "0"))
    except ValueError:  # a date
        return 0.0


@cache
def ssl_context() -> ssl.SSLContext:
    """Made once: it reads every certificate of the machine."""
    return ssl.create_default_context()
