"""What a trial of rewards over saved rollouts says: latency, scores, disagreements and samples of each verdict, as plain text.

Owns the text. Reading the rollouts and running the rewards is `recipes.reward_commands`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import fmean

from bregman.types import Trajectory

RIGHT = 0.5
"""From this score on, a reward counts as saying `right` where two of them are compared."""

_BINS = 10
_BAR = 32
_MOST_CHARACTERS = 600
_MOST_DISTINCT = 8
_MOST_ERRORS = 8


@dataclass(slots=True)
class Calls:
    """Every call of one reward: how many samples it had and how long it took. Appended to from several threads."""

    seconds: list[float] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)

    def add(self, samples: int, seconds: float) -> None:
        self.samples.append(samples)
        self.seconds.append(seconds)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """A saved response scored anew.

    Attributes:
        prompt: what was asked, as text.
        gold: the gold answer, if the data has one.
        scored: with the rewards of now.
        stored: reward parts of then, by name.
    """

    prompt: str
    gold: str | None
    scored: Trajectory
    stored: Mapping[str, float | None]


def latency_table(calls: Mapping[str, Calls]) -> list[str]:
    """A line per reward: milliseconds of a call as the run waits for it, isolation included, and what that is per sample."""
    width = max(map(len, calls))
    lines = [f"{'':{width}}  calls  samples/call  p50 ms  p90 ms  p99 ms  longest  ms/sample"]
    for name, of in calls.items():
        p50, p90, p99 = (1e3 * percentile(of.seconds, share) for share in (0.5, 0.9, 0.99))
        per_sample = 1e3 * sum(of.seconds) / max(1, sum(of.samples))
        lines.append(
            f"{name:{width}}  {len(of.seconds):5d}  {fmean(of.samples):12.1f}  {p50:6.1f}  {p90:6.1f}  {p99:6.1f}"
            f"  {1e3 * max(of.seconds):7.1f}  {per_sample:9.2f}"
        )
    return lines


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def score_histogram(name: str, scores: Sequence[float | None], failed: int) -> list[str]:
    """How the scores of one reward are spread: a bar for each value if there are few, else for ten ranges."""
    applied = [score for score in scores if score is not None]
    counts = f"{len(applied)} scores, {len(scores) - len(applied) - failed} not applicable, {failed} failed"
    if not applied:
        return [f"{name}: {counts}"]
    lines = [f"{name}: mean {fmean(applied):.3f}, {counts}"]
    distinct = Counter(applied)
    if len(distinct) <= _MOST_DISTINCT:
        rows = [(f"{value:g}", count) for value, count in sorted(distinct.items())]
    else:
        low, high = min(applied), max(applied)
        step = (high - low) / _BINS
        bins = Counter(min(_BINS - 1, int((score - low) / step)) for score in applied)
        rows = [(f"{low + index * step:.3g} to {low + (index + 1) * step:.3g}", bins[index]) for index in range(_BINS)]
    width, most = max(len(label) for label, _ in rows), max(count for _, count in rows)
    return lines + [f"  {label:>{width}}  {'#' * -(-_BAR * count // most):{_BAR}}  {count}" for label, count in rows]


def changes_of_score(tried: Sequence[Tried], names: Sequence[str]) -> list[str]:
    """How the scores of now differ from those stored in the rollouts, per reward that both have."""
    lines = []
    for name in names:
        pairs = [(t, t.stored[name], t.scored.reward_parts.get(name)) for t in tried if name in t.stored]
        changed = [(t, then, now) for t, then, now in pairs if not _same(then, now)]
        if not pairs:
            lines.append(f"{name}: not in the rollouts")
            continue
        example = ""
        if changed:
            of, then, now = changed[0][0].scored, *changed[0][1:]
            example = f"; first: problem `{of.problem_id}`, sample {of.sample_index}: {_shown(then)} then, {_shown(now)} now"
        lines.append(f"{name}: {len(changed)} of {len(pairs)} scores differ from the stored ones{example}")
    return lines


def disagreements(tried: Sequence[Tried], names: Sequence[str]) -> list[tuple[str, list[Tried]]]:
    """For every two rewards that only ever say 0 or 1: a line, and the samples on which one says right and the other wrong."""
    verdicts = [name for name in names if _is_verdict([t.scored.reward_parts.get(name) for t in tried])]
    found = []
    for first, second in combinations(verdicts, 2):
        both = [t for t in tried if t.scored.reward_parts.get(first) is not None and t.scored.reward_parts.get(second) is not None]
        only_first = [t for t in both if _right(t, first) and not _right(t, second)]
        only_second = [t for t in both if _right(t, second) and not _right(t, first)]
        agreed = len(both) - len(only_first) - len(only_second)
        share = f"{agreed / len(both):.1%}" if both else "none"
        line = f"{first} / {second}: {share} of {len(both)} alike; only {first} {len(only_first)}, only {second} {len(only_second)}"
        found.append((line, only_first[:1] + only_second[:1]))
    return found


def failures(tried: Sequence[Tried]) -> list[str]:
    """What went wrong, alike ones counted together, with the first sample of each."""
    errors = [t.scored.reward_error for t in tried if t.scored.reward_error]
    kinds: dict[str, list[str]] = {}
    for error in errors:
        kinds.setdefault(error.partition(": ")[2], []).append(error)
    lines = [f"{len(alike)} x {alike[0]}" for alike in sorted(kinds.values(), key=len, reverse=True)]
    left_out = [f"... and {len(lines) - _MOST_ERRORS} other kinds"] if len(lines) > _MOST_ERRORS else []
    return lines[:_MOST_ERRORS] + left_out


def verdict_of(trajectory: Trajectory, primary: str) -> str:
    """`right`, `wrong`, `not applicable` or `failed`, by the first reward."""
    value = trajectory.reward_parts.get(primary)
    if value is not None:
        return "right" if value >= RIGHT else "wrong"
    return "failed" if f"reward `{primary}`," in trajectory.reward_error else "not applicable"


def sample_text(tried: Tried) -> list[str]:
    """One response with its scores, the middle of long texts left out."""
    scored = tried.scored
    parts = ", ".join(f"{name} {_shown(value)}" for name, value in scored.reward_parts.items())
    gold = f", gold answer {_short(tried.gold)}" if tried.gold is not None else ""
    error = [f"  {scored.reward_error}"] if scored.reward_error else []
    lines = [f"problem `{scored.problem_id}`, sample {scored.sample_index}{gold}: {parts}", *error]
    return lines + [f"  > {line}" for text in (tried.prompt, scored.text) for line in _short(text).splitlines() or [""]]


def _is_verdict(scores: Sequence[float | None]) -> bool:
    return {score for score in scores if score is not None} in ({0.0}, {1.0}, {0.0, 1.0})


def _right(tried: Tried, name: str) -> bool:
    return (tried.scored.reward_parts[name] or 0.0) >= RIGHT


def _same(one: float | None, other: float | None) -> bool:
    return one is other if one is None or other is None else math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _short(text: str) -> str:
    half = _MOST_CHARACTERS // 2
    return text if len(text) <= 2 * half else f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"
