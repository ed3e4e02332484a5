"""The image side of a model folder: whether it has one, and the encoder that turns images into what the model takes.

Owns the choice by `config.json`; each architecture's encoder lives beside its model.
"""

from __future__ import annotations

import json
from pathlib import Path

from bregman.protocols import ImageEncoder


def load_image_encoder(folder: Path) -> ImageEncoder | None:
    """The image encoder of the model in `folder`; None for a text model.

    Raises:
        DataError: the folder's image settings are missing or malformed.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None  # `load_policy` and the engine say what is wrong with the folder
    if isinstance(config, dict) and config.get("model_type") == "kimi_vl":
        from bregman.models.kimi_vl.image_processing import KimiVLImageEncoder

        return KimiVLImageEncoder.from_folder(folder)
    return None
