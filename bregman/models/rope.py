"""Context extension: another rotary base and a longer window for a model, without touching its weights.

Owns reading and changing these two entries of `config.json`. Light: neither torch nor transformers.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from bregman.errors import DataError

Rope = tuple[float | None, int | None]
"""Base of the rotary embedding and number of positions; None where the configuration does not say."""


def rope_of(model: Path) -> Rope:
    """The rotary base and the window of the model in folder `model`.

    Raises:
        DataError: no readable config.json.
    """
    text = _text_config(_read(model))
    return _parameters(text, model).get("rope_theta", text.get("rope_theta")), text.get("max_position_embeddings")


def differ(first: Path, second: Path) -> bool:
    """Whether two models have another rotary base or window; what one of them leaves to its default counts as equal."""
    return any(a != b for a, b in zip(rope_of(first), rope_of(second), strict=True) if a is not None and b is not None)


def extended(model: Path, folder: Path, *, theta: float | None, positions: int | None) -> Path:
    """A model folder with rotary base `theta` and `positions` positions (None: as they are): `model` itself if it has them, else
    `folder`, which holds a config.json of its own and links to everything else.

    Raises:
        DataError: `model` has no rotary embedding with one base, or the folder cannot be written.
    """
    old = rope_of(model)
    if (theta in (None, old[0])) and (positions in (None, old[1])):
        return model
    config = _read(model)
    text = _text_config(config)
    if theta is not None:
        parameters = _parameters(text, model)
        if not parameters and "rope_theta" not in text:
            raise DataError(str(model / "config.json"), "names no base of a rotary embedding", "remove rope_theta from the stage")
        if parameters:
            parameters["rope_theta"] = theta
        if "rope_theta" in text or not parameters:
            text["rope_theta"] = theta
    if positions is not None:
        text["max_position_embeddings"] = positions
    try:
        _write(config, model, folder)
    except OSError as error:
        raise DataError(str(folder), f"cannot be written ({error})", "choose an output_dir with space that can be written") from error
    return folder


def _write(config: dict[str, Any], model: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        for file in model.iterdir():
            if file.name != "config.json":
                (aside / file.name).symlink_to(file.resolve())
        (aside / "config.json").write_text(json.dumps(config, indent=2))
        aside.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _read(model: Path) -> dict[str, Any]:
    try:
        config = json.loads((model / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise DataError(str(model / "config.json"), f"cannot be read ({error})", "give a model folder in Hugging Face format") from error
    if not isinstance(config, dict):
        raise DataError(str(model / "config.json"), "holds no configuration", "give a model folder in Hugging Face format")
    return config


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part, which is all of it for a text model."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _parameters(text: dict[str, Any], model: Path) -> dict[str, Any]:
    parameters = text.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in parameters.values()):
        raise DataError(str(model / "config.json"), "its layers have several rotary bases", "such a model's base cannot be overridden here")
    return parameters
