"""What a judge costs and remembers: the text of its answers, and a cache of its verdicts.

Owns the cache. Traffic is `bregman.chat_client`; what is asked and what an answer means is `rewards.judge`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from bregman.chat_client import Endpoint, Spent, ask


async def complete(client: httpx.AsyncClient, endpoint: Endpoint, body: Mapping[str, Any], spent: Spent) -> tuple[str, int]:
    """The text of the first choice, and the tokens that the request used.

    Raises:
        Unanswered: refused, out of retries, out of budget, or not a chat completion.
    """
    choice, tokens = await ask(client, endpoint, body, spent)
    content = choice["message"]["content"]
    return (content if isinstance(content, str) else ""), tokens


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
