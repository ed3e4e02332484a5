"""A model without its weights: parameter names, shapes and counts from `config.json` alone.

Owns building on torch's meta device. What the counts mean for memory is `recipes.plan`'s.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from bregman.errors import DataError
from bregman.models.loading import hide_cuda_builds


def meta_model(config_file: Path) -> PreTrainedModel:
    """The model that a `config.json` describes, on the meta device: no memory, no weights.

    Raises:
        DataError: the file is missing or malformed, or names no architecture that is known here.
    """
    hide_cuda_builds()
    try:
        settings = json.loads(config_file.read_text())
        kind = settings["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            str(config_file), f"not a model's config.json ({type(error).__name__})", "give one that names its model_type"
        ) from None
    with torch.device("meta"):
        try:
            if kind == "kimi_vl":
                from bregman.models.kimi_vl.configuration import KimiVLConfig
                from bregman.models.kimi_vl.modeling import KimiVLForConditionalGeneration

                return KimiVLForConditionalGeneration(KimiVLConfig(**settings))
            from transformers import AutoConfig, AutoModelForCausalLM

            return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{k: v for k, v in settings.items() if k != "model_type"}))
        except (ValueError, KeyError, StrictDataclassError) as error:
            found = f"describes no `{kind}` model that can be built ({' '.join(str(error).split())})"
            raise DataError(str(config_file), found, "see model.path, or model.config") from None
