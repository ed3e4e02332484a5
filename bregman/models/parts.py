"""The parts of a vision-language model that a recipe names: which of them a parameter belongs to.

Owns the names. What trains and at which rate is the recipe's choice, applied by the learner.
"""

from __future__ import annotations

from bregman.engines.config import ModelPart

_PREFIXES: dict[str, ModelPart] = {"vision_tower": "vision_tower", "multi_modal_projector": "projector"}


def part_of(name: str) -> ModelPart:
    """The part of the parameter `name` of a `PolicyModel`; all of a text model is its `language_model`."""
    for component in name.split("."):
        if component in _PREFIXES:
            return _PREFIXES[component]
    return "language_model"
