"""Kimi's published tokenizer files (`tiktoken.model`, `tokenizer_config.json`) read into a fast tokenizer, without remote code.

Owns the vocabulary, the split pattern and the names of control tokens; the chat template is beside it. That messages may not hold
control tokens is `bregman.data.chat`'s business.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bregman.errors import DataError
from bregman.models.kimi_vl.chat_template import HEADER_NAMES, IMAGE_PLACEHOLDER, THINK_TAGS, chat_template

VOCABULARY_FILE, SETTINGS_FILE = "tiktoken.model", "tokenizer_config.json"
NUM_CONTROL_TOKENS = 256
"""Ids kept after the ordinary tokens, named in `added_tokens_decoder` or `<|reserved_token_ID|>`."""

_LETTERS_AND_MARKS = r"\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_LETTERS_AND_MARKS}]*[\p{{Ll}}{_LETTERS_AND_MARKS}]+{_SUFFIX}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_LETTERS_AND_MARKS}]+[\p{{Ll}}{_LETTERS_AND_MARKS}]*{_SUFFIX}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""Where text is cut before bytes are merged: `pat_str` of the tokenizer published with Moonlight and Kimi-VL."""

CONTROL_OFFSETS = {
    "[BOS]": 0,
    "[EOS]": 1,
    "<|im_end|>": 2,
    "<|im_user|>": 3,
    "<|im_assistant|>": 4,
    "<|start_header_id|>": 6,
    "<|end_header_id|>": 7,
    "[EOT]": 9,
    "<|im_system|>": 10,
    "<|im_middle|>": 17,
    "<|media_start|>": 18,
    "<|media_content|>": 19,
    "<|media_end|>": 20,
    IMAGE_PLACEHOLDER: 21,
    "[UNK]": 254,
    "[PAD]": 255,
}
"""Published places of the control tokens, counted from the first id after the ordinary tokens (163,584 in Kimi-VL)."""


def load_kimi_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder of the published layout; its own chat template where it has one, else `chat_template()`.

    Raises:
        DataError: a file is missing or malformed, or names two tokens alike.
    """
    ranks = read_ranks(folder / VOCABULARY_FILE)
    settings = _settings(folder / SETTINGS_FILE)
    own_template = folder / "chat_template.jinja"
    template = own_template.read_text() if own_template.exists() else settings.get("chat_template") or chat_template()
    return _assembled(ranks, settings, template, str(folder / SETTINGS_FILE))


def _assembled(ranks: Mapping[bytes, int], settings: Mapping[str, Any], template: str, where: str) -> PreTrainedTokenizerFast:
    controls = _controls(settings, len(ranks), where)
    names = {token.content for token in controls.values()}
    roles = {key: _name(settings.get(key)) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    missing = [f"`{key}: {token}`" for key, token in roles.items() if token and token not in names]
    if missing:
        raise DataError(where, f"{missing[0]} is not an added token", "name it in `added_tokens_decoder`")
    tokenizer = byte_pair_tokenizer(ranks, controls)
    for number, token in controls.items():
        if tokenizer.token_to_id(token.content) != number:
            raise DataError(where, f"its added token {number} is `{token.content}`, an ordinary token", "use files that belong together")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{key: token for key, token in roles.items() if token},
        chat_template=template,
        model_max_length=settings.get("model_max_length") or int(1e30),
        clean_up_tokenization_spaces=False,
    )


def byte_pair_tokenizer(ranks: Mapping[bytes, int], controls: Mapping[int, AddedToken]) -> Tokenizer:
    """A byte-level BPE that gives what tiktoken gives for `ranks`.

    tiktoken merges the neighbours whose concatenation has the lowest rank; this is BPE whose merges are all splits of every token
    in two tokens, in the order of rank. A piece of text that is a token as a whole is never cut (`ignore_merges`).
    """
    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        cuts = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        cuts.sort(key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))
        merges += [(spelled[left], spelled[right]) for left, right in cuts]
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    in_order = [controls[number] for number in sorted(controls)]  # ids go on from the vocabulary's last
    tokenizer.add_tokens(in_order)
    tokenizer.add_special_tokens([token for token in in_order if token.special])
    return tokenizer


def read_ranks(path: Path) -> dict[bytes, int]:
    """The vocabulary of a `tiktoken.model`: on each line a token in base64 and its rank, which is its id.

    Raises:
        DataError: naming the line: it is malformed; or the ranks are not 0, 1, 2, ...; or a byte is no token.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(str(path), f"cannot be read ({error.strerror})", "copy the whole published folder") from None
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            found = f"is not `base64 rank`: {line[:40]!r}"
            raise DataError(f"{path} line {number}", found, "download the file again") from None
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise DataError(str(path), "its ranks are not 0, 1, 2, ... once each", "download the file again")
    if absent := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise DataError(str(path), f"has no token for the byte {absent[0]:#04x}", "download the file again")
    return ranks


def tiny_tokenizer(alphabet: str, max_length: int | None = None) -> PreTrainedTokenizerFast:
    """A small tokenizer of the published kind: one token per byte, per character of `alphabet`, and per name in a header.

    The think tags are tokens of their own and text: decoding keeps them. No default system message is written.
    """
    ranks = _tiny_ranks(alphabet)
    return _assembled(ranks, _tiny_settings(len(ranks), max_length), chat_template(default_system=""), "tiny tokenizer")


def write_tiny_tokenizer(folder: Path, alphabet: str, max_length: int | None = None) -> PreTrainedTokenizerFast:
    """Write `tiny_tokenizer(alphabet, max_length)` in the published layout, with its `tokenizer.json`, into `folder`; return it."""
    ranks = _tiny_ranks(alphabet)
    folder.mkdir(parents=True, exist_ok=True)
    write_ranks(folder / VOCABULARY_FILE, ranks)
    settings = _tiny_settings(len(ranks), max_length)
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    (folder / "chat_template.jinja").write_text(chat_template(default_system=""))
    tokenizer = load_kimi_tokenizer(folder)
    write_tokenizer_json(tokenizer, folder)
    return tokenizer


def write_ranks(path: Path, ranks: Mapping[bytes, int]) -> None:
    """Write a `tiktoken.model`."""
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in sorted(ranks.items(), key=lambda entry: entry[1])]
    path.write_text("".join(lines))


def _tiny_ranks(alphabet: str) -> dict[bytes, int]:
    """Bytes; characters of more bytes with their beginnings, so that they merge; names, which are tokens as whole pieces."""
    tokens = [bytes([byte]) for byte in range(256)]
    for character in alphabet:
        spelled = character.encode()
        tokens += [spelled[:length] for length in range(2, len(spelled) + 1)]
    tokens += [name.encode() for name in HEADER_NAMES]
    return {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}


def _tiny_settings(first: int, max_length: int | None) -> dict[str, Any]:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    names = [*CONTROL_OFFSETS, *THINK_TAGS]
    return {
        "added_tokens_decoder": {
            str(first + index): {"content": name, "special": name not in THINK_TAGS, **plain} for index, name in enumerate(names)
        },
        "bos_token": "[BOS]",
        "eos_token": "<|im_end|>",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "model_max_length": max_length,
        "tokenizer_class": "TikTokenTokenizer",
        "clean_up_tokenization_spaces": False,
    }


def write_tokenizer_json(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write `tokenizer.json` beside the published files: programs that know no tiktoken vocabulary (`vllm serve`) read that."""
    aside = folder / "tokenizer.json.aside"
    tokenizer.backend_tokenizer.save(str(aside))
    aside.rename(folder / "tokenizer.json")


class TikTokenTokenizerFast(PreTrainedTokenizerFast):
    """What `AutoTokenizer` finds for the published name `TikTokenTokenizer` instead of remote code."""

    @classmethod
    def from_pretrained(cls, path: Any, *inputs: Any, **settings: Any) -> Any:  # type: ignore[override]
        """The tokenizer of a folder: its `tokenizer.json` if there is one, else the published files.

        Raises:
            DataError: as `load_kimi_tokenizer`.
        """
        folder = Path(path)
        if (folder / VOCABULARY_FILE).exists() and not (folder / "tokenizer.json").exists():
            return load_kimi_tokenizer(folder)
        return PreTrainedTokenizerFast.from_pretrained(path, *inputs, **settings)


def register_tokenizer(config_class: type) -> None:
    """Let `AutoTokenizer` open folders whose configuration is a `config_class`, in this process."""
    AutoTokenizer.register(config_class, fast_tokenizer_class=TikTokenTokenizerFast, exist_ok=True)


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())
    except OSError as error:
        raise DataError(str(path), f"cannot be read ({error.strerror})", "copy the whole published folder") from None
    except ValueError as error:
        raise DataError(str(path), f"is not JSON ({error})", "download the file again") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("added_tokens_decoder"), dict):
        raise DataError(str(path), "has no `added_tokens_decoder`", "use the `tokenizer_config.json` that belongs to the vocabulary")
    return settings


def _controls(settings: Mapping[str, Any], first: int, where: str) -> dict[int, AddedToken]:
    """id -> token for every id from `first` on: those that the settings name, and the reserved ones between them."""
    named: dict[int, AddedToken] = {}
    for key, entry in settings["added_tokens_decoder"].items():
        try:
            number, name, special = int(key), str(entry["content"]), bool(entry.get("special", True))
        except (ValueError, TypeError, KeyError):
            raise DataError(where, f"its added token {key!r} is malformed", "download the file again") from None
        if number < first:
            raise DataError(where, f"its added token {key} is an ordinary one ({first} of them)", "use files that belong together")
        named[number] = AddedToken(name, normalized=False, special=special)
    if len({token.content for token in named.values()}) != len(named):
        raise DataError(where, "two added tokens have the same name", "give each its own")
    last = max(named, default=first - 1) + 1
    if last != first + len(named):  # a vocabulary made small names all it has; a published one has the whole block
        last = max(last, first + NUM_CONTROL_TOKENS)
    reserved = {number: AddedToken(f"<|reserved_token_{number}|>", normalized=False, special=True) for number in range(first, last)}
    return reserved | named


def _name(token: Any) -> str | None:
    """A special token in `tokenizer_config.json` is a text or an entry with `content`."""
    return token["content"] if isinstance(token, dict) else token


def _byte_letters() -> list[str]:
    """GPT-2's visible stand-in for each byte: printable latin-1 is itself, the rest are the letters from U+0100 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(hidden)) for byte in range(256)]
