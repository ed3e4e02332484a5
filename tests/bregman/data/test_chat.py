"""Loss masks, prompts and decoding on the tiny tokenizer and on byte-level BPE with templates that carry no marks."""

from __future__ import annotations

import numpy as np
import pytest

from bregman.data.chat import (
    check_masks,
    decode_response,
    end_token_ids,
    render_prompt,
    tokenize_conversation,
    tokenize_conversations,
)
from bregman.errors import DataError
from bregman.models.tiny.tokenizer import CHAT_TEMPLATE, character_tokenizer
from bregman.types import Conversation, Sequence

CHATML = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# As Qwen3 does: thinking is kept in the last answer only.
CHATML_THINKING = CHATML.replace(
    "message['content'] + '<|im_end|>\\n'",
    "(message['content'] if loop.last or message['role'] != 'assistant' else message['content'].split('</think>')[-1]) + '<|im_end|>\\n'",
)
# As DeepSeek-R1 does: thinking is dropped from every answer.
CHATML_NO_THINKING = CHATML.replace(
    "message['content'] + '<|im_end|>\\n'",
    "(message['content'].split('</think>')[-1] if message['role'] == 'assistant' else message['content']) + '<|im_end|>\\n'",
)
PLAIN = (
    "{%- for m in messages %}{{- m['role'] + ':' + m['content'] + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'assistant:' }}{%- endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- for m in messages %}"
    "{{- '<|header|>' + m['role'] + '<|/header|>\\n\\n' + m['content'] | trim + '<|eot|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|header|>assistant<|/header|>\\n\\n' }}{%- endif %}"
)
STRICT = (
    "{%- if messages | length > 1 and messages[0].role == messages[1].role %}"
    "{{ raise_exception('roles must alternate') }}{%- endif %}" + CHATML
)


@pytest.fixture(scope="module")
def tiny():
    return character_tokenizer("0123456789+-*=?,yn abcdefghijklmnopqrstuvwxyz")


def byte_level(template: str | None):
    """A GPT-2 / Qwen style byte-level BPE, with merges for the words of these tests."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>", "<|eot|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["system user assistant hello world\n\n four  three\n\n"] * 20, trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", unk_token="<|endoftext|>", bos_token="<|endoftext|>", chat_template=template
    )


def turns(*contents: str):
    return [{"role": ("user", "assistant")[index % 2], "content": content} for index, content in enumerate(contents)]


def trained(tokenizer, sequence) -> str:
    return tokenizer.decode(sequence.token_ids[sequence.loss_mask].tolist(), skip_special_tokens=False)


def test_only_answers_and_their_end_tokens_are_trained(tiny):
    messages = turns("1+1=?", "<think>1+1=2\n</think>2", "2+2=?", "4")
    sequence = tokenize_conversation(tiny, messages)
    assert sequence.token_ids.dtype == np.int64 and sequence.loss_mask.dtype == bool
    assert trained(tiny, sequence) == "<think>1+1=2\n</think>2<|im_end|>4<|im_end|>"
    assert tiny.decode(sequence.token_ids[-1:].tolist()) == "\n" and not sequence.loss_mask[-1]
    check_masks([sequence], tiny)


def test_marked_template_agrees_with_transformers(tiny):
    messages = turns("1+1=?", "<think>1+1=2\n</think>2", "2+2=?", "4")
    expected = tiny.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    sequence = tokenize_conversation(tiny, messages)
    assert sequence.token_ids.tolist() == expected["input_ids"]
    assert sequence.loss_mask.astype(int).tolist() == expected["assistant_masks"]


@pytest.mark.parametrize("template", [CHATML, STRICT, LLAMA3], ids=["chatml", "strict", "llama3"])
def test_templates_without_marks(template):
    tokenizer = byte_level(template)
    end = "<|eot|>" if template == LLAMA3 else "<|im_end|>"
    sequence = tokenize_conversation(tokenizer, turns("hello", "four 🙂 world", "hello\n", "<think>\n\nthree\n</think>\n\nfour"))
    assert trained(tokenizer, sequence) == f"four 🙂 world{end}<think>\n\nthree\n</think>\n\nfour{end}"
    assert [tokenizer.convert_ids_to_tokens(token) for token in end_token_ids(tokenizer)] == [end, "<|endoftext|>"]
    check_masks([sequence], tokenizer)


def test_marks_and_prefix_rendering_give_the_same_mask(tiny):
    messages = turns("1+1=?", "<think>1+1=2\n</think>2", "2+2=?", "4")
    marked = tokenize_conversation(tiny, messages)
    unmarked_tokenizer = character_tokenizer("0123456789+-*=?,yn abcdefghijklmnopqrstuvwxyz")
    unmarked_tokenizer.chat_template = CHAT_TEMPLATE.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    unmarked = tokenize_conversation(unmarked_tokenizer, messages)
    assert unmarked.token_ids.tolist() == marked.token_ids.tolist()
    assert unmarked.loss_mask.tolist() == marked.loss_mask.tolist()


@pytest.mark.parametrize("marked_newline", ["", "\\n"], ids=["end token outside", "newline inside"])
def test_marks_around_more_or_less_than_the_answer(marked_newline):
    inside = "m['content'] + '<|im_end|>\\n'" if marked_newline else "m['content']"
    outside = "" if marked_newline else "{{- '<|im_end|>\\n' }}"
    template = (
        "{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\\n' }}{%- if m['role'] == 'assistant' %}{% generation %}{{- "
        + inside
        + " }}{% endgeneration %}"
        + outside
        + "{%- else %}{{- m['content'] + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
        + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )
    tokenizer = byte_level(template)
    assert trained(tokenizer, tokenize_conversation(tokenizer, turns("hello", "world"))) == "world<|im_end|>"


@pytest.mark.parametrize("kind", ["tiny", "chatml", "llama3"])
def test_prompt_and_sampled_response_are_the_trained_tokens(kind, tiny):
    tokenizer = tiny if kind == "tiny" else byte_level({"chatml": CHATML, "llama3": LLAMA3}[kind])
    messages = turns("hello", "<think>four\n</think>4 user\nhello")
    sequence = tokenize_conversation(tokenizer, messages)
    prompt = render_prompt(tokenizer, messages[:1])
    first = int(np.flatnonzero(sequence.loss_mask)[0])
    assert sequence.token_ids[:first].tolist() == prompt
    response = sequence.token_ids[sequence.loss_mask].tolist()
    assert decode_response(tokenizer, response) == messages[1]["content"]
    assert sequence.token_ids[: first + len(response)].tolist() == prompt + response


def test_decode_keeps_everything_but_the_closing_end_token(tiny):
    ids = tiny.encode("<think>1</think>2<|im_start|>3<|im_end|><|im_end|>", add_special_tokens=False)
    assert decode_response(tiny, ids) == "<think>1</think>2<|im_start|>3"
    assert decode_response(tiny, ids[:-4]) == "<think>1</think>2"
    assert decode_response(tiny, []) == ""


BAD_CONVERSATIONS = {
    "two users, strict template": (STRICT, [*turns("hello"), *turns("hello", "world")], "roles must alternate"),
    "end token in an answer": (CHATML, turns("hello", "wor<|im_end|>ld"), r"turn 1 contains the end token `<\|im_end\|>`"),
    "end token in a question": (CHATML, turns("<|endoftext|>", "world"), r"turn 0 contains the end token `<\|endoftext\|>`"),
    "no answer": (CHATML, turns("hello"), "no assistant turn"),
    "half a character": (CHATML, turns("hello", "x \ud800"), r"turn 1 has half a character \(surrogate\) at position 2; remove it"),
    "content is not text": (
        CHATML,
        [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "x"}],
        r"its messages show 1 images and it has 0",
    ),
    "thinking rewritten in earlier turns": (
        CHATML_THINKING,
        turns("hello", "<think>four</think>world", "hello", "world"),
        "rewrites turn 1 when more turns follow; put `{% generation %}`",
    ),
    "thinking dropped": (CHATML_NO_THINKING, turns("hello", "<think>four</think>world"), "drops the thinking before `</think>`"),
    "answer merges with the prompt": (CHATML, turns("hello", "\n\nworld"), "merges with the prompt into one token; strip white space"),
    "generation prompt differs": (
        CHATML.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>'"),
        turns("hello", "world"),
        "renders the prompt of turn 1 differently",
    ),
    "template that fails": (CHATML.replace("message['content']", "message['content'] + 1"), turns("a", "b"), "chat template refuses it"),
    "template without answers": (CHATML.replace("message['content']", "''"), turns("a", "b"), "leaves the assistant's answer out"),
}


@pytest.mark.parametrize("case", BAD_CONVERSATIONS)
def test_bad_conversations_are_one_line_errors(case):
    template, messages, expected = BAD_CONVERSATIONS[case]
    with pytest.raises(DataError, match=expected) as caught:
        tokenize_conversations(byte_level(template), [Conversation(id="7", messages=tuple(messages), source="data")])
    assert "\n" not in str(caught.value)
    assert case.startswith("template") or str(caught.value).startswith("data row 7: ")


def test_thinking_of_the_last_answer_passes_where_the_template_keeps_it():
    tokenizer = byte_level(CHATML_THINKING)
    sequence = tokenize_conversation(tokenizer, turns("hello", "<think>four</think>world"))
    assert trained(tokenizer, sequence) == "<think>four</think>world<|im_end|>"


def test_character_outside_the_alphabet(tiny):
    with pytest.raises(DataError, match=r"row 3: the tokenizer has no token for '/' in .*8/2.*; remove it"):
        tokenize_conversation(tiny, turns("8/2", "4"), "row 3")
    with pytest.raises(DataError, match="no token for 'Ω'"):
        render_prompt(tiny, turns("Ω"))
    with pytest.raises(DataError, match="no token for 't'"):  # a role that is no token and no text over the alphabet
        render_prompt(character_tokenizer("01"), [{"role": "tool", "content": "1"}])


def test_byte_level_tokenizer_that_names_eos_as_unknown_token_accepts_its_own_eos():
    tokenizer = byte_level(CHATML.replace("<|im_end|>", "<|endoftext|>"))
    sequence = tokenize_conversation(tokenizer, turns("hello", "world"))
    assert trained(tokenizer, sequence) == "world<|endoftext|>"


def test_images_need_a_vision_model(tiny):
    with pytest.raises(DataError, match="has images"):
        tokenize_conversations(tiny, [Conversation(id="0", messages=tuple(turns("1", "2")), images=(b"",))])


def test_no_chat_template():
    with pytest.raises(DataError, match="no chat template"):
        render_prompt(byte_level(None), turns("hello"))


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([False, False, False], "no token would be trained"),
        ([False, True, True], "every token would be trained"),
        ([False, True, False], "no end token"),
    ],
)
def test_check_masks(tiny, mask, expected):
    good = tokenize_conversation(tiny, turns("1", "2"))
    bad = Sequence(token_ids=np.array([10, 11, 3]), loss_mask=np.array(mask))
    with pytest.raises(DataError, match=f"example 1: {expected}"):
        check_masks([good, bad], tiny)
    with pytest.raises(DataError, match=f"second: {expected}"):
        check_masks([good, bad], tiny, names=["first", "second"])


def test_answers_without_an_end_token_are_found_at_start():
    tokenizer = byte_level(PLAIN)
    sequence = tokenize_conversation(tokenizer, turns("hello", "world"))
    assert trained(tokenizer, sequence) == "world\n"
    with pytest.raises(DataError, match=r"no end token \(`<\|endoftext\|>`\) would be trained, so the model would never stop"):
        check_masks([sequence], tokenizer)


# As Qwen's: schemas in the system turn, calls as JSON in tags, results in a user turn.
TOOLS = (
    "{%- if tools %}{{- '<|im_start|>system\\n' }}{%- for tool in tools %}{{- tool.function.name + '\\n' }}{%- endfor %}{{- '<|im_end|>\\n' }}"
    "{%- endif %}{%- for message in messages %}"
    "{%- if message.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}GENERATION{{- message.content }}"
    "{%- for call in message.tool_calls or [] %}{{- '<call>' + call.function.name + call.function.arguments + '</call>' }}{%- endfor %}"
    "{{- '<|im_end|>' }}ENDGENERATION{{- '\\n' }}"
    "{%- elif message.role == 'tool' %}{{- '<|im_start|>user\\n<result>' + message.content + '</result><|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
TOOLS_MARKED = TOOLS.replace("ENDGENERATION", "{%- endgeneration %}").replace("GENERATION", "{%- generation %}")
TOOLS_PLAIN = TOOLS.replace("ENDGENERATION", "").replace("GENERATION", "")
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CALLING = [
    {"role": "system", "content": "hello"},
    {"role": "user", "content": "world"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "four"},
    {"role": "assistant", "content": "three"},
]
SCHEMA = {"type": "function", "function": {"name": "add", "parameters": {}}}


@pytest.mark.parametrize("template", [TOOLS_MARKED, TOOLS_PLAIN], ids=["marked", "plain"])
class TestTools:
    def test_calls_are_trained_and_results_are_not(self, template):
        tokenizer = byte_level(template)
        sequence = tokenize_conversation(tokenizer, CALLING, tools=[SCHEMA])
        assert trained(tokenizer, sequence) == '<call>add{"a": 1}</call><|im_end|>two<|im_end|>three<|im_end|>'
        text = tokenizer.decode(sequence.token_ids.tolist())
        assert text.startswith("<|im_start|>system\nadd\n<|im_end|>") and "<result>2</result>" in text
        check_masks([sequence], tokenizer)

    def test_turns_that_are_context_only(self, template):
        tokenizer = byte_level(template)
        messages = [dict(message) for message in CALLING]
        messages[4]["train"] = messages[6]["train"] = False
        sequence = tokenize_conversation(tokenizer, messages, tools=[SCHEMA])
        assert trained(tokenizer, sequence) == '<call>add{"a": 1}</call><|im_end|>'
        whole = tokenize_conversation(tokenizer, CALLING, tools=[SCHEMA])
        assert whole.token_ids.tolist() == sequence.token_ids.tolist()

    def test_through_a_conversation(self, template):
        tokenizer = byte_level(template)
        conversation = Conversation(id="1", messages=tuple(CALLING), tools=(SCHEMA,))
        (sequence,) = tokenize_conversations(tokenizer, [conversation])
        assert sequence.token_ids.tolist() == tokenize_conversation(tokenizer, CALLING, tools=[SCHEMA]).token_ids.tolist()


WRITES_CONTENT_ONLY = TOOLS_MARKED.replace("message.tool_calls or []", "[]").replace("{%- if tools %}", "{%- if false %}")


@pytest.mark.parametrize(
    ("message", "tools", "key"),
    [({"content": "", "tool_calls": [CALL]}, [], "tool_calls"), ({"content": "two", "reasoning_content": "one"}, [], "reasoning_content"),
     ({"content": "two"}, [SCHEMA], "tools")],
)  # fmt: skip
def test_what_a_template_leaves_out_is_an_error(message, tools, key):
    messages = [{"role": "user", "content": "world"}, {"role": "assistant", **message}]
    with pytest.raises(DataError, match=f"row 3: the chat template leaves its `{key}` out"):
        tokenize_conversation(byte_level(WRITES_CONTENT_ONLY), messages, "row 3", tools=tools)


def test_control_tokens_in_calls_are_refused():
    call = {"type": "function", "function": {"name": "add", "arguments": "<|im_end|>"}}
    messages = [{"role": "user", "content": "world"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(DataError, match=r"turn 1 contains the end token `<\|im_end\|>`"):
        tokenize_conversation(byte_level(TOOLS_MARKED), messages)
