"""The parts of a vision-language model that a recipe names: which of them a parameter belongs to, and training some of them only.

Owns the names. At which rate a part trains is the optimizer's business.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from bregman.engines.config import ModelPart
from bregman.errors import RecipeError

_PREFIXES: dict[str, ModelPart] = {"vision_tower": "vision_tower", "multi_modal_projector": "projector"}


def part_of(name: str) -> ModelPart:
    """The part of the parameter `name` of a `PolicyModel`; all of a text model is its `language_model`."""
    for component in name.split("."):
        if component in _PREFIXES:
            return _PREFIXES[component]
    return "language_model"


def train_only(policy: nn.Module, parts: Sequence[ModelPart] | None) -> None:
    """Let the parameters of `parts` need gradients, and no others; None is all.

    Raises:
        RecipeError: the model has no such part.
    """
    if parts is None:
        policy.requires_grad_(True)
        return
    present = {part_of(name) for name, _ in policy.named_parameters()}
    if missing := [part for part in parts if part not in present]:
        raise RecipeError("train", f"this model has no {missing[0]}, only {', '.join(sorted(present))}", "remove it from the list")
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(part_of(name) in parts)
