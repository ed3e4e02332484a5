"""Curation of a problem set: the fate of every problem, balance over domains, and the report.

Owns what happens to a problem and why; patterns are `curation_rules`', similarity `curation_overlap`'s, sampling and files
`recipes.data_stages`'. Kimi k1.5 (arXiv 2501.12599) sec. 2.1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

from bregman.data.sources import row_columns
from bregman.types import Group, Problem
from samplers.curation_config import CurationConfig, DomainsConfig
from samplers.curation_overlap import Shingles, near_duplicates, overlaps, shingles
from samplers.curation_rules import broken_rule, domain, question

KEPT = "kept"


class Drop(StrEnum):
    """Why a problem is dropped, beside the rules, whose fates have their names."""

    NEAR_DUPLICATE = "near_duplicate"
    OVERLAP = "evaluation_overlap"
    EASY_TO_HACK = "easy_to_hack"
    REWARD_FAILED = "reward_failed"
    TOO_HARD = "too_hard"
    TOO_EASY = "too_easy"
    BALANCE = "balance"


class Curation:
    """The problems of a curation and what has become of them so far.

    Attributes:
        problems: all of them, in order.
        dropped: problem id -> (fate, what was found), of those dropped.
        found: problem id -> new columns.
    """

    def __init__(self, problems: Sequence[Problem], config: CurationConfig) -> None:
        self.problems, self._config = tuple(problems), config
        self.dropped: dict[str, tuple[str, str]] = {}
        self.found: dict[str, dict[str, Any]] = {problem.id: {"domain": domain(problem, config.domains)} for problem in problems}

    def left(self) -> list[Problem]:
        """Problems not dropped yet, in order."""
        return [problem for problem in self.problems if problem.id not in self.dropped]

    def drop(self, problem_id: str, fate: str, why: str) -> None:
        """The problem's one fate: it was not dropped before."""
        assert problem_id not in self.dropped, f"{problem_id} is dropped twice"
        self.dropped[problem_id] = (fate, why)

    def apply_rules(self) -> None:
        for problem in self.left():
            broken = broken_rule(problem, self._config.rules)
            if broken:
                self.drop(problem.id, broken[0], f"`{' '.join(broken[1].split())}`")

    def drop_duplicates(self, evaluation: Sequence[Problem], image_hashes: Mapping[str, Sequence[str]]) -> None:
        """Drop what an evaluation problem asks too, then what an earlier problem asks.

        Args:
            image_hashes: problem id -> hashes of its images; none for problems without. Evaluation ids go by `eval:` and their id.
        """
        config, left = self._config.duplicates, self.left()
        texts = [self._shingles(problem, image_hashes.get(problem.id, ())) for problem in left]
        held_out = [self._shingles(problem, image_hashes.get(f"eval:{problem.id}", ())) for problem in evaluation]
        for index, (other, share) in overlaps(texts, held_out, config.overlap).items():
            name = f"{evaluation[other].source} {evaluation[other].id}".strip()
            self.drop(left[index].id, Drop.OVERLAP, f"{share:.0%} of it is in {name}")
        kept = [index for index, problem in enumerate(left) if problem.id not in self.dropped]
        for place, (other, similarity) in near_duplicates([texts[index] for index in kept], config.threshold).items():
            self.drop(left[kept[place]].id, Drop.NEAR_DUPLICATE, f"similarity {similarity:.2f} to {left[kept[other]].id}")

    def observe_hack(self, group: Group) -> None:
        """Drop a problem that was right without thinking."""
        right = [t for t in group.trajectories if (t.primary or 0.0) >= self._config.right_at_least]
        if right:
            self.drop(group.problem.id, Drop.EASY_TO_HACK, f"{len(right)} of {len(group.trajectories)} tries right without thinking")

    def observe_difficulty(self, group: Group) -> None:
        """Note a problem's pass rate; samples whose reward failed are left out of it."""
        config, scores = self._config, [t.primary for t in group.trajectories if t.primary is not None]
        if not scores:
            reason = next((t.reward_error for t in group.trajectories if t.reward_error), "no sample was answered")
            self.drop(group.problem.id, Drop.REWARD_FAILED, reason)
            return
        rate = sum(score >= config.right_at_least for score in scores) / len(scores)
        tokens = sum(len(t.token_ids) for t in group.trajectories) / len(group.trajectories)
        self.found[group.problem.id] |= {"difficulty": 1.0 - rate, "pass_rate": rate, "pass_samples": len(scores), "mean_tokens": tokens}
        if rate < config.min_pass_rate:
            self.drop(group.problem.id, Drop.TOO_HARD, f"pass rate {rate:.2f}")
        elif rate > config.max_pass_rate:
            self.drop(group.problem.id, Drop.TOO_EASY, f"pass rate {rate:.2f}")

    def balance(self) -> None:
        """Drop what a domain has too many of; what stays is spread evenly over its difficulties."""
        left = self.left()
        tags = {problem.id: str(self.found[problem.id]["domain"]) for problem in left}
        room = domain_sizes(Counter(tags.values()), self._config.domains)
        for name, size in room.items():
            own = [problem.id for problem in left if tags[problem.id] == name]
            own.sort(key=lambda identity: self.found[identity].get("difficulty", 0.0))
            kept = {own[place] for place in evenly(len(own), size)}
            for identity in own:
                if identity not in kept:
                    self.drop(identity, Drop.BALANCE, f"domain {name} has {len(own)}, {size} wanted")

    def rows(self) -> list[dict[str, Any]]:
        """The problems left, every column of the data and the new ones; a difficulty that the data had is `given_difficulty`."""
        return [row_of(problem) | self.found[problem.id] for problem in self.left()]

    def report(self) -> dict[str, Any]:
        """Counts per fate, which add up to the problems read; domains and difficulties before and after; plain JSON."""
        rules = [*self._config.rules.drop, *self._config.rules.own]
        fates = Counter(fate for fate, _ in self.dropped.values())
        left = self.left()
        return {
            "problems": len(self.problems),
            "fates": {name: fates.get(name, 0) for name in dict.fromkeys([*rules, *map(str, Drop)])} | {KEPT: len(left)},
            "domains": {"before": self._domains(self.problems), "after": self._domains(left)},
            "difficulty": histogram(self.found[problem.id]["difficulty"] for problem in left if "difficulty" in self.found[problem.id]),
        }

    def fates(self) -> list[dict[str, Any]]:
        """One row per problem: id, fate, why, and what was measured."""
        rows = []
        for problem in self.problems:
            fate, why = self.dropped.get(problem.id, (KEPT, ""))
            found = self.found[problem.id]
            rows.append({"id": problem.id, "fate": str(fate), "why": why, "domain": found["domain"], "pass_rate": found.get("pass_rate")})
        return rows

    def _shingles(self, problem: Problem, images: Sequence[str]) -> Shingles:
        return shingles(question(problem), self._config.duplicates.ngram, images=images)

    def _domains(self, problems: Iterable[Problem]) -> dict[str, int]:
        return dict(Counter(str(self.found[problem.id]["domain"]) for problem in problems).most_common())


def row_of(problem: Problem) -> dict[str, Any]:
    """Every column of the data; where it has images, with them in one form, wherever the data had them."""
    row: dict[str, Any] = {**problem.columns, "id": problem.id}
    if problem.difficulty is not None:
        row["given_difficulty"] = problem.difficulty
    if problem.images:
        row |= row_columns(problem.messages, problem.images, f"problem {problem.id}")
        row.pop("prompt", None)
    return row


def domain_sizes(counts: Mapping[str, int], domains: DomainsConfig) -> dict[str, int]:
    """How many problems each domain keeps: its cap, and with target shares as many as the scarcest of them allows."""
    sizes = dict(counts)
    if domains.shares:
        total = sum(domains.shares.values())
        whole = min(counts.get(name, 0) * total / share for name, share in domains.shares.items())
        sizes = {name: int(whole * domains.shares.get(name, 0.0) / total + 1e-9) for name in counts}
    cap = domains.max_per_domain
    return {name: size if cap is None else min(size, cap) for name, size in sizes.items()}


def evenly(count: int, wanted: int) -> list[int]:
    """`wanted` of the places 0 .. count - 1, evenly spaced, both ends included where there are two or more."""
    if wanted >= count:
        return list(range(count))
    if wanted <= 1:
        return [count // 2][:wanted]
    return [round(place * (count - 1) / (wanted - 1)) for place in range(wanted)]


def histogram(difficulties: Iterable[float]) -> dict[str, int]:
    """Problems per tenth of difficulty; 1.0, never solved, is a bin of its own."""
    bins = dict.fromkeys([f"{tenth / 10:.1f}" for tenth in range(11)], 0)
    for value in difficulties:
        bins[f"{int(value * 10 + 1e-9) / 10:.1f}"] += 1
    return bins
