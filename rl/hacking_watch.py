"""Signs that the policy games its rewards instead of solving problems: measured and logged each iteration, warned about once each.

Owns what is measured and when it is worth a warning; changes no reward and stops no run. Metrics are named `watch/...`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from bregman.types import Group, Problem, Trajectory
from rewards.choice import chosen
from rewards.config import RewardsConfig
from rewards.scorer import part_names
from rewards.text import split_thinking

NAME = "reward hacking watch"
"""Every warning begins with it; the report finds them by it."""

RIGHT = 0.5
"""From this score on, a reward counts as saying `right`."""

TINY_THINKING = 10
"""Characters; shorter thinking than this cannot have led to an answer."""

FEWEST = 20
"""Samples below which a share is too noisy for a warning."""

_THINKING_RISE, _BIAS, _DISAGREEMENT = 0.2, 0.25, 0.2
_MEMORY = 0.8
"""Weight of the past in the running means."""
_SETTLED = 3
"""Iterations before a jump can be told from noise, and over which the start is averaged."""

_LETTERS = frozenset("ABCDEFGHIJ")
"""What can be a letter answer where the data has no options."""


def watch_metrics(groups: Sequence[Group], second_opinions: Sequence[str] = ()) -> dict[str, float]:
    """What can be told from one iteration alone; a metric that applies to no response is left out.

    - `watch/right_without_thinking`: share of the right answers whose thinking is empty or tiny.
    - `watch/letter_bias`, `watch/position_bias`: where the answer is a letter, or one of the problem's column `options`: how much
      more often the favourite one is given than it is right, in [0, 1].
    - `watch/agreement/<name>`: share of responses on which the reward `<name>` says right where the first reward does, and wrong
      where it does.

    Args:
        second_opinions: rewards that judge what the first reward judges.
    """
    pairs = [(group.problem, t) for group in groups for t in group.trajectories]
    right = [t for _, t in pairs if (t.primary or 0.0) >= RIGHT]
    metrics: dict[str, float] = {}
    if right:
        metrics["watch/right_without_thinking"] = fmean(len(split_thinking(t.text)[0]) < TINY_THINKING for t in right)
    for name, place in (("letter", _letters), ("position", _positions)):
        places = [found for problem, t in pairs if (found := place(problem, t)) is not None]
        if places:
            metrics[f"watch/{name}_bias"] = _bias(places)
    for name in second_opinions:
        alike = [
            (first >= RIGHT) == (second >= RIGHT)
            for _, t in pairs
            if (first := t.primary) is not None and (second := t.reward_parts.get(name)) is not None
        ]
        if alike:
            metrics[f"watch/agreement/{name}"] = fmean(alike)
    return metrics


class HackingWatch:
    """The watch of one RL stage: compares each iteration with those before it.

    Args:
        rewards: of the stage; those marked `second_opinion` are compared with the first one.
    """

    def __init__(self, rewards: RewardsConfig) -> None:
        names = part_names(rewards)
        self._second = [name for config, name in zip(rewards.functions, names, strict=True) if config.second_opinion]
        self._length, self._reward = _Running(), _Running()
        self._start: list[float] = []
        self._warned: set[str] = set()

    def observe(self, groups: Sequence[Group], iteration: int, warn: Callable[[str], None]) -> dict[str, float]:
        """Metrics of the iteration; what looks like hacking is warned about when it begins, and again only after it has gone.

        Besides `watch_metrics`: `watch/length_jump`, the mean response length relative to its running mean, minus 1, and
        `watch/reward_jump`, the mean reward minus its running mean.
        """
        metrics = watch_metrics(groups, self._second)
        trajectories = [t for group in groups for t in group.trajectories]
        lengths = [float(len(t.token_ids)) for t in trajectories]
        rewards = [t.reward for t in trajectories if t.reward is not None]
        signs: dict[str, str] = {}
        if lengths:
            before, sudden = self._length.add(lengths)
            change = fmean(lengths) / before - 1.0 if before else 0.0
            metrics["watch/length_jump"] = change
            if sudden and abs(change) > 0.25:
                signs["length"] = f"mean response length jumped from about {before:.0f} to {fmean(lengths):.0f} tokens"
        if rewards:
            before, sudden = self._reward.add(rewards)
            metrics["watch/reward_jump"] = fmean(rewards) - before
            if sudden:
                signs["reward"] = f"mean reward jumped from about {before:.3g} to {fmean(rewards):.3g}"
        signs |= self._signs(metrics, trajectories)
        for kind in signs.keys() - self._warned:
            warn(f"{NAME}: iteration {iteration}: {signs[kind]}; look at its sample responses")
        self._warned = set(signs)
        return metrics

    def _signs(self, metrics: Mapping[str, float], trajectories: Sequence[Trajectory]) -> dict[str, str]:
        signs: dict[str, str] = {}
        right = sum((t.primary or 0.0) >= RIGHT for t in trajectories)
        share = metrics.get("watch/right_without_thinking")
        if share is not None and right >= FEWEST:
            if len(self._start) < _SETTLED:
                self._start.append(share)
            elif share - fmean(self._start) > _THINKING_RISE:
                signs["thinking"] = f"{share:.0%} of the right answers come without thinking, {fmean(self._start):.0%} did at the start"
        for kind in ("letter", "position"):
            bias = metrics.get(f"watch/{kind}_bias", 0.0)
            if bias > _BIAS and len(trajectories) >= FEWEST:
                signs[kind] = f"one answer {kind} is given {bias:.0%} of all answers more often than it is right"
        for name in self._second:
            agreement = metrics.get(f"watch/agreement/{name}", 1.0)
            if 1.0 - agreement > _DISAGREEMENT and len(trajectories) >= FEWEST:
                signs[name] = f"`{name}` contradicts the first reward on {1 - agreement:.0%} of the responses"
        return signs

    def state_dict(self) -> dict[str, Any]:
        return {
            "length": self._length.state(),
            "reward": self._reward.state(),
            "start": list(self._start),
            "warned": sorted(self._warned),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._length, self._reward = _Running(*state["length"]), _Running(*state["reward"])
        self._start, self._warned = list(state["start"]), set(state["warned"])


@dataclass(slots=True)
class _Running:
    """Running mean of an iteration's mean, of its squared change, and of the spread of single samples."""

    count: int = 0
    mean: float = 0.0
    squared_change: float = 0.0
    spread: float = 0.0

    def add(self, values: Sequence[float]) -> tuple[float, bool]:
        """`(mean before, whether this iteration is a jump from it)`, and take the iteration in.

        A jump is more than half the spread of single samples and more than four times the usual change.
        """
        now, spread = fmean(values), pstdev(values)
        before = self.mean if self.count else now
        change = abs(now - before)
        sudden = self.count >= _SETTLED and change > max(0.5 * max(spread, self.spread), 4.0 * math.sqrt(self.squared_change), 1e-9)
        keep = min(_MEMORY, self.count / (self.count + 1))
        self.mean = keep * before + (1 - keep) * now
        self.squared_change = keep * self.squared_change + (1 - keep) * change**2
        self.spread = keep * self.spread + (1 - keep) * spread
        self.count += 1
        return before, sudden

    def state(self) -> list[float]:
        return [self.count, self.mean, self.squared_change, self.spread]


def _bias(places: Sequence[tuple[str, str]]) -> float:
    """How much more often the most over-used place is given than it is right, as a share; `places` are (given, right)."""
    given, right = Counter(one for one, _ in places), Counter(other for _, other in places)
    return max((given[place] - right[place]) / len(places) for place in given)


def _letters(problem: Problem, trajectory: Trajectory) -> tuple[str, str] | None:
    """The letter given and the right one, where the gold answer is a letter, the data has no options, and one letter is chosen."""
    gold = (problem.answer or "").strip().strip("()")
    return None if gold not in _LETTERS or problem.columns.get("options") else _chosen(trajectory, gold, {}, _LETTERS)


def _positions(problem: Problem, trajectory: Trajectory) -> tuple[str, str] | None:
    """The same for problems whose column `options` lists them: the answer may be the text of one, and its letter is its position."""
    options = problem.columns.get("options")
    if not isinstance(options, Mapping | list | tuple) or not options or problem.answer is None:
        return None
    pairs = options.items() if isinstance(options, Mapping) else zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", options, strict=False)
    texts = {str(letter).strip().upper(): str(text) for letter, text in pairs}
    return _chosen(trajectory, problem.answer, texts, frozenset(texts))


def _chosen(trajectory: Trajectory, gold: str, texts: Mapping[str, str], allowed: frozenset[str]) -> tuple[str, str] | None:
    given, right = (chosen(text, texts, set(allowed)) for text in (split_thinking(trajectory.text)[1], gold))
    return (min(given), min(right)) if len(given) == len(right) == 1 else None
