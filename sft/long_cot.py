"""Which sampled answers become warm-up data: verified, well thought, unlike each other, few per problem.

Owns the verdict on every sample (exactly one fate) and the rows of those kept. Pure functions over scored groups; nothing is
sampled or written here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from bregman.data.sources import row_columns
from bregman.types import Group, Trajectory
from rewards.repetition import repeated_share
from rewards.text import THINK_TAGS, split_thinking
from sft.long_cot_config import QualityConfig, with_mark

WORDS = re.compile(r"\w+|[^\w\s]")
SHINGLE = 3


class Fate(StrEnum):
    """What became of a sample, in the order in which it is asked."""

    UNANSWERED = "unanswered"
    REWARD_FAILED = "reward_failed"
    WRONG = "wrong"
    TRUNCATED = "truncated"
    MALFORMED = "malformed_thinking"
    LENGTH = "length"
    REPETITION = "repetition"
    FORBIDDEN = "forbidden_text"
    TRAITS = "too_few_traits"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near_duplicate"
    OVER_LIMIT = "over_limit"
    KEPT = "kept"


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A sample with its fate; `text` is the response as the policy should write it, with both think marks."""

    trajectory: Trajectory
    fate: Fate
    text: str
    traits: tuple[str, ...] = ()


def judge_group(group: Group, quality: QualityConfig, *, right_at_least: float = 1.0, think_mark: str = "<think>") -> list[Judged]:
    """The fate of every sample of one problem, in order. Kept are at most `quality.keep`, chosen by `quality.pick`."""
    judged = [_judge(trajectory, quality, right_at_least, think_mark) for trajectory in group.trajectories]
    order = [index for index, one in enumerate(judged) if one.fate is Fate.KEPT]
    if quality.pick == "shortest":
        order.sort(key=lambda index: len(judged[index].trajectory.token_ids))
    unlike: list[int] = []
    shingled: dict[int, frozenset[tuple[str, ...]]] = {}
    for index in order:  # of two alike, the one that would be picked first stays
        shingled[index] = shingles(judged[index].text)
        if any(judged[index].text == judged[other].text for other in unlike):
            judged[index] = _with(judged[index], Fate.DUPLICATE)
        elif any(jaccard(shingled[index], shingled[other]) >= quality.near_duplicate for other in unlike):
            judged[index] = _with(judged[index], Fate.NEAR_DUPLICATE)
        else:
            unlike.append(index)
    picked = unlike[: quality.keep] if quality.pick == "shortest" else _diverse(unlike, shingled, quality.keep)
    for index in unlike:
        if index not in picked:
            judged[index] = _with(judged[index], Fate.OVER_LIMIT)
    return judged


def count_fates(judged: Sequence[Judged]) -> dict[str, int]:
    """How many samples ended in each fate, those of none included; the counts add up to `len(judged)`."""
    counts = dict.fromkeys([str(fate) for fate in Fate], 0)
    for one in judged:
        counts[str(one.fate)] += 1
    return counts


def sft_row(group: Group, one: Judged, *, prompt_opens: str, templates: Sequence[str], per_template: int) -> dict[str, Any]:
    """A kept sample as a row for SFT: the plain question, the answer, and where it came from.

    Args:
        prompt_opens: the end of the rendered prompt; where it holds the opening think mark itself, the answer goes without.
        templates: names, in the order in which the group's problem was asked.
        per_template: samples of each.
    """
    sample = one.trajectory
    opening = next((mark for mark, _ in THINK_TAGS if prompt_opens.rstrip().endswith(mark)), None)
    answer = one.text.removeprefix(opening).lstrip() if opening else one.text
    versions = {segment.policy_version for segment in sample.segments}
    return {
        "id": f"{group.problem.id}#{sample.sample_index}",
        **row_columns([*group.problem.messages, {"role": "assistant", "content": answer}], group.problem.images, group.problem.id),
        "source": group.problem.source,
        "problem_id": group.problem.id,
        "template": templates[sample.sample_index // per_template],
        "sample_index": sample.sample_index,
        "reward": sample.reward,
        "num_tokens": len(sample.token_ids),
        "traits": list(one.traits),
        "policy_version": max(versions, default=0),
    }


def thinking_of(text: str) -> tuple[str, str] | None:
    """(thinking, answer) of a response that is one think block and an answer after it; else None.

    The opening mark may be missing, since some chat templates put it into the prompt.
    """
    found = [(opening, closing) for opening, closing in THINK_TAGS if opening in text or closing in text]
    if len(found) != 1:
        return None
    opening, closing = found[0]
    if text.count(closing) != 1 or text.count(opening) > 1 or (opening in text and not text.lstrip().startswith(opening)):
        return None
    thinking, answer = split_thinking(text)
    return (thinking, answer) if thinking and answer else None


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """Word 3-grams of a text, punctuation marks counted as words; a shorter text is one shingle."""
    words = WORDS.findall(text.lower())
    return frozenset(tuple(words[start : start + SHINGLE]) for start in range(max(1, len(words) - SHINGLE + 1)))


def jaccard(left: frozenset[tuple[str, ...]], right: frozenset[tuple[str, ...]]) -> float:
    return len(left & right) / len(left | right)


def traits_of(thinking: str, marks: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The traits of which a mark occurs."""
    return tuple(name for name, patterns in marks.items() if any(re.search(pattern, thinking, re.IGNORECASE) for pattern in patterns))


def _judge(sample: Trajectory, quality: QualityConfig, right_at_least: float, think_mark: str) -> Judged:
    text = with_mark(sample.text.strip(), think_mark)
    parts = thinking_of(text)
    if parts and not text.startswith(think_mark):
        text = think_mark + text
    traits = traits_of(parts[0] if parts else text, quality.traits)
    return Judged(trajectory=sample, fate=_fate(sample, parts is not None, traits, quality, right_at_least), text=text, traits=traits)


def _fate(sample: Trajectory, well_formed: bool, traits: tuple[str, ...], quality: QualityConfig, right_at_least: float) -> Fate:
    """The first reason against a sample, `KEPT` if there is none."""
    tokens = len(sample.token_ids)
    reasons = (
        (Fate.UNANSWERED, sample.finish_reason in ("abort", "error")),
        (Fate.REWARD_FAILED, sample.primary is None),
        (Fate.WRONG, (sample.primary or 0.0) < right_at_least),
        (Fate.TRUNCATED, sample.finish_reason == "length"),
        (Fate.MALFORMED, (quality.think and not well_formed) or not sample.text.strip()),
        (Fate.LENGTH, tokens < quality.min_tokens or (quality.max_tokens is not None and tokens > quality.max_tokens)),
        (
            Fate.REPETITION,
            sample.finish_reason == "repetition" or repeated_share(sample.token_ids, quality.ngram) > quality.max_repeated_share,
        ),
        (Fate.FORBIDDEN, any(re.search(pattern, sample.text, re.IGNORECASE) for pattern in quality.forbidden)),
        (Fate.TRAITS, len(traits) < quality.min_traits),
    )
    return next((fate for fate, applies in reasons if applies), Fate.KEPT)


def _diverse(indices: Sequence[int], shingled: Mapping[int, frozenset[tuple[str, ...]]], count: int) -> list[int]:
    """The first, then again and again the one least like those already picked (the earliest of equals)."""
    picked = list(indices[:1])
    while len(picked) < min(count, len(indices)):
        rest = [index for index in indices if index not in picked]
        picked.append(min(rest, key=lambda index: max(jaccard(shingled[index], shingled[other]) for other in picked)))
    return picked


def _with(one: Judged, fate: Fate) -> Judged:
    return Judged(trajectory=one.trajectory, fate=fate, text=one.text, traits=one.traits)
