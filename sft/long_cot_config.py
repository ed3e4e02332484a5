"""Settings of the long-CoT warm-up set: who writes the samples, how problems are asked, which samples are kept.

Owns numbers, marks and their checks. Making the set is `recipes.data_stages`', judging a sample `sft.long_cot`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from bregman.config import Config
from bregman.data.config import SourceConfig
from bregman.data.templates import PromptTemplate
from bregman.engines.config import SamplingConfig

TEMPLATES: dict[str, PromptTemplate] = {
    "plain": PromptTemplate(),
    "plan": PromptTemplate(
        user="{question}\n\nThink before you answer, inside <think> and </think>. Begin with a plan: what is asked, what is given, "
        "which steps lead there. Work through the plan step by step, and check each result before you build on it. After </think> give "
        "a short solution and the final answer."
    ),
    "explore": PromptTemplate(
        user="{question}\n\nThink inside <think> and </think>, as if on scratch paper. Consider more than one way to attack the problem, "
        "try the most promising first, and when it leads nowhere say so, go back and try another. After </think> give a short solution "
        "and the final answer."
    ),
    "reflect": PromptTemplate(
        user="{question}\n\nThink inside <think> and </think>. When you have a first result, doubt it: look for mistakes, verify it in "
        "another way, and correct what is wrong before you go on. After </think> give a short solution and the final answer."
    ),
}
"""Templates that a recipe may name: they ask for planning, evaluation, reflection and exploration (Kimi-VL's long-CoT traits)."""

TRAITS: dict[str, list[str]] = {
    "planning": [
        r"\b(first|to begin|let me start|let's start)\b",
        r"\b(plan|strategy|approach|steps?)\b",
        r"\b(we|i) (need|have|want) to\b",
    ],
    "evaluation": [r"\b(check|verify|confirm|make sure|double[- ]check)", r"\b(makes sense|is (in)?correct|holds|works out)\b"],
    "reflection": [
        r"\b(wait|hmm|actually|hold on|on second thought)\b",
        r"\b(mistake|wrong|error|overlooked|reconsider)",
        r"\blet me (re|think again)",
    ],
    "exploration": [r"\b(alternative|alternatively|another (way|approach|idea)|instead|what if|suppose|try)\b"],
}
"""Lexical marks of each trait, as regular expressions that ignore case."""


THINK_MARKS: dict[str, str] = {"<think>": "</think>", "◁think▷": "◁/think▷"}
"""Opening -> closing mark of a think block."""


def with_mark(text: str, opening: str) -> str:
    """`text` with every think mark as the one that `opening` belongs to."""
    for other, closing in THINK_MARKS.items():
        text = text.replace(other, opening).replace(closing, THINK_MARKS[opening])
    return text


class ModelGenerator(Config):
    """The stage's model, through the rollout workers."""

    kind: Literal["model"] = "model"


class EndpointGenerator(Config):
    """A model behind an OpenAI-compatible endpoint, such as `vllm serve`."""

    kind: Literal["endpoint"] = "endpoint"
    base_url: str = Field(description="up to and with /v1")
    model: str = Field(description="its name there")
    api_key_env: str = Field("", description="environment variable that holds the key; empty: no key")
    timeout: PositiveFloat = Field(600.0, description="seconds for one attempt at one sample")
    retries: NonNegativeInt = Field(4, description="further attempts after 408, 429, 5xx, time-outs and broken connections")
    backoff: PositiveFloat = Field(1.0, description="seconds before the second attempt, doubled from then on")
    concurrency: PositiveInt = Field(16, description="requests at once")
    max_requests: PositiveInt | None = Field(None, description="attempts of one run of the stage; null: no bound")
    max_tokens_total: PositiveInt | None = Field(
        None, description="tokens, by the endpoint's count, of one run of the stage; null: no bound"
    )
    extra: dict[str, Any] = Field(default_factory=dict, description="further keys of the request body")

    @field_validator("base_url")
    @classmethod
    def _is_http(cls, value: str) -> str:
        if not re.fullmatch(r"https?://\S+", value):
            raise ValueError(f"`{value}` is not an http:// or https:// address")
        return value


GeneratorConfig = Annotated[ModelGenerator | EndpointGenerator, Field(discriminator="kind")]


class QualityConfig(Config):
    """What a right answer's thinking must be like to be kept."""

    think: bool = Field(True, description="the response must be one well-formed think block and an answer after it")
    min_tokens: NonNegativeInt = Field(0, description="of the whole response")
    max_tokens: PositiveInt | None = None
    ngram: PositiveInt = Field(8, description="tokens of the n-grams whose repeats are counted")
    max_repeated_share: NonNegativeFloat = Field(0.3, le=1.0, description="share of n-grams that occurred before in the response")
    traits: dict[str, list[str]] = Field(
        default_factory=lambda: {name: list(marks) for name, marks in TRAITS.items()},
        description="trait -> regular expressions, of which one must occur in the thinking; case is ignored",
    )
    min_traits: NonNegativeInt = Field(2, description="traits that the thinking must have")
    forbidden: list[str] = Field(default_factory=list, description="regular expressions that must not occur in the response")
    near_duplicate: PositiveFloat = Field(
        0.8, le=1.0, description="Jaccard similarity of word 3-grams from which two answers to one problem count as the same; 1: exact only"
    )
    keep: PositiveInt = Field(2, description="most answers kept per problem")
    pick: Literal["shortest", "diverse"] = Field("diverse", description="which: the shortest, or those that differ most")

    @model_validator(mode="after")
    def _can_be_met(self) -> QualityConfig:
        if self.min_traits > len(self.traits):
            raise ValueError(f"min_traits is {self.min_traits}, and there are {len(self.traits)} traits; lower it or add traits")
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        for pattern in [*(mark for marks in self.traits.values() for mark in marks), *self.forbidden]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"`{pattern}` is not a regular expression ({error})") from None
        return self


class LongCoTConfig(Config):
    """A set of verified long-CoT answers, by prompting and rejection sampling (Kimi k1.5 sec. 2.2)."""

    problems: SourceConfig
    generator: GeneratorConfig = ModelGenerator()
    templates: list[str] = Field(["plan", "explore", "reflect"], min_length=1, description="names of built-in or own templates")
    own_templates: dict[str, PromptTemplate] = Field(
        default_factory=dict, description="name -> template; `{question}` stands for the question"
    )
    sampling: SamplingConfig = Field(description="num_samples: for each problem and template")
    think_mark: Literal["<think>", "◁think▷"] = Field(
        "<think>", description="opens the thinking in the data and in built-in templates; samples that use the other mark are rewritten"
    )
    right_at_least: float = Field(1.0, description="primary reward from which an answer is right")
    quality: QualityConfig = QualityConfig()
    chunk: PositiveInt = Field(64, description="problems sampled between two saved parts")

    @model_validator(mode="after")
    def _templates_exist(self) -> LongCoTConfig:
        known = [*TEMPLATES, *self.own_templates]
        unknown = next((name for name in self.templates if name not in known), None)
        if unknown is not None:
            raise ValueError(f"no template `{unknown}`; there is: {', '.join(known)}")
        if len(set(self.templates)) < len(self.templates):
            raise ValueError("a template is named twice")
        prefilled = next((name for name in self.templates if self.template(name).prefill), None)
        if prefilled and isinstance(self.generator, EndpointGenerator):
            raise ValueError(f"template `{prefilled}` has a prefill, which an endpoint cannot be given; use `generator: {{kind: model}}`")
        return self

    def template(self, name: str) -> PromptTemplate:
        """The own or built-in template of that name; built-in ones speak of the recipe's think marks."""
        if name in self.own_templates:
            return self.own_templates[name]
        built_in = TEMPLATES[name]
        return built_in.model_copy(update={"user": with_mark(built_in.user, self.think_mark)})
