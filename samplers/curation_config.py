"""Settings of problem curation: which problems are unfit, what a domain is, how hard is measured, how domains are balanced.

Owns numbers, patterns and their checks. The rules themselves are in `samplers.curation_rules`, sampling is `recipes.data_stages`'.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from bregman.config import Config
from bregman.data.config import SourceConfig
from bregman.data.templates import PromptTemplate
from bregman.engines.config import SamplingConfig

RuleName = Literal["multiple_choice", "true_false", "proof"]

DOMAINS: dict[str, list[str]] = {
    "geometry": [r"\b(triangle|circle|angle|polygon|perimeter|radius|diagonal|rectangle|tangent to|parallelogram)"],
    "probability": [r"\b(probability|random(ly)?|dice|coin|expected value|drawn from)\b"],
    "number_theory": [r"\b(prime|divisible|divisor|remainder|modulo|integers?|gcd|lcm|digits?)\b"],
    "calculus": [r"\b(derivative|integral|limit|differentiable|converge|maximi[sz]e|minimi[sz]e)"],
    "algebra": [r"\b(equation|polynomial|solve for|roots?|function|inequality|matrix|vector)\b"],
    "code": [r"\b(program|function signature|array|string|standard input|stdin|algorithm)\b", r"```"],
    "physics": [r"\b(velocity|force|energy|mass|voltage|current|acceleration|charge)\b"],
    "chemistry": [r"\b(molecule|reaction|acid|moles?|compound|oxid)"],
    "chart": [r"\b(chart|graph shows|table|axis|diagram|plot)\b"],
}
"""Keywords of domains, as regular expressions that ignore case; the domain with the most hits wins, the earlier of equals."""


def _compiled(patterns: list[str]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"`{pattern}` is not a regular expression ({error})") from None


class RulesConfig(Config):
    """Problems that no reward can check well, told by their text."""

    drop: list[RuleName] = Field(["multiple_choice", "true_false", "proof"], description="built-in rules, k1.5 sec. 2.1")
    own: dict[str, str] = Field(
        default_factory=dict, description="name -> regular expression on the question, case ignored; found: dropped"
    )

    @field_validator("own")
    @classmethod
    def _are_expressions(cls, value: dict[str, str]) -> dict[str, str]:
        _compiled(list(value.values()))
        if "kept" in value:
            raise ValueError("`kept` is what problems that stay are called; name the rule otherwise")
        return value


class DuplicatesConfig(Config):
    """Problems that repeat each other, and problems that an evaluation set asks too."""

    ngram: PositiveInt = Field(5, description="words of a shingle; a question of fewer words must be equal")
    threshold: PositiveFloat = Field(0.8, le=1.0, description="Jaccard similarity of shingles from which two problems are the same")
    overlap: PositiveFloat = Field(
        0.5, le=1.0, description="share of a problem's shingles that one evaluation problem holds from which they overlap"
    )
    evaluation_sets: list[SourceConfig] = Field(default_factory=list, description="problems that must not be trained on")


class DomainsConfig(Config):
    """What problems are about, and how many of each are kept."""

    column: str = Field("domain", description="of the data; where a row has it, it is kept; the tag is written under `domain`")
    keywords: dict[str, list[str]] = Field(
        default_factory=lambda: {name: list(patterns) for name, patterns in DOMAINS.items()},
        description="domain -> regular expressions on the question, case ignored; no hit: `other`",
    )
    max_per_domain: PositiveInt | None = None
    shares: dict[str, PositiveFloat] = Field(
        default_factory=dict, description="domain -> share of the result; as many as the scarcest allows; others are dropped"
    )

    @field_validator("keywords")
    @classmethod
    def _are_expressions(cls, value: dict[str, list[str]]) -> dict[str, list[str]]:
        _compiled([pattern for patterns in value.values() for pattern in patterns])
        return value


class HackConfig(Config):
    """Easy-to-hack problems, k1.5 sec. 2.1: right without thinking within `sampling.num_samples` tries -> dropped."""

    template: PromptTemplate = PromptTemplate(user="{question}\n\nGive the final answer only, at once, without any reasoning.")
    sampling: SamplingConfig = SamplingConfig(num_samples=8, max_tokens=64, temperature=1.0)


class CurationConfig(Config):
    """A refined problem set for RL, Kimi k1.5 sec. 2.1."""

    problems: SourceConfig
    rules: RulesConfig = RulesConfig()
    duplicates: DuplicatesConfig = DuplicatesConfig()
    domains: DomainsConfig = DomainsConfig()
    hack: HackConfig | None = Field(HackConfig(), description="null: leave out")
    sampling: SamplingConfig = Field(description="measures difficulty = 1 - pass rate; k1.5: 10 samples at a high temperature")
    right_at_least: float = Field(1.0, description="primary reward from which an answer is right")
    min_pass_rate: NonNegativeFloat = Field(0.0, le=1.0, description="below: dropped as too hard; above 0 drops what was never solved")
    max_pass_rate: NonNegativeFloat = Field(1.0, le=1.0, description="above: dropped as too easy; below 1 drops what was always solved")
    chunk: PositiveInt = Field(64, description="problems sampled between two saved parts")

    @model_validator(mode="after")
    def _rates_are_ordered(self) -> CurationConfig:
        if self.min_pass_rate > self.max_pass_rate:
            raise ValueError(f"min_pass_rate {self.min_pass_rate} is above max_pass_rate {self.max_pass_rate}")
        return self
