"""Images as MoonViT takes them, on PIL and numpy: native resolution, padded to whole merged patches, normalised, cut up.

Owns the arithmetic and its settings file. The Hugging Face processor around it lives in `processor.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bregman.errors import DataError
from bregman.types import ImagePatches

if TYPE_CHECKING:
    from PIL.Image import Image

SETTINGS_FILE = "preprocessor_config.json"
MAX_SIDE_PATCHES = 511
"""Patches along one side; the positions of the published encoder end at 512."""
MAX_PIXELS = 89_478_485
"""Pillow's own bound on what is an image and not a decompression bomb."""


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """The published `preprocessor_config.json`, as far as it changes pixels.

    Attributes:
        in_token_limit: patches of an image (before merging) above which it is made smaller.
        merge_kernel_size: (rows, columns) of patches that become one token.
    """

    patch_size: int = 14
    merge_kernel_size: tuple[int, int] = (2, 2)
    in_token_limit: int = 4096
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    pad_input: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError on settings that mean nothing."""
        if not self.pad_input:
            raise ValueError("`pad_input: false` is not offered: published checkpoints and vLLM pad")
        if self.patch_size < 1 or self.in_token_limit < 1 or len(self.merge_kernel_size) != 2 or min(self.merge_kernel_size) < 1:
            raise ValueError("`patch_size`, `in_token_limit` and both `merge_kernel_size` must be at least 1")
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            raise ValueError("`image_mean` and `image_std` must be three numbers, the second positive")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ImageSettings:
        """The settings among `values`, where keys that do not change pixels are left out.

        Raises:
            ValueError: they mean nothing.
        """
        known: dict[str, Any] = {}
        for key in cls.__dataclass_fields__:
            if (value := values.get(key)) is not None:
                known[key] = tuple(value) if isinstance(value, list) else value
        return cls(**known)

    @classmethod
    def from_folder(cls, folder: Path) -> ImageSettings:
        """Settings of a model folder.

        Raises:
            DataError: there are none, or they are malformed.
        """
        path = folder / SETTINGS_FILE
        try:
            return cls.of(json.loads(path.read_text()))
        except OSError as error:
            raise DataError(str(path), f"cannot be read ({error.strerror})", "copy the whole published folder") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(str(path), f"malformed image settings ({error})", "use the file published with the model") from None


def write_image_processor(folder: Path, settings: ImageSettings) -> None:
    """Write `preprocessor_config.json` in the published layout."""
    names = {"image_processor_type": "KimiVLImageProcessor", "processor_class": "KimiVLProcessor"}
    rows, columns = settings.merge_kernel_size
    pooled = {"num_pooled_tokens": max(1, settings.in_token_limit // (rows * columns))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS_FILE).write_text(json.dumps({**names, **asdict(settings), **pooled}, indent=2))


class KimiVLImageEncoder:
    """`bregman.protocols.ImageEncoder` of Kimi-VL."""

    def __init__(self, settings: ImageSettings, placeholder_id: int) -> None:
        self.settings = settings
        self._placeholder_id = placeholder_id

    @property
    def placeholder_id(self) -> int:
        """`media_placeholder_token_id` of the model's configuration."""
        return self._placeholder_id

    @classmethod
    def from_folder(cls, folder: Path) -> KimiVLImageEncoder:
        """The encoder of a Kimi-VL folder.

        Raises:
            DataError: its image settings or its placeholder token are missing or malformed.
        """
        path = folder / "config.json"
        try:
            placeholder = json.loads(path.read_text()).get("media_placeholder_token_id")
        except (OSError, ValueError) as error:
            raise DataError(str(path), f"cannot be read ({error})", "copy the whole published folder") from None
        if not isinstance(placeholder, int):
            raise DataError(str(path), "has no `media_placeholder_token_id`", "use the configuration published with the model")
        return cls(ImageSettings.from_folder(folder), placeholder)

    def encode(self, image: Image) -> ImagePatches:
        """Patches of an RGB image.

        Raises:
            ValueError: the image is empty, too large, or too long and thin; one line that says what to do.
        """
        return encode_image(image, self.settings)


def encode_image(image: Image, settings: ImageSettings) -> ImagePatches:
    """`image` within the resolution limit, padded with black on the right and below, normalised and cut into patches.

    The same as the published processor: bicubic resize by sqrt(limit / patches), zero padding to merged patches, (x / 255 - mean)
    / std in float32.

    Raises:
        ValueError: as `resized`.
    """
    from PIL import Image as pil

    size = resized(image.size, settings)
    if image.mode != "RGB":
        image = image.convert("RGB")
    if image.size != size:
        image = image.resize(size, pil.Resampling.BICUBIC)
    patch, (merge_rows, merge_columns) = settings.patch_size, settings.merge_kernel_size
    rows, columns = grid(size, settings)
    canvas: np.ndarray = np.zeros((rows * patch, columns * patch, 3), dtype=np.float32)
    canvas[: size[1], : size[0]] = np.asarray(image, dtype=np.float32) / np.float32(255)
    canvas = (canvas - np.asarray(settings.image_mean, dtype=np.float32)) / np.asarray(settings.image_std, dtype=np.float32)
    patches = canvas.reshape(rows, patch, columns, patch, 3).transpose(0, 2, 4, 1, 3)
    pixels = np.ascontiguousarray(patches).reshape(rows * columns, 3, patch, patch)
    return ImagePatches(pixels=pixels, grid=(rows, columns), num_tokens=rows * columns // (merge_rows * merge_columns))


def resized(size: tuple[int, int], settings: ImageSettings) -> tuple[int, int]:
    """(width, height) to which an image of `size` is made smaller; `size` itself where it is within the limit.

    Raises:
        ValueError: nothing is left of the image, or it does not fit into the encoder's positions.
    """
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width} x {height} pixels is empty: drop it, or draw it again")
    if width * height > MAX_PIXELS:
        raise ValueError(f"an image of {width} x {height} pixels is over {MAX_PIXELS:,} pixels: scale it down before")
    patches = (width // settings.patch_size) * (height // settings.patch_size)
    if patches > settings.in_token_limit:
        scale = math.sqrt(settings.in_token_limit / patches)
        width, height = int(width * scale), int(height * scale)
    if width < 1 or height < 1 or max(grid((width, height), settings)) > MAX_SIDE_PATCHES:
        longest = MAX_SIDE_PATCHES // max(settings.merge_kernel_size) * max(settings.merge_kernel_size) * settings.patch_size
        raise ValueError(f"an image of {size[0]} x {size[1]} pixels is too long and thin: crop its longer side to {longest} pixels")
    return width, height


def grid(size: tuple[int, int], settings: ImageSettings) -> tuple[int, int]:
    """(rows, columns) of patches of an image of `size` (width, height) once it is padded."""
    (width, height), (merge_rows, merge_columns) = size, settings.merge_kernel_size
    rows = math.ceil(height / (settings.patch_size * merge_rows)) * merge_rows
    columns = math.ceil(width / (settings.patch_size * merge_columns)) * merge_columns
    return rows, columns
