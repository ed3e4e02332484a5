"""The model a run starts from: made on the spot or found on disk, and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bregman.errors import DataError
from bregman.models.config import HFModelConfig, TinyKimiVLConfig, TinyQwen3Config
from bregman.protocols import ImageEncoder
from bregman.tracking.run_folder import RunFolder
from recipes.schema import Recipe


def initial_model(recipe: Recipe, folder: RunFolder) -> Path:
    """HF folder of the start model.

    Raises:
        DataError: there is no such model.
    """
    if isinstance(recipe.model, HFModelConfig):
        from bregman.models.loading import resolve_model

        return resolve_model(recipe.model.path, recipe.model.revision)
    path = folder.path / "model"
    if not path.exists():
        make_model(recipe.model, recipe.seed, path)
    return path


def make_model(model: TinyQwen3Config | TinyKimiVLConfig, seed: int, folder: Path) -> None:
    """Write a random model to `folder`, which must not exist."""
    if isinstance(model, TinyKimiVLConfig):
        from bregman.models.tiny.kimi_vl import make_tiny_kimi_vl

        make_tiny_kimi_vl(model, seed, folder)
    else:
        from bregman.models.tiny.make import make_tiny_qwen3

        make_tiny_qwen3(model, seed, folder)


def recipe_tokenizer(recipe: Recipe) -> Any:
    """The tokenizer of the recipe's model, without making or loading weights."""
    if isinstance(recipe.model, TinyQwen3Config):
        from bregman.models.tiny.tokenizer import character_tokenizer

        return character_tokenizer(recipe.model.alphabet)
    if isinstance(recipe.model, TinyKimiVLConfig):
        from bregman.models.kimi_vl.tokenizer import tiny_tokenizer

        return tiny_tokenizer(recipe.model.alphabet)
    from bregman.models.loading import resolve_model

    return load_tokenizer(resolve_model(recipe.model.path, recipe.model.revision))


def recipe_encoder(recipe: Recipe) -> ImageEncoder | None:
    """The image encoder of the recipe's model, without making or loading weights; None for a text model."""
    if isinstance(recipe.model, TinyQwen3Config):
        return None
    if isinstance(recipe.model, TinyKimiVLConfig):
        from bregman.models.kimi_vl.image_processing import KimiVLImageEncoder
        from bregman.models.kimi_vl.tokenizer import IMAGE_PLACEHOLDER
        from bregman.models.tiny.kimi_vl import image_settings

        placeholder = recipe_tokenizer(recipe).get_vocab()[IMAGE_PLACEHOLDER]
        return KimiVLImageEncoder(image_settings(recipe.model), placeholder)
    from bregman.models.loading import resolve_model
    from bregman.models.vision import load_image_encoder

    return load_image_encoder(resolve_model(recipe.model.path, recipe.model.revision))


def load_tokenizer(model: Path) -> Any:
    """The fast tokenizer in an HF folder.

    Raises:
        DataError: there is none, or it has no chat template.
    """
    try:
        if (model / "tiktoken.model").exists():  # Kimi's published layout, for which AutoTokenizer asks for remote code
            from bregman.models.kimi_vl.tokenizer import TikTokenTokenizerFast

            tokenizer = TikTokenTokenizerFast.from_pretrained(model)
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        found = f"no tokenizer could be loaded ({str(error).splitlines()[0]})"
        raise DataError(str(model), found, "put its files beside the model") from None
    if not tokenizer.chat_template:
        raise DataError(str(model), "its tokenizer has no chat template", "add a chat_template.jinja to the folder")
    return tokenizer
