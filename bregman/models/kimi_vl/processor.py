"""Kimi-VL's image processor and processor as Hugging Face classes, so that vLLM gets the very pixels that training gets.

Owns the Hugging Face surface; the arithmetic lives in `image_processing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from transformers import AutoImageProcessor, AutoProcessor, BaseImageProcessor, BatchFeature
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ProcessorMixin

from bregman.models.kimi_vl.chat_template import IMAGE_PLACEHOLDER
from bregman.models.kimi_vl.image_processing import ImageSettings, encode_image
from bregman.models.kimi_vl.tokenizer import register_tokenizer


class KimiVLImageProcessor(BaseImageProcessor):
    """Images -> `pixel_values` float32 [all patches, 3, patch, patch] and `image_grid_hws` int64 [images, 2] (rows, columns)."""

    model_input_names = ["pixel_values", "image_grid_hws"]  # noqa: RUF012 (declared so by the base class)

    def __init__(self, **values: Any) -> None:
        """Take what `preprocessor_config.json` holds.

        Raises:
            ValueError: the settings mean nothing.
        """
        settings = ImageSettings.of(values)
        super().__init__(**values)
        self.patch_size = settings.patch_size
        self.merge_kernel_size = list(settings.merge_kernel_size)
        self.in_token_limit = settings.in_token_limit
        self.image_mean = list(settings.image_mean)
        self.image_std = list(settings.image_std)
        self.pad_input = settings.pad_input

    def preprocess(self, images: Any, *_: Any, return_tensors: str | None = None, **options: Any) -> BatchFeature:
        """Encode one image or several (PIL, numpy or torch), laid end to end.

        Raises:
            ValueError: as `encode_image`, naming the image by its position.
        """
        settings = ImageSettings.of(vars(self))
        encoded = []
        for index, image in enumerate(cast(list[Any], make_flat_list_of_images(images))):
            try:
                encoded.append(encode_image(image if hasattr(image, "convert") else to_pil_image(image), settings))
            except ValueError as error:
                raise ValueError(f"image {index}: {error}") from None
        pixels = np.concatenate([one.pixels for one in encoded])
        grids = np.asarray([one.grid for one in encoded], dtype=np.int64)
        return BatchFeature({"pixel_values": pixels, "image_grid_hws": grids}, tensor_type=return_tensors)


class KimiVLProcessor(ProcessorMixin):
    """Text with one placeholder per image -> token ids with one per image feature, beside the image processor's output."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **_: Any) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token = IMAGE_PLACEHOLDER

    def __call__(
        self, images: Any = None, text: str | Sequence[str] | None = None, return_tensors: str | None = None, **options: Any
    ) -> BatchFeature:
        """Encode texts and the images they show, in the order in which they show them.

        Raises:
            ValueError: the texts do not hold as many placeholders as there are images.
        """
        found = dict(self.image_processor(images)) if images is not None and len(images) != 0 else {}
        texts: dict[str, Any] = {}
        if text is not None:
            counts = feature_counts(found.get("image_grid_hws", ()), self.image_processor.merge_kernel_size)
            texts = dict(self.tokenizer(expand(text, counts), **options))
        return BatchFeature({**texts, **found}, tensor_type=return_tensors)


def expand(text: str | Sequence[str], counts: Sequence[int], placeholder: str = IMAGE_PLACEHOLDER) -> list[str]:
    """Each text with its placeholders repeated, `counts` in the order of the placeholders over all texts.

    Raises:
        ValueError: there are not as many placeholders as counts.
    """
    texts = [text] if isinstance(text, str) else list(text)
    shown = sum(one.count(placeholder) for one in texts)
    if shown != len(counts):
        raise ValueError(f"{shown} `{placeholder}` in the text and {len(counts)} images: write one for each image")
    remaining = iter(counts)
    expanded = []
    for one in texts:
        pieces = one.split(placeholder)
        expanded.append(pieces[0] + "".join(placeholder * next(remaining) + piece for piece in pieces[1:]))
    return expanded


def feature_counts(grids: Any, merge_kernel_size: Sequence[int]) -> list[int]:
    """Tokens of each image, from its grid of patches."""
    return [int(rows) * int(columns) // (merge_kernel_size[0] * merge_kernel_size[1]) for rows, columns in grids]


def register(config_class: type) -> None:
    """Let the Auto classes open tokenizer, image processor and processor of folders with a `config_class`, in this process."""
    register_tokenizer(config_class)
    AutoImageProcessor.register(config_class, image_processor_classes={"pil": KimiVLImageProcessor}, exist_ok=True)
    AutoProcessor.register(config_class, KimiVLProcessor, exist_ok=True)
