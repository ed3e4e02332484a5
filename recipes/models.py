"""The model a run starts from: made on the spot or found on disk, and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bregman.errors import DataError
from bregman.models.config import TinyQwen3Config
from bregman.tracking.run_folder import RunFolder
from recipes.schema import Recipe


def initial_model(recipe: Recipe, folder: RunFolder) -> Path:
    """HF folder of the start model.

    Raises:
        DataError: there is no such model.
    """
    if isinstance(recipe.model, TinyQwen3Config):
        path = folder.path / "model"
        if not path.exists():
            from bregman.models.tiny.make import make_tiny_qwen3

            make_tiny_qwen3(recipe.model, recipe.seed, path)
        return path
    from bregman.models.loading import resolve_model

    return resolve_model(recipe.model.path, recipe.model.revision)


def recipe_tokenizer(recipe: Recipe) -> Any:
    """The tokenizer of the recipe's model, without making or loading weights."""
    if isinstance(recipe.model, TinyQwen3Config):
        from bregman.models.tiny.tokenizer import character_tokenizer

        return character_tokenizer(recipe.model.alphabet)
    from bregman.models.loading import resolve_model

    return load_tokenizer(resolve_model(recipe.model.path, recipe.model.revision))


def load_tokenizer(model: Path) -> Any:
    """The fast tokenizer in an HF folder.

    Raises:
        DataError: there is none, or it has no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        found = f"no tokenizer could be loaded ({str(error).splitlines()[0]})"
        raise DataError(str(model), found, "put its files beside the model") from None
    if not tokenizer.chat_template:
        raise DataError(str(model), "its tokenizer has no chat template", "add a chat_template.jinja to the folder")
    return tokenizer
