"""An OpenAI-compatible endpoint as a rollout engine: other people's models, or a `vllm serve`, write the samples.

Owns how problems become chat requests and answers trajectories. Traffic, retries and bounds are `bregman.chat_client`'s. There are no
log-probabilities and no weights to load, so this engine is for making data, never for RL.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from bregman.chat_client import Endpoint, Spent, Unanswered, ask, ssl_context
from bregman.data.images import open_image
from bregman.engines.config import SamplingConfig
from bregman.errors import ClusterError
from bregman.protocols import Learner
from bregman.types import FinishReason, Group, Problem, Segment, Trajectory

_FINISH: Mapping[str, FinishReason] = {"stop": "stop", "length": "length", "repetition": "repetition"}
_REASONING = ("reasoning_content", "reasoning")
"""Where servers with a reasoning parser put the thinking; it then is not in the content."""
FEWEST_ANSWERED = 0.5
"""Share of a call's samples below which the endpoint counts as broken."""


class EndpointEngine:
    """Implements `protocols.RolloutEngine` over HTTP.

    `token_ids` of a trajectory are the local tokenizer's of the text, so that lengths mean the same everywhere; `logprobs` is empty.
    A sample that got no answer has the finish reason `error`.

    Args:
        model: its name at the endpoint.
        tokenize: text -> token ids.
        think_marks: around thinking that the server gives apart from the content.
        concurrency: requests at once.
        extra: further keys of every request body.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        *,
        tokenize: Callable[[str], Sequence[int]],
        think_marks: tuple[str, str] = ("<think>", "</think>"),
        concurrency: int = 16,
        extra: Mapping[str, Any] | None = None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._endpoint, self._model, self._tokenize = endpoint, model, tokenize
        self._marks, self._concurrency, self._extra, self._warn = think_marks, concurrency, dict(extra or {}), warn
        self.spent = Spent()

    def load_weights(self, source: Learner | Path, version: int) -> Mapping[str, float]:
        raise TypeError("an endpoint has weights of its own; a stage that samples from it loads none")

    def rollout(self, problems: Sequence[Problem], sampling: SamplingConfig, *, seed: int) -> list[Group]:
        """`sampling.num_samples` answers to each problem, one request each, with a `seed` of its own from `seed`, the problem's place
        and the sample's index. Whether equal seeds give equal answers is up to the server.

        Raises:
            ClusterError: fewer than `FEWEST_ANSWERED` of the samples got an answer.
        """
        results = asyncio.run(self._all(problems, sampling, seed))
        failures = [result for result in results if isinstance(result, Unanswered)]
        where = f"endpoint {self._endpoint.base_url}, model {self._model}"
        if len(failures) > (1 - FEWEST_ANSWERED) * len(results):
            fix = "check address, key, model name and bounds; the same command goes on at the last chunk"
            raise ClusterError(where, f"{len(failures)} of {len(results)} requests failed, the first: {failures[0]}", fix)
        if failures:
            self._warn(f"{where}: {len(failures)} of {len(results)} requests failed, the first: {failures[0]}")
        k = sampling.num_samples
        samples = [self._trajectory(problems[place // k].id, place % k, result) for place, result in enumerate(results)]
        return [Group(problem=problem, trajectories=tuple(samples[place * k : (place + 1) * k])) for place, problem in enumerate(problems)]

    async def _all(self, problems: Sequence[Problem], sampling: SamplingConfig, seed: int) -> list[dict[str, Any] | Unanswered]:
        free = asyncio.Semaphore(self._concurrency)
        limits = httpx.Limits(max_connections=self._concurrency)
        async with httpx.AsyncClient(verify=ssl_context(), limits=limits) as client:

            async def one(messages: list[dict[str, Any]], place: int, sample: int) -> dict[str, Any] | Unanswered:
                body = {
                    "model": self._model,
                    "messages": messages,
                    "max_tokens": sampling.max_tokens,
                    "temperature": sampling.temperature,
                    "top_p": sampling.top_p,
                    "seed": request_seed(seed, place, sample),
                    **self._extra,
                }
                async with free:
                    try:
                        return (await ask(client, self._endpoint, body, self.spent))[0]
                    except Unanswered as error:
                        return error

            written = [chat_messages(problem) for problem in problems]
            requests = [one(written[place], place, sample) for place in range(len(problems)) for sample in range(sampling.num_samples)]
            return await asyncio.gather(*requests)

    def _trajectory(self, problem_id: str, sample: int, choice: dict[str, Any] | Unanswered) -> Trajectory:
        text = "" if isinstance(choice, Unanswered) else self._text(choice["message"])
        finish = "error" if isinstance(choice, Unanswered) else _FINISH.get(str(choice.get("finish_reason")), "stop")
        token_ids = tuple(self._tokenize(text))
        return Trajectory(
            problem_id=problem_id,
            sample_index=sample,
            token_ids=token_ids,
            logprobs=(),
            segments=(Segment(policy_version=0, length=len(token_ids)),),
            finish_reason=finish,
            text=text,
        )

    def _text(self, message: Mapping[str, Any]) -> str:
        content = message.get("content") or ""
        thinking = next((message[key] for key in _REASONING if message.get(key)), "")
        return f"{self._marks[0]}{thinking}{self._marks[1]}{content}" if thinking else str(content)


def request_seed(seed: int, place: int, sample: int) -> int:
    """31 bits: servers differ in how much of a larger one they take."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{place}/{sample}".encode(), digest_size=4).digest(), "big") >> 1


def chat_messages(problem: Problem) -> list[dict[str, Any]]:
    """The problem's messages as a chat request has them, images as data URLs (PNG).

    Raises:
        DataError: an image cannot be read.
    """
    payloads = iter(problem.images)
    messages = []
    for message in problem.messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [part if part["type"] == "text" else _image_part(next(payloads), problem.id) for part in content]
        messages.append({**message, "content": content})
    return messages


def _image_part(payload: Any, problem_id: str) -> dict[str, Any]:
    file = io.BytesIO()
    open_image(payload, f"problem {problem_id}").save(file, format="PNG")
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()}}
