"""Rows -> problems and conversations, checked row by row.

Owns what the standard columns mean. Opening files lives in `bregman.data.readers`; token ids come from `bregman.data.chat`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bregman.data.chat import render_prompt
from bregman.data.config import SourceConfig
from bregman.data.readers import read_rows, source_name, unknown_name
from bregman.errors import DataError
from bregman.types import Conversation, Message, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["read_conversations", "read_problems", "read_rows", "source_name"]

ROLES = ("system", "developer", "user", "assistant", "tool")


def read_problems(
    source: SourceConfig, base_folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int, *, max_prompt_tokens: int
) -> list[Problem]:
    """Every row as a problem.

    Standard columns: `prompt` (text, or messages as TRL writes them) or `messages` (ending where the policy takes over);
    optional `answer` (a text, a number, or a list of those that are acceptable: reward functions see it as it is, and
    `Problem.answer` holds a list as JSON, an empty one as None), `difficulty` (in [0, 1]), `images`, and `id` (a hash of prompt
    and answer if there is none).

    Raises:
        DataError: naming the row: a column is missing or has the wrong type, an id occurs twice, the tokenizer has no token
            for a character, or the prompt is longer than `max_prompt_tokens`.
    """
    rows = read_rows(source, base_folder, seed)
    problems: list[Problem] = []
    places: dict[str, str] = {}
    for index, row in enumerate(rows):
        where = rows.where(index)
        problem = _problem(row, where, rows.name, tokenizer)
        if problem.id in places:
            fix = "ids must differ" if row.get("id") is not None else "drop one, or give the rows an `id` column"
            raise DataError(where, f"has the id `{problem.id}` of {places[problem.id]}", fix)
        places[problem.id] = where
        length = len(problem.prompt_ids)
        if length > max_prompt_tokens:
            fix = "shorten it, or make room: a larger window or a smaller `max_tokens`"
            raise DataError(where, f"its prompt has {length} tokens and the limit is {max_prompt_tokens}", fix)
        problems.append(problem)
    return problems


def read_conversations(source: SourceConfig, base_folder: Path, seed: int) -> list[Conversation]:
    """Every row as a conversation.

    Standard columns: `messages`, or `prompt` and `completion` (text, or messages as TRL writes them); optional `id` (the row
    number if there is none) and `images`.

    Raises:
        DataError: naming the row: a column is missing or has the wrong type, a role is unknown, an answer is empty, or there
            is none.
    """
    rows = read_rows(source, base_folder, seed)
    conversations = []
    for index, row in enumerate(rows):
        where = rows.where(index)
        if row.get("messages") is not None:
            messages = _messages(row["messages"], "messages", where)
        else:
            prompt = _turns(row, "prompt", "user", where, alternative="messages")
            messages = (*prompt, *_turns(row, "completion", "assistant", where))
        _check_turns(messages, where)
        identity = rows.number(index) if row.get("id") is None else str(row["id"])
        conversations.append(Conversation(id=identity, messages=messages, images=_images(row, where), source=rows.name))
    return conversations


def _problem(row: Mapping[str, Any], where: str, source: str, tokenizer: PreTrainedTokenizerBase) -> Problem:
    if row.get("messages") is not None:
        messages = _messages(row["messages"], "messages", where)
    else:
        messages = _turns(row, "prompt", "user", where, alternative="messages")
    if messages[-1]["role"] == "assistant":
        raise DataError(where, "its last turn is the assistant's", "a problem ends where the policy takes over: drop that turn")
    answer = row.get("answer")
    _check_answer(answer, where)
    images = _images(row, where)
    if images:
        raise DataError(where, "has images, and the model is a text model", "remove the `images` column or use a vision model")
    identity = row.get("id")
    return Problem(
        id=_content_hash(messages, answer) if identity is None else str(identity),
        messages=messages,
        prompt_ids=tuple(render_prompt(tokenizer, messages, where)),
        answer=_answer_text(answer),
        difficulty=_difficulty(row.get("difficulty"), where),
        source=source,
        columns=dict(row),
    )


def _turns(row: Mapping[str, Any], column: str, role: str, where: str, alternative: str = "") -> tuple[Message, ...]:
    """The turns in `prompt` or `completion`: text is one turn of `role`, messages are taken as they are."""
    value = row.get(column)
    if value is None:
        wanted = f"`{column}`" + (f" or `{alternative}`" if alternative else "")
        state = "is empty" if column in row else "no such column"
        raise DataError(where, f"needs {wanted} ({state})", "map it under `columns:`; " + unknown_name(column, row))
    if isinstance(value, str):
        return _messages([{"role": role, "content": value}], column, where)
    return _messages(value, column, where)


def _messages(value: Any, column: str, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list | tuple):
        raise DataError(where, f"`{column}` is a {type(value).__name__}", 'give a list of {"role": ..., "content": ...}')
    if not value:
        raise DataError(where, f"`{column}` is an empty list", "fill it in, or drop the row")
    return tuple(_message(turn, f"{column}[{index}]", where) for index, turn in enumerate(value))


def _message(turn: Any, place: str, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(where, f"`{place}` is a {type(turn).__name__}", 'give {"role": ..., "content": ...}')
    role, content = turn.get("role"), turn.get("content")
    if role is None and "from" in turn:
        raise DataError(where, f"`{place}` has `from` and `value`", "convert ShareGPT turns to `role` and `content`")
    if role not in ROLES:
        raise DataError(where, f"`{place}` has the role {role!r}", f"choose one of {', '.join(ROLES)}")
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = _joined(content, place, where)
    if not isinstance(content, str):
        raise DataError(where, f"`{place}` has {content!r} as its content", "give a text")
    # columnar files give every turn every key that any turn has; templates look at which keys are there
    return {**{key: value for key, value in turn.items() if value is not None}, "content": content}


def _joined(parts: Sequence[Any], place: str, where: str) -> str:
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(where, f"`{place}` has parts that are not text", "remove them, or use a vision model")
    return "".join(texts)  # type: ignore[arg-type]


def _check_turns(messages: Sequence[Message], where: str) -> None:
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise DataError(where, "no assistant turn to train on", "add one, or drop the row")
    if roles[0] == "assistant":
        raise DataError(where, "its first turn is the assistant's", "put the user's turn before it")
    if roles[-1] != "assistant":
        raise DataError(where, f"its last turn is the {roles[-1]}'s", "end it with the assistant's answer")
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and not message["content"].strip():
            raise DataError(where, f"the assistant's answer in turn {index} is empty", "fill it in, or drop the row")


def _images(row: Mapping[str, Any], where: str) -> tuple[Any, ...]:
    images = row.get("images")
    if images is None:
        return ()
    if not isinstance(images, list | tuple):
        raise DataError(where, f"`images` is a {type(images).__name__}", "give a list of images")
    return tuple(images)


def _check_answer(answer: Any, where: str) -> None:
    fix = "give a text, a number, or a list of them; reward functions get other columns too"
    if isinstance(answer, list | tuple):
        for index, one in enumerate(answer):
            if not isinstance(one, str | int | float):
                raise DataError(where, f"`answer[{index}]` is a {type(one).__name__}", fix)
    elif answer is not None and not isinstance(answer, str | int | float):
        raise DataError(where, f"`answer` is a {type(answer).__name__}", fix)


def _answer_text(answer: Any) -> str | None:
    if isinstance(answer, list | tuple):
        return json.dumps(answer, ensure_ascii=False) if answer else None
    return None if answer is None else str(answer)


def _difficulty(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value <= 1:
        raise DataError(where, f"`difficulty` is {value!r}", "give a number from 0 (easiest) to 1")
    return float(value)


def _content_hash(messages: Sequence[Message], answer: Any) -> str:
    text = json.dumps([[dict(message) for message in messages], answer], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
