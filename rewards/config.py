"""Reward settings of a recipe.

Owns numbers and names; what a reward computes and how it is isolated live beside it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from bregman.config import Config


class RewardConfig(Config):
    """One reward function. `path.py:name` relative to the recipe, `module:name`, or the name of an installed entry point."""

    function: str = Field(description="built-in name (exact_answer, math, code, think_format, ...), `path.py:name`, or entry point")
    name: str = Field("", description="column in metrics and rollouts; the function's name if empty")
    weight: float = Field(1.0, description="share in the total reward; 0 logs it as a metric only")
    second_opinion: bool = Field(False, description="judges what the first reward judges; how often the two agree is watched")
    args: dict[str, Any] = Field(default_factory=dict, description="passed to the function as keyword arguments")
    timeout: PositiveFloat = Field(10.0, description="seconds for one call before its process is killed")
    load_timeout: PositiveFloat = Field(120.0, description="seconds for importing the function")
    batch: PositiveInt = Field(64, description="samples per call; groups stay whole, so one call may take a few more")


class RewardsConfig(Config):
    """All rewards of a stage: total = weighted sum over the parts that apply."""

    functions: list[RewardConfig] = Field(min_length=1, description="the first one is the primary reward, reported as accuracy")
    on_failure: Literal["drop", "zero", "stop"] = Field("drop", description="what a failed reward does to its sample")
    processes: PositiveInt = Field(1, description="calls that run at once in one reward worker, each in a process of its own")
    memory_gib: PositiveFloat | None = Field(4.0, description="memory of one process, beyond it MemoryError; null: no limit")
    total_timeout: PositiveFloat = Field(600.0, description="seconds for all rewards of one batch; what is left then has failed")


class LengthRewardConfig(Config):
    """Length reward, Kimi k1.5 sec. 2.3.3."""

    weight: NonNegativeFloat = 0.0
    warmup_iterations: NonNegativeInt = Field(0, description="iterations with weight 0 before it is switched on")
