"""Chat templates: conversation -> token ids with a loss mask, prompt -> token ids, response -> text.

Owns which tokens are trained (the assistant's answers and their end tokens) and which stand for images. A template writes one
placeholder token per image; here it is repeated once per feature of the image. Does not read files, and does not pack.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from bregman.data.images import encode_images
from bregman.errors import DataError
from bregman.types import Conversation, ImagePatches, Message, Sequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from bregman.protocols import ImageEncoder

_GENERATION_MARK = re.compile(r"{%-?\s*generation\s*-?%}")
_PROBE = "BregmanProbe"
_ADD_MARKS = "put `{% generation %}` and `{% endgeneration %}` around the assistant's answer in the chat template"
_CLOSING_THINK_TAGS = ("</think>", "◁/think▷")
_THINK_TAGS = {"<think>", "◁think▷", *_CLOSING_THINK_TAGS}
"""Answers contain these, special tokens or not."""

_BESIDE_CONTENT = ("tool_calls", "reasoning_content")
"""Keys of a message, besides its content, that hold what an answer says."""

Span = tuple[int, int]
"""Characters [start, end) of a rendered conversation."""


@dataclass(frozen=True, slots=True)
class _ChatFormat:
    """What a tokenizer's chat template does, worked out once.

    Attributes:
        template: the Jinja source.
        variables: names of special tokens that templates refer to (`bos_token`, ...).
        has_marks: the template marks the assistant's answers itself.
        end_ids: tokens that end an answer.
        end_texts: the same as text.
        reserved: the text of any special token but the think tags: none may occur inside a message.
        unknown_id: what the tokenizer writes for text that it cannot express; None if it can express any text.
    """

    template: str
    variables: Mapping[str, Any]
    has_marks: bool
    end_ids: tuple[int, ...]
    end_texts: tuple[str, ...]
    reserved: re.Pattern[str]
    unknown_id: int | None


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Items[Message], where: str = "prompt", *, images: int = 0) -> list[int]:
    """Token ids of `messages` with the generation prompt, ready for the policy to write its turn once images are expanded.

    Raises:
        DataError: naming `where`: the template refuses the messages or leaves calls or thinking out, the messages show another
            number of images than `images`, a message contains a special token, or the tokenizer has no token for a character.
    """
    form = _format(tokenizer)
    _check_contents(form, messages, images, where)
    text, _ = _render(form, messages, where, generation_prompt=True)
    _check_written(form, messages, text, where, generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    _check_known(form, tokenizer, text, ids, where)
    return list(ids)


def expand_images(
    token_ids: Items[int] | np.ndarray, images: Items[ImagePatches], encoder: ImageEncoder | None, where: str
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Each placeholder repeated once per feature of its image.

    Returns:
        int64 [n] token ids; int64 [sum of num_tokens] places of the placeholders in them, None without images; int64 [len(token_ids)]
        how often each given token was repeated.

    Raises:
        DataError: naming `where`: the template wrote another number of placeholders than there are images.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    repeats = np.ones(len(ids), dtype=np.int64)
    if not images:
        return ids, None, repeats
    assert encoder is not None, "images are encoded by an encoder"
    places = np.flatnonzero(ids == encoder.placeholder_id)
    if len(places) != len(images):
        found = f"the chat template writes {len(places)} image placeholders for {len(images)} images"
        raise DataError(where, found, "use a chat template that writes one per image part")
    repeats[places] = [image.num_tokens for image in images]
    shown = np.zeros(len(ids), dtype=bool)
    shown[places] = True
    return np.repeat(ids, repeats), np.flatnonzero(np.repeat(shown, repeats)), repeats


def tokenize_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Items[Message],
    where: str = "conversation",
    *,
    images: Items[ImagePatches] = (),
    encoder: ImageEncoder | None = None,
    tools: Items[Mapping[str, Any]] = (),
) -> Sequence:
    """The conversation as tokens; the loss mask is True on the assistant's answers and on the end token after each.

    The answers are found by the template's generation marks; in a template without marks, by rendering the conversation up to
    each answer, without and with it. The prompt part is exactly what `render_prompt` gives, so a policy trained on this
    sequence is sampled from the same context.

    Args:
        images: what the image parts of the messages show, in order; `encoder` is the one that encoded them.
        tools: schemas of functions, for the template.

    Raises:
        DataError: naming `where`: the template refuses or rewrites the conversation so that answers cannot be told from
            prompts, or leaves calls, thinking or tools out; images and image parts differ in number, a message contains a special
            token, or the tokenizer has no token for a character.
    """
    form = _format(tokenizer)
    if not tokenizer.is_fast:
        raise DataError(where, "the tokenizer gives no character offsets", "use a fast tokenizer (one with a tokenizer.json)")
    if tools:
        form = replace(form, variables={**form.variables, "tools": list(tools)})
    _check_contents(form, messages, len(images), where)
    text, spans = _render_answers(form, messages, where)
    _check_written(form, messages, text, where, generation_prompt=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    token_ids = np.asarray(encoded["input_ids"], dtype=np.int64)
    _check_known(form, tokenizer, text, token_ids, where)
    offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    loss_mask = np.zeros(len(token_ids), dtype=bool)
    for span in spans:
        _mark(form, text, token_ids, offsets, span, loss_mask, where)
    if len(loss_mask):
        loss_mask[0] = False  # nothing comes before it to predict it from
    token_ids, positions, repeats = expand_images(token_ids, images, encoder, where)
    return Sequence(token_ids=token_ids, loss_mask=np.repeat(loss_mask, repeats), images=tuple(images), image_positions=positions)


def tokenize_conversations(
    tokenizer: PreTrainedTokenizerBase, conversations: Iterable[Conversation], *, encoder: ImageEncoder | None = None
) -> list[Sequence]:
    """`tokenize_conversation` for each, with its source and id in errors. `encoder`: the model's; None for a text model.

    Raises:
        DataError: as `tokenize_conversation`; an image cannot be opened or encoded; or the model is a text model and there is one.
    """
    sequences = []
    for conversation in conversations:
        where = f"{conversation.source} row {conversation.id}".strip()
        images = encode_images(conversation.images, encoder, where)
        sequences.append(
            tokenize_conversation(tokenizer, conversation.messages, where, images=images, encoder=encoder, tools=conversation.tools)
        )
    return sequences


def check_masks(sequences: Items[Sequence], tokenizer: PreTrainedTokenizerBase, names: Items[str] | None = None) -> None:
    """Assert that every sequence trains an end token and that its mask is neither all 0 nor all 1.

    Args:
        names: what each sequence is called in an error; `example 0`, ... if left out.

    Raises:
        DataError: naming the first sequence that fails.
    """
    end_ids = end_token_ids(tokenizer)
    for index, sequence in enumerate(sequences):
        where = names[index] if names is not None else f"example {index}"
        if not sequence.loss_mask.any():
            raise DataError(where, "no token would be trained", "give it an answer, or check the chat template's generation marks")
        if sequence.loss_mask[1:].all():
            raise DataError(where, "every token would be trained, the prompt included", "check the chat template's generation marks")
        if not _is_one_of(sequence.token_ids[sequence.loss_mask], end_ids).any():
            expected = ", ".join(f"`{text}`" for text in _format(tokenizer).end_texts)
            raise DataError(where, f"no end token ({expected}) would be trained, so the model would never stop", _ADD_MARKS)


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end a response: the one that the chat template puts after an answer, and the tokenizer's own eos."""
    return _format(tokenizer).end_ids


def decode_response(tokenizer: PreTrainedTokenizerBase, token_ids: Items[int]) -> str:
    """The text of a sampled response: end tokens dropped from its end, every other token kept, think tags included."""
    ids, end_ids = list(token_ids), end_token_ids(tokenizer)
    while ids and ids[-1] in end_ids:
        ids.pop()
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _format(tokenizer: PreTrainedTokenizerBase) -> _ChatFormat:
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        raise DataError("model", "its tokenizer has no chat template", "add a chat_template.jinja to the model folder") from None
    return _examine(tokenizer, template)


@lru_cache(maxsize=8)
def _examine(tokenizer: PreTrainedTokenizerBase, template: str) -> _ChatFormat:
    """Work out a template's marks and end tokens by rendering an exchange and looking at what follows the answer."""
    variables = dict(tokenizer.special_tokens_map)
    has_marks = _GENERATION_MARK.search(template) is not None
    form = _ChatFormat(template, variables, has_marks, (), (), re.compile(r"(?!)"), None)
    exchange = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": _PROBE}]
    text, _ = _render(form, exchange, "chat template", generation_prompt=False)
    _, found, after = text.rpartition(_PROBE)
    if not found:
        raise DataError("chat template", "it leaves the assistant's answer out", "use the chat template of a chat model")
    ends = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    following = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    added = tokenizer.added_tokens_decoder
    ends[:0] = [token for token in following if token in added][:1]  # plain text after an answer ends nothing
    end_ids = tuple(dict.fromkeys(ends))
    # byte-level tokenizers name one of their special tokens as unknown token and never write it for text
    special = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, *end_ids}
    unknown = tokenizer.unk_token_id if tokenizer.unk_token_id not in special else None
    end_texts = tuple(tokenizer.convert_ids_to_tokens(list(end_ids)))
    texts = {token.content for token in added.values() if token.special} | set(end_texts)
    reserved = re.compile("|".join(re.escape(text) for text in sorted(texts - _THINK_TAGS, key=len, reverse=True)) or r"(?!)")
    return _ChatFormat(template, variables, has_marks, end_ids, end_texts, reserved, unknown)


def _render(
    form: _ChatFormat, messages: Items[Message], where: str, *, generation_prompt: bool, marks: bool = False
) -> tuple[str, list[Span]]:
    """The template's text, and with `marks` the spans inside its generation marks."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered: Any = render_jinja_template(
            conversations=[[dict(message) for message in messages]],
            chat_template=form.template,
            add_generation_prompt=generation_prompt,
            return_assistant_tokens_mask=marks,
            **form.variables,
        )
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise DataError(where, f"the chat template refuses it ({error})", "change the messages or the template") from None
    texts, spans = rendered
    return texts[0], [(start, end) for start, end in spans[0]] if marks else []


def _render_answers(form: _ChatFormat, messages: Items[Message], where: str) -> tuple[str, list[Span]]:
    """The conversation's text and one span per trained answer."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise DataError(where, "no assistant turn to train on", "add one, or drop the row")
    text, spans = _render(form, messages, where, generation_prompt=False, marks=form.has_marks)
    # every answer without marks; with marks the last one, whose prompt must be what rollouts are given
    for index in answers[-1:] if form.has_marks else answers:
        start = _prefix(form, messages, index, text, where)
        if form.has_marks:
            continue
        until, _ = _render(form, messages[: index + 1], where, generation_prompt=False)
        if not text.startswith(until):
            raise DataError(where, f"the chat template rewrites turn {index} when more turns follow", _ADD_MARKS)
        spans.append((start, len(until)))
    thought = [tag for tag in _CLOSING_THINK_TAGS if tag in str(messages[answers[-1]]["content"])]
    if thought and spans and thought[0] not in text[slice(*spans[-1])]:
        raise DataError(where, f"the chat template drops the thinking before `{thought[0]}`", "use a template that keeps it")
    context = [place for place, index in enumerate(answers) if messages[index].get("train") is False]
    if context and len(spans) != len(answers):
        found = f"the chat template marks {len(spans)} answers of {len(answers)}, so `train: false` cannot be placed"
        raise DataError(where, found, "use a template that marks each answer once")
    return text, [span for place, span in enumerate(spans) if place not in context]


def _prefix(form: _ChatFormat, messages: Items[Message], index: int, text: str, where: str) -> int:
    """Length of the rendered prompt of the answer at `index`, which must be how the rendered conversation begins."""
    prompt, _ = _render(form, messages[:index], where, generation_prompt=True)
    if not text.startswith(prompt):
        fix = "make its generation prompt equal to what it writes before an answer" if form.has_marks else _ADD_MARKS
        raise DataError(where, f"the chat template renders the prompt of turn {index} differently once the answer follows", fix)
    return len(prompt)


def _mark(form: _ChatFormat, text: str, token_ids: np.ndarray, offsets: np.ndarray, span: Span, loss_mask: np.ndarray, where: str) -> None:
    """Set the loss mask on the tokens of one answer up to its end token, which may lie just outside the span."""
    start, end = span
    starts, ends = offsets[:, 0], offsets[:, 1]
    if ((starts < start) & (ends > start)).any():
        found = f"the answer's first character {text[start]!r} merges with the prompt into one token"
        raise DataError(where, found, "strip white space from the start of the answer")
    inside = np.flatnonzero((starts >= start) & (starts < end))
    if not len(inside):
        return
    last = int(inside[-1])
    closing = inside[_is_one_of(token_ids[inside], form.end_ids)]
    if len(closing):
        if not text[ends[closing[-1]] : end].strip():  # the newline after an end token is the template's, not the model's
            last = int(closing[-1])
    elif last + 1 < len(token_ids) and token_ids[last + 1] in form.end_ids:
        last += 1
    loss_mask[inside[0] : last + 1] = True


def _is_one_of(token_ids: np.ndarray, few: tuple[int, ...]) -> np.ndarray:
    """`np.isin` for a handful of values: a tenth of its time on short sequences."""
    found = np.zeros(token_ids.shape, dtype=bool)
    for token in few:
        found |= token_ids == token
    return found


def _check_contents(form: _ChatFormat, messages: Items[Message], images: int, where: str) -> None:
    shown = 0
    for index, message in enumerate(messages):
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list | tuple):
            raise DataError(where, f"turn {index} is not text ({type(content).__name__})", "give a text, or parts of text and images")
        for part in parts:
            if part["type"] == "image":
                shown += 1
            else:
                _check_text(form, part["text"], index, where)
        for key in _BESIDE_CONTENT:
            if message.get(key):
                _check_text(form, str(message[key]), index, where)
    if shown != images:
        raise DataError(where, f"its messages show {shown} images and it has {images}", "give as many image parts as images")


def _check_written(form: _ChatFormat, messages: Items[Message], text: str, where: str, *, generation_prompt: bool) -> None:
    """Refuse a template that leaves out what answers say or refer to: a call that it does not write would be an empty answer."""
    without = {
        key: (form, [{name: value for name, value in message.items() if name != key} for message in messages])
        for key in _BESIDE_CONTENT
        if any(message.get(key) for message in messages)
    }
    if form.variables.get("tools"):
        without["tools"] = replace(form, variables={**form.variables, "tools": None}), [dict(message) for message in messages]
    for key, (other_form, others) in without.items():
        if _render(other_form, others, where, generation_prompt=generation_prompt)[0] == text:
            fix = "use a template that writes them, or make them part of the `content`"
            raise DataError(where, f"the chat template leaves its `{key}` out", fix)


def _check_text(form: _ChatFormat, text: str, turn: int, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(where, f"turn {turn} has half a character (surrogate) at position {error.start}", "remove it") from None
    found = form.reserved.search(text)
    if found:
        what = "end token" if found[0] in form.end_texts else "special token"
        raise DataError(where, f"turn {turn} contains the {what} `{found[0]}`", "remove it: only the chat template writes it")


def _check_known(form: _ChatFormat, tokenizer: PreTrainedTokenizerBase, text: str, ids: Items[int] | np.ndarray, where: str) -> None:
    if form.unknown_id is None or form.unknown_id not in ids:
        return
    position = list(ids).index(form.unknown_id)
    shown = ""
    if tokenizer.is_fast:
        start, end = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"][position]
        shown = f" for {text[start:end]!r} in {text[max(0, start - 20) : end + 20]!r}"
    raise DataError(where, f"the tokenizer has no token{shown}", "remove it from the data, or add it to the model's alphabet")
