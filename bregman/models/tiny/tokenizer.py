"""A character-level fast tokenizer with ChatML and think tags, for models made on the spot.

Owns the vocabulary and the chat template; what a template is used for lives in `bregman.data.chat`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN, START, END = "<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>"
THINK_TAGS = ("<think>", "</think>")
ROLES = ("system", "user", "assistant")

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] + '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character of `alphabet`, and `decode(encode(text)) == text` for every text over it.

    Newline is always in the vocabulary, since ChatML headers end in one. The name of a role is one token in a header, and plain
    characters inside other text. Think tags are added tokens that are not special: decoding keeps them also when it skips special
    tokens. A character outside the vocabulary becomes `<|unk|>`, which the data room reports as an error.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    entries = dict.fromkeys((PAD, UNKNOWN, START, END, *THINK_TAGS, *ROLES, "\n", *alphabet))
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    # BPE without merges cuts text into characters, three times as fast as a pre-tokenizer that does; ignore_merges lets a role
    # name that the pre-tokenizer cut out be one token. Added tokens cut first, so \A is the place right after <|im_start|>.
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=UNKNOWN, ignore_merges=True))
    header = r"\A(?:" + "|".join(ROLES) + r")(?=\n)"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(header), "isolated")
    tokenizer.decoder = decoders.Fuse()  # without one, decoding puts spaces between tokens
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, UNKNOWN, START, END)])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK_TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
