"""Rules on a problem's text: questions that rewards cannot check well, and what a question is about.

Owns patterns and keyword counting; which rules apply is the recipe's. Nothing is sampled here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from bregman.types import Problem
from samplers.curation_config import DomainsConfig, RulesConfig

OTHER = "other"

_OPTION = re.compile(r"(?:^|[\s,;])[(\[]?([A-E1-5a-e])[).\]:]\s", re.MULTILINE)
_CHOICE_WORDS = re.compile(
    r"\b(which (one )?of the following|(choose|select) (the|one|all)|multiple[- ]choice|(answer|one) (of|from) the (choices|options))",
    re.IGNORECASE,
)
_CHOICE_COLUMNS = ("choices", "options")
_TRUE_FALSE = re.compile(r"\b(true or false|true/false|yes or no|yes/no|is (it|this|that) (true|correct|possible)\b.*\?)", re.IGNORECASE)
_TRUE_FALSE_ANSWERS = ("true", "false", "yes", "no")
_PROOF = re.compile(r"\b(prove|disprove|give a proof|show) (that|the|by|it|this|:)|\bproof\b|\bjustify your", re.IGNORECASE)


def question(problem: Problem) -> str:
    """The text of all turns but the system's; images left out."""
    return "\n".join(_text(message["content"]) for message in problem.messages if message["role"] != "system")


def broken_rule(problem: Problem, rules: RulesConfig) -> tuple[str, str] | None:
    """(rule, the words that broke it) of the first rule that `problem` breaks; None if it breaks none."""
    text = question(problem)
    for name in rules.drop:
        found = RULES[name](problem, text)
        if found:
            return name, found
    matches = ((name, re.search(pattern, text, re.IGNORECASE | re.MULTILINE)) for name, pattern in rules.own.items())
    return next(((name, match[0]) for name, match in matches if match), None)


def domain(problem: Problem, domains: DomainsConfig) -> str:
    """The row's own domain, else the one whose keywords occur most often, else `other`."""
    given = problem.columns.get(domains.column)
    return str(given) if given else most_hits(question(problem), domains.keywords)


def most_hits(text: str, keywords: Mapping[str, Sequence[str]]) -> str:
    hits = {name: sum(len(re.findall(pattern, text, re.IGNORECASE)) for pattern in patterns) for name, patterns in keywords.items()}
    best = max(hits, key=hits.__getitem__, default=OTHER)
    return best if hits.get(best) else OTHER


def _multiple_choice(problem: Problem, text: str) -> str:
    column = next((name for name in _CHOICE_COLUMNS if problem.columns.get(name)), None)
    if column:
        return f"column `{column}`"
    letters = [letter.upper() for letter in _OPTION.findall(text)]
    options = "ABCDE" if "A" in letters else "12345"
    in_order = "".join(letter for letter in letters if letter in options)
    if options[:3] in in_order and (options == "ABCDE" or _CHOICE_WORDS.search(text)):  # numbered parts are no options by themselves
        return "options " + ", ".join(options[:3])
    match = _CHOICE_WORDS.search(text)
    return match[0] if match else ""


def _true_false(problem: Problem, text: str) -> str:
    match = _TRUE_FALSE.search(text)
    if match:
        return match[0]
    answer = (problem.answer or "").strip().strip(".").lower()
    return f"answer `{answer}`" if answer in _TRUE_FALSE_ANSWERS else ""


def _proof(problem: Problem, text: str) -> str:
    match = _PROOF.search(text)
    return match[0] if match else ""


RULES: Mapping[str, Callable[[Problem, str], str]] = {"multiple_choice": _multiple_choice, "true_false": _true_false, "proof": _proof}
"""Each gives the words that break it, or nothing."""


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")  # type: ignore[attr-defined]
