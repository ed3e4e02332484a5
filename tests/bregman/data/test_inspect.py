"""The histogram counts every example once, and the colours follow the mask."""

from __future__ import annotations

import re

import pytest

from bregman.data.chat import tokenize_conversation
from bregman.data.inspect import colour_mask, length_report, source_report
from bregman.models.tiny.tokenizer import character_tokenizer


@pytest.mark.parametrize(
    ("lengths", "limit", "over"),
    [([1, 2], 10, 0), ([3, 5, 100], 100, 0), ([3, 5, 101, 900], 100, 2), (list(range(1, 1000)), 512, 487), ([7] * 5, 3, 5), ([0, 1], 5, 0)],
)
def test_histogram(lengths, limit, over):
    text = length_report(lengths, limit, "tokens")
    rows = re.findall(r"^ +(> \d+|\d+(?:-\d+)?) +([\d,]+)( █+)?$", text, re.MULTILINE)
    counted = sum(int(count.replace(",", "")) for _, count, _ in rows)
    assert counted == len([length for length in lengths if length > 0])
    assert f"over the limit: {over:,} (" in text if over else "over the limit: none" in text
    assert len(rows) <= 11 and all(bool(bar) == (count != "0") for _, count, bar in rows)


def test_equal_lengths_need_no_histogram():
    assert length_report([14] * 256, 48, "tokens") == "256 examples of 14 tokens each, limit 48"


def test_histogram_of_nothing():
    assert length_report([], 10, "tokens") == "no examples"


def test_source_report():
    report = source_report("sums", [10, 20, 30], limit=25, trained_tokens=15)
    assert str(report) == "sums: 3 rows, 60 tokens, 25% of them trained; mean 20, longest 30 of 25, 1 over the limit"


def test_colours_show_what_is_trained():
    tokenizer = character_tokenizer("0123456789+=?")
    messages = [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "<think>1</think>2"}]
    text = colour_mask(tokenizer, tokenize_conversation(tokenizer, messages))
    assert text.plain == "<|im_start|>user\n1+1=?<|im_end|>\n<|im_start|>assistant\n<think>1</think>2<|im_end|>\n"
    green = [text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style)]
    assert green == ["<think>1</think>2<|im_end|>"]
