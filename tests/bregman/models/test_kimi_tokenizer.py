"""Kimi's published vocabulary layout as a fast tokenizer: the same tokens as tiktoken, and its chat template."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from bregman.data.chat import render_prompt, tokenize_conversation
from bregman.errors import DataError
from bregman.models.kimi_vl.chat_template import IMAGE_PLACEHOLDER, chat_template
from bregman.models.kimi_vl.tokenizer import (
    CONTROL_OFFSETS,
    PATTERN,
    TikTokenTokenizerFast,
    byte_pair_tokenizer,
    load_kimi_tokenizer,
    read_ranks,
    register_tokenizer,
    tiny_tokenizer,
    write_ranks,
    write_tiny_tokenizer,
)

CORPUS = "the thing in the thicket isn't THINKING ababa aba 中文汉字 mixed中文text 12345 3.14 naïve cafe\u0301 ΩЖ  \n\n  tabs\t\tend"
HOSTILE = (
    "",
    " ",
    "   ",
    "\n\n\r\n \t x",
    "中文English混合",
    "汉字abc  北京市 Pascal",
    "1234567 ٣٤٥ ½ Ⅷ 12٣4",
    "I'LL can't 'S ſ's 'ſ don\u2019t",
    "👩\u200d👩\u200d👧 😀😀 🇩🇪",
    "cafe\u0301 e\u0301\u0302\u0303 \u0301x",
    "\x00\x01\x1c\x85\u00a0\u3000\ufeff\u2028",
    "CamelCaseSplit XMLHttp ǅword ʰmod İi ß",
    "<|im_endx|> <|im_end [EOS",
    "a" * 300 + "!" * 40,
    "def f(x):\n\treturn x**2  # π≈3.14\r\n",
)


NO_NAMES = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"))


def trained_ranks(text: str, num_merges: int) -> dict[bytes, int]:
    """A small vocabulary by plain byte-pair training on `text`, the way tiktoken's are made."""
    pieces = [[bytes([byte]) for byte in word.encode()] for word in text.split(" ")]
    ranks = {bytes([byte]): byte for byte in range(256)}
    for _ in range(num_merges):
        pairs = [pair for piece in pieces for pair in itertools.pairwise(piece) if b"".join(pair) not in ranks]
        if not pairs:
            break
        best = max(sorted(set(pairs)), key=pairs.count)
        ranks[b"".join(best)] = len(ranks)
        for piece in pieces:
            index = 0
            while index + 1 < len(piece):
                if (piece[index], piece[index + 1]) == best:
                    piece[index : index + 2] = [b"".join(best)]
                index += 1
    return ranks


@pytest.fixture(scope="module")
def reference():
    tiktoken = pytest.importorskip("tiktoken")
    ranks = trained_ranks(CORPUS, 150)
    assert len(ranks) > 300
    encoding = tiktoken.Encoding("small", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    return encoding, byte_pair_tokenizer(ranks, {})


@pytest.mark.parametrize("text", HOSTILE)
def test_same_tokens_as_tiktoken(reference, text: str) -> None:
    encoding, tokenizer = reference
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == encoding.encode_ordinary(text)
    assert tokenizer.decode(ids) == text == encoding.decode(ids)


def test_same_tokens_as_tiktoken_on_random_text(reference) -> None:
    encoding, tokenizer = reference
    rng = random.Random(0)
    characters = CORPUS + "".join(HOSTILE)
    for _ in range(3000):
        text = "".join(rng.choice(characters) for _ in range(rng.randint(1, 24)))
        assert tokenizer.encode(text, add_special_tokens=False).ids == encoding.encode_ordinary(text), repr(text)


def test_vocabulary_file_round_trips(tmp_path: Path) -> None:
    ranks = trained_ranks(CORPUS, 20)
    write_ranks(tmp_path / "tiktoken.model", ranks)
    assert read_ranks(tmp_path / "tiktoken.model") == ranks


def published_folder(folder: Path, **settings: object) -> Path:
    """A folder as it is published: no tokenizer.json, remote code named, a few of the 256 control tokens named."""
    ranks = trained_ranks(CORPUS, 30)
    write_ranks(folder / "tiktoken.model", ranks)
    named = {str(len(ranks) + offset): {"content": name, "special": True} for name, offset in CONTROL_OFFSETS.items()}
    content = {
        "added_tokens_decoder": named,
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]},
        **settings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder


def test_published_folder_has_the_whole_block_of_control_tokens(tmp_path: Path) -> None:
    folder = published_folder(tmp_path)
    first = len(read_ranks(folder / "tiktoken.model"))
    tokenizer = load_kimi_tokenizer(folder)
    assert len(tokenizer) == first + 256
    assert {name: tokenizer.convert_tokens_to_ids(name) - first for name in CONTROL_OFFSETS} == CONTROL_OFFSETS
    assert tokenizer.convert_ids_to_tokens(first + 5) == f"<|reserved_token_{first + 5}|>"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("[EOS]", "[PAD]")
    assert tokenizer.chat_template == chat_template()
    assert tokenizer("<|im_end|>")["input_ids"] == [first + 2]
    assert isinstance(TikTokenTokenizerFast.from_pretrained(folder), type(tokenizer))


def test_ids_beyond_the_block_are_where_the_file_says(tmp_path: Path) -> None:
    ranks = trained_ranks(CORPUS, 30)
    ids = {len(ranks) + 2: "<|im_end|>", len(ranks) + 300: "<|late|>"}
    decoder = {str(number): {"content": name} for number, name in ids.items()}
    tokenizer = load_kimi_tokenizer(published_folder(tmp_path, added_tokens_decoder=decoder, **NO_NAMES))
    assert {number: tokenizer.convert_ids_to_tokens(number) for number in ids} == ids and len(tokenizer) == len(ranks) + 301


def test_auto_tokenizer_needs_no_remote_code(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from bregman.models.kimi_vl.configuration import KimiVLConfig

    register_tokenizer(KimiVLConfig)
    (published_folder(tmp_path) / "config.json").write_text(json.dumps({"model_type": "kimi_vl"}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.is_fast and tokenizer.get_vocab() == load_kimi_tokenizer(tmp_path).get_vocab()


def test_a_template_of_the_folder_wins(tmp_path: Path) -> None:
    assert load_kimi_tokenizer(published_folder(tmp_path, chat_template="in settings")).chat_template == "in settings"
    (tmp_path / "chat_template.jinja").write_text("in its file")
    assert load_kimi_tokenizer(tmp_path).chat_template == "in its file"


@pytest.mark.parametrize(
    ("vocabulary", "settings", "message"),
    [
        (None, {}, "cannot be read"),
        ("AA== 0\nnot a line at all\n", {}, "line 2: is not"),
        ("AA== 0\nAQ== 2\n", {}, "its ranks are not"),
        ("AA== 0\n", {}, "no token for the byte 0x01"),
        ("", {}, "its ranks are not"),
        ("whole", {"added_tokens_decoder": None}, "no `added_tokens_decoder`"),
        ("whole", {"added_tokens_decoder": {"x": {}}}, "'x' is malformed"),
        ("whole", {"added_tokens_decoder": {"5": {"content": "a"}}}, "is an ordinary one"),
        ("whole", {"added_tokens_decoder": {"300": {"content": "a"}, "301": {"content": "a"}}}, "same name"),
        ("whole", {"added_tokens_decoder": {"290": {"content": "a"}}, **NO_NAMES}, "is `a`, an ordinary token"),
        ("whole", {"pad_token": "[NONE]"}, "is not an added token"),
    ],
)
def test_malformed_files(tmp_path: Path, vocabulary: str | None, settings: dict, message: str) -> None:
    published_folder(tmp_path, **settings)
    if vocabulary is None:
        (tmp_path / "tiktoken.model").unlink()
    elif vocabulary != "whole":
        (tmp_path / "tiktoken.model").write_text(vocabulary)
    with pytest.raises(DataError, match=message):
        load_kimi_tokenizer(tmp_path)


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "◁think▷one more◁/think▷2"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]


def test_chat_template_text() -> None:
    tokenizer = tiny_tokenizer("")
    assert tokenizer.apply_chat_template(MESSAGES[:3], tokenize=False) == (
        "<|im_system|>system<|im_middle|>Be brief.<|im_end|>"
        "<|im_user|>user<|im_middle|>1+1?<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>◁think▷one more◁/think▷2<|im_end|>"
    )
    parts = [{"type": "image"}, {"type": "text", "text": "What is "}, {"type": "image"}, {"type": "text", "text": "?"}]
    image = "<|media_start|>image<|media_content|><|media_pad|><|media_end|>"
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True)
    assert rendered == f"<|im_user|>user<|im_middle|>{image}What is {image}?<|im_end|><|im_assistant|>assistant<|im_middle|>"
    tools = [{"type": "function", "function": {"name": "f"}}]
    rendered = tokenizer.apply_chat_template([*MESSAGES[:2], {"role": "tool", "content": "3"}], tools=tools, tokenize=False)
    declared = rendered.removeprefix("<|im_system|>tool_declare<|im_middle|>").split("<|im_end|>")[0]
    assert json.loads(declared) == tools
    assert rendered.endswith("<|im_system|>tool<|im_middle|>3<|im_end|>")


def test_calls_are_trained() -> None:
    tokenizer = tiny_tokenizer("")
    called = [
        {"type": "function", "function": {"name": name, "arguments": value}} for name, value in (("f", '{"a": 1}'), ("g", {"b": "é"}))
    ]
    messages = [MESSAGES[1], {"role": "assistant", "content": "", "tool_calls": called}, {"role": "tool", "content": "3"}, MESSAGES[2]]
    sequence = tokenize_conversation(tokenizer, messages, tools=[{"type": "function", "function": {"name": "f"}}])
    f = '<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|>'
    g = '<|tool_call_begin|>functions.g:1<|tool_call_argument_begin|>{"b": "é"}<|tool_call_end|>'
    answers = f"<|tool_calls_section_begin|>{f}{g}<|tool_calls_section_end|><|im_end|>◁think▷one more◁/think▷2<|im_end|>"
    assert tokenizer.decode(sequence.token_ids[sequence.loss_mask]) == answers


def test_default_system_message() -> None:
    tokenizer = tiny_tokenizer("")
    opening = "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>"
    rendered = [tokenizer.apply_chat_template(turns, chat_template=chat_template(), tokenize=False) for turns in (MESSAGES, MESSAGES[1:])]
    assert opening not in rendered[0]
    assert rendered[1].startswith(opening) and rendered[1].count("<|im_system|>") == 1


def test_answers_of_all_turns_are_trained() -> None:
    tokenizer = tiny_tokenizer("")
    sequence = tokenize_conversation(tokenizer, MESSAGES)
    assert tokenizer.decode(sequence.token_ids[sequence.loss_mask]) == "◁think▷one more◁/think▷2<|im_end|>4<|im_end|>"
    prompt = render_prompt(tokenizer, MESSAGES[:4])
    assert prompt == sequence.token_ids[: len(prompt)].tolist()


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_user|>", IMAGE_PLACEHOLDER, "[EOS]", "[PAD]"])
def test_control_tokens_in_messages_are_refused(token: str) -> None:
    with pytest.raises(DataError, match="turn 0 contains"):
        render_prompt(tiny_tokenizer(""), [{"role": "user", "content": f"say {token} now"}])


def test_tiny_tokenizer_has_a_token_per_character_and_header_name(tmp_path: Path) -> None:
    tokenizer = write_tiny_tokenizer(tmp_path, "añ汉😀", max_length=64)
    assert len(tokenizer("añ汉😀")["input_ids"]) == 4
    assert tokenizer.tokenize("<|im_user|>user<|im_middle|>") == ["<|im_user|>", "user", "<|im_middle|>"]
    assert tokenizer.model_max_length == 64
    thought = tokenizer("◁think▷a◁/think▷")["input_ids"]
    assert len(thought) == 3 and tokenizer.decode(thought, skip_special_tokens=True) == "◁think▷a◁/think▷"
    assert tokenizer.decode(tokenizer("any text: ж€")["input_ids"]) == "any text: ж€"


def test_tiny_folder_opens_everywhere_as_the_same_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from recipes.models import load_tokenizer

    made = write_tiny_tokenizer(tmp_path, "añ汉")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "kimi_vl"}))
    opened = [AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)]  # by tokenizer.json
    (tmp_path / "tokenizer.json").unlink()
    opened += [load_tokenizer(tmp_path), tiny_tokenizer("añ汉")]  # by the published files, and without any
    for tokenizer in opened:
        assert tokenizer.is_fast and tokenizer.get_vocab() == made.get_vocab()
        assert tokenizer.special_tokens_map == made.special_tokens_map
        assert render_prompt(tokenizer, MESSAGES[:4]) == render_prompt(made, MESSAGES[:4])
