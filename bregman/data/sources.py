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

from bregman.data.chat import expand_images, render_prompt
from bregman.data.config import SourceConfig
from bregman.data.images import content_hash, encode_images, named, refused, resolve, storable
from bregman.data.readers import Rows, read_rows, source_name, unknown_name
from bregman.errors import DataError
from bregman.types import Conversation, Message, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from bregman.protocols import ImageEncoder

__all__ = ["read_conversations", "read_problems", "read_rows", "source_name"]

ROLES = ("system", "developer", "user", "assistant", "tool")
IMAGE_TAG = "<image>"
"""Where a plain text shows an image, as in LLaVA's data."""


def read_problems(
    source: SourceConfig,
    base_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    max_prompt_tokens: int,
    encoder: ImageEncoder | None = None,
) -> list[Problem]:
    """Every row as a problem.

    Standard columns: `prompt` (text, or messages as TRL writes them) or `messages` (ending where the policy takes over);
    optional `answer` (a text, a number, or a list of those that are acceptable: reward functions see it as it is, and
    `Problem.answer` holds a list as JSON, an empty one as None), `difficulty` (in [0, 1]), `images`, and `id` (a hash of prompt,
    images and answer if there is none).

    `images` is one payload or a list of them (`bregman.data.images`). Messages show them in order: as parts
    `{"type": "image"}`, which may hold a payload of their own (`"image": ...`), among parts `{"type": "text", "text": ...}`; or,
    in a content that is a plain text of a row with an `images` column, as the tag `<image>`.

    Args:
        encoder: of the model's images; None for a text model.

    Raises:
        DataError: naming the row: a column is missing or has the wrong type, an id occurs twice, the tokenizer has no token
            for a character, images cannot be read or differ in number from the places that show them, or the prompt is longer
            than `max_prompt_tokens` with its images expanded.
    """
    rows = read_rows(source, base_folder, seed)
    problems: list[Problem] = []
    places: dict[str, str] = {}
    for index, row in enumerate(rows):
        where = rows.where(index)
        problem = _problem(row, where, rows.name, tokenizer, encoder, image_folder(source, base_folder))
        if problem.id in places:
            fix = "ids must differ" if row.get("id") is not None else "drop one, or give the rows an `id` column"
            raise DataError(where, f"has the id `{problem.id}` of {places[problem.id]}", fix)
        places[problem.id] = where
        length = len(problem.prompt_ids)
        if length > max_prompt_tokens:
            fix = "shorten it, or make room: a larger window or a smaller `max_tokens`"
            images = f", {len(problem.image_positions)} of them for its images," if problem.image_positions else ""
            raise DataError(where, f"its prompt has {length} tokens{images} and the limit is {max_prompt_tokens}", fix)
        problems.append(problem)
    return problems


def read_conversations(source: SourceConfig, base_folder: Path, seed: int) -> list[Conversation]:
    """Every row as a conversation.

    Standard columns: `messages`, or `prompt` and `completion` (text, or messages as TRL writes them); optional `id` (the row
    number if there is none), `images` (as in `read_problems`) and `tools` (schemas of functions, a list or a JSON text). Turns may
    have `tool_calls`, and `train: false` where an answer is context only.

    Raises:
        DataError: naming the row: a column is missing or has the wrong type, a role is unknown, an answer is empty, two turns in a
            row are the user's or the assistant's, or there is no answer to train on.
    """
    rows, folder = read_rows(source, base_folder, seed), image_folder(source, base_folder)
    return [read_conversation(rows, index, folder) for index in range(len(rows))]


def read_conversation(rows: Rows, index: int, folder: Path) -> Conversation:
    """Row `index` as a conversation; its relative image paths start at `folder`. Columns and errors as `read_conversations`."""
    row, where = rows[index], rows.where(index)
    if row.get("messages") is not None:
        messages = _messages(row["messages"], "messages", where)
    else:
        prompt = _turns(row, "prompt", "user", where, alternative="messages")
        messages = (*prompt, *_turns(row, "completion", "assistant", where))
    _check_turns(messages, where)
    messages, images = _place_images(messages, row, folder, where)
    identity = rows.number(index) if row.get("id") is None else str(row["id"])
    return Conversation(id=identity, messages=messages, images=images, source=rows.name, tools=_tools(row, where))


def row_columns(messages: Sequence[Message], images: Sequence[Any], where: str) -> dict[str, Any]:
    """The columns `messages` and `images` of a row that is read back as these; every row has them in one type, as Parquet needs.

    Messages are plain texts with `<image>` tags. Images are `datasets` images; None without any.
    """
    texts = [
        message
        if isinstance(message["content"], str)
        else {**message, "content": "".join(IMAGE_TAG if part["type"] == "image" else part["text"] for part in message["content"])}
        for message in messages
    ]
    stored = [storable(image, named(where, index, len(images))) for index, image in enumerate(images)]
    return {"messages": [dict(message) for message in texts], "images": stored or None}


def image_folder(source: SourceConfig, base_folder: Path) -> Path:
    """Where relative image paths of a source start: at its data file; at the recipe for a generator and for hub data."""
    beside = source.kind in ("jsonl", "parquet")
    return (base_folder / Path(source.path).expanduser()).parent if beside else base_folder  # type: ignore[union-attr]


def _problem(
    row: Mapping[str, Any],
    where: str,
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    encoder: ImageEncoder | None,
    folder: Path,
) -> Problem:
    if row.get("messages") is not None:
        messages = _messages(row["messages"], "messages", where)
    else:
        messages = _turns(row, "prompt", "user", where, alternative="messages")
    if messages[-1]["role"] == "assistant":
        raise DataError(where, "its last turn is the assistant's", "a problem ends where the policy takes over: drop that turn")
    answer = row.get("answer")
    _check_answer(answer, where)
    if encoder is None and _given_images(row):
        raise refused(where)
    messages, images = _place_images(messages, row, folder, where)
    patches = encode_images(images, encoder, where)
    prompt = render_prompt(tokenizer, messages, where, images=len(images))
    prompt_ids, positions, _ = expand_images(prompt, patches, encoder, where)
    identity = row.get("id")
    return Problem(
        id=_content_hash(messages, images, answer) if identity is None else str(identity),
        messages=messages,
        prompt_ids=tuple(prompt_ids.tolist()),
        images=images,
        patches=patches,
        image_positions=() if positions is None else tuple(positions.tolist()),
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
        content = _parts(content, place, where)
        if role == "assistant" and not isinstance(content, str):
            raise DataError(where, f"`{place}`: the assistant's turn shows an image", "move it to a turn that the model reads")
    elif content is None and role == "assistant" and turn.get("tool_calls"):
        content = ""
    elif not isinstance(content, str):
        raise DataError(where, f"`{place}` has {content!r} as its content", "give a text")
    if not isinstance(turn.get("train", True), bool | None):
        raise DataError(where, f"`{place}` has {turn['train']!r} as `train`", "give true or false")
    return {**_without_nulls(turn), "content": content}


def _without_nulls(value: Any) -> Any:
    """Columnar files give every turn, tool and call every key that any of them has; templates look at which keys are there."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def _tools(row: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], ...]:
    """The schemas in the `tools` column: a list of objects, or that list as JSON text."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise DataError(where, f"`tools` is not valid JSON ({error})", "give a list of function schemas") from None
    if tools is None:
        return ()
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(where, f"`tools` is {type(tools).__name__}, not a list of objects", "give a list of function schemas")
    return tuple(_without_nulls(tool) for tool in tools)


def _parts(parts: Sequence[Any], place: str, where: str) -> str | list[dict[str, Any]]:
    """Content parts with the keys that mean something; joined to one text if all of them are text."""
    kept: list[dict[str, Any]] = []
    for index, part in enumerate(parts):
        # columnar files give every part every key that any part has
        part = {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
        kind = part.get("type", "text")
        if kind == "text" and isinstance(part.get("text"), str):
            kept.append({"type": "text", "text": part["text"]})
        elif kind == "image" and not part.keys() - {"type", "image", "path"} and len(part) < 3:
            payload = part.get("image", part.get("path"))
            kept.append({"type": "image"} if payload is None else {"type": "image", "image": payload})
        else:
            fix = 'give parts {"type": "text", "text": ...} and {"type": "image"}'
            raise DataError(where, f"`{place}`: part {index} is neither a text nor an image to be opened", fix)
    if all(part["type"] == "text" for part in kept):
        return "".join(part["text"] for part in kept)
    return kept


def _place_images(
    messages: tuple[Message, ...], row: Mapping[str, Any], folder: Path, where: str
) -> tuple[tuple[Message, ...], tuple[Any, ...]]:
    """Messages whose image parts are bare, and the payloads in the order in which the parts show them."""
    given = _given_images(row)
    if given is not None:
        messages = tuple(_split_tags(message) for message in messages)
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    shown = [part for part in parts if part["type"] == "image"]
    places = sum("image" not in part for part in shown)
    column = given or []
    if places != len(column):
        found = f"its messages have {places} places for images and its `images` column has {len(column)}"
        raise DataError(where, found, f'mark each place with a part {{"type": "image"}}, or with `{IMAGE_TAG}` in a plain text')
    following = iter(column)
    payloads = [part["image"] if "image" in part else next(following) for part in shown]
    images = tuple(resolve(payload, folder, named(where, index, len(payloads))) for index, payload in enumerate(payloads))
    return tuple(_bare(message) for message in messages), images


def _split_tags(message: Message) -> Message:
    """A plain text that the model reads, with its `<image>` tags as parts; text parts are taken as they are."""
    content = message["content"]
    if message["role"] == "assistant" or not isinstance(content, str) or IMAGE_TAG not in content:
        return message
    first, *rest = content.split(IMAGE_TAG)
    parts = [{"type": "text", "text": first}]
    for text in rest:
        parts += [{"type": "image"}, {"type": "text", "text": text}]
    return {**message, "content": [part for part in parts if part.get("text") != ""]}


def _bare(message: Message) -> Message:
    if isinstance(message["content"], str):
        return message
    return {**message, "content": [{"type": "image"} if part["type"] == "image" else part for part in message["content"]]}


def _check_turns(messages: Sequence[Message], where: str) -> None:
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise DataError(where, "no assistant turn to train on", "add one, or drop the row")
    if roles[0] == "assistant":
        raise DataError(where, "its first turn is the assistant's", "put the user's turn before it")
    if roles[-1] != "assistant":
        raise DataError(where, f"its last turn is the {roles[-1]}'s", "end it with the assistant's answer")
    if all(message.get("train") is False for message in messages if message["role"] == "assistant"):
        raise DataError(where, "no assistant turn to train on: all have `train: false`", "drop the row")
    for index, message in enumerate(messages):
        role, before = message["role"], roles[index - 1] if index else ""
        if role == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            raise DataError(where, f"the assistant's answer in turn {index} is empty", "fill it in, or drop the row")
        if role == before and role in ("user", "assistant"):
            raise DataError(where, f"turns {index - 1} and {index} are both the {role}'s", "join them, or drop the row")
        if role == "tool" and before not in ("assistant", "tool"):
            raise DataError(where, f"the tool's turn {index} follows the {before or 'start'}'s", "put the assistant's call before it")


def _given_images(row: Mapping[str, Any]) -> list[Any] | None:
    """The payloads of the `images` column, of which one may stand alone; None without the column."""
    images = row.get("images")
    if images is None or isinstance(images, list | tuple):
        return None if images is None else list(images)
    return [images]


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


def _content_hash(messages: Sequence[Message], images: Sequence[Any], answer: Any) -> str:
    content: list[Any] = [[dict(message) for message in messages], answer]
    if images:
        content.append([content_hash(image, "image") for image in images])
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
