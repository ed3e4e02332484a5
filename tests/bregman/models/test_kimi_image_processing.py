"""Kimi-VL's image arithmetic against the published formula written out naively, and the Hugging Face classes around it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bregman.errors import DataError
from bregman.models.kimi_vl.chat_template import IMAGE_PLACEHOLDER
from bregman.models.kimi_vl.image_processing import ImageSettings, KimiVLImageEncoder, encode_image, write_image_processor
from bregman.models.kimi_vl.processor import KimiVLImageProcessor, KimiVLProcessor, expand
from bregman.models.kimi_vl.tokenizer import write_tiny_tokenizer

CLIP_LIKE = ImageSettings(image_mean=(0.48145466, 0.4578275, 0.40821073), image_std=(0.26862954, 0.26130258, 0.27577711), in_token_limit=64)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def reference(image: Image.Image, settings: ImageSettings) -> tuple[np.ndarray, tuple[int, int]]:
    """The published processor, pixel by pixel."""
    width, height = image.size
    patches = (width // 14) * (height // 14)
    if patches > settings.in_token_limit:
        scale = math.sqrt(settings.in_token_limit / patches)
        image = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    width, height = image.size
    rows, columns = (height + 27) // 28 * 2, (width + 27) // 28 * 2
    pixels = np.zeros((rows * columns, 3, 14, 14), dtype=np.float32)
    for row in range(rows * 14):
        for column in range(columns * 14):
            colour = image.getpixel((column, row)) if row < height and column < width else (0, 0, 0)
            for channel in range(3):
                value = np.float32(colour[channel]) / np.float32(255)
                value = (value - np.float32(settings.image_mean[channel])) / np.float32(settings.image_std[channel])
                pixels[row // 14 * columns + column // 14, channel, row % 14, column % 14] = value
    return pixels, (rows, columns)


@pytest.mark.parametrize("size", [(28, 28), (1, 1), (29, 27), (100, 50), (13, 200), (200, 190), (137, 301), (9, 900)])
@pytest.mark.parametrize("settings", [ImageSettings(), CLIP_LIKE], ids=["published", "limited"])
def test_pixels_are_those_of_the_published_formula(size: tuple[int, int], settings: ImageSettings) -> None:
    image = noise(*size)
    found = encode_image(image, settings)
    pixels, grid = reference(image, settings)
    assert found.grid == grid
    assert found.num_tokens == grid[0] * grid[1] // 4
    assert found.pixels.dtype == np.float32 and found.pixels.flags.c_contiguous
    np.testing.assert_array_equal(found.pixels, pixels)


def test_same_image_same_bytes_and_other_modes_as_rgb() -> None:
    image = noise(40, 30)
    assert encode_image(image, ImageSettings()).pixels.tobytes() == encode_image(image.copy(), ImageSettings()).pixels.tobytes()
    grey = image.convert("L")
    np.testing.assert_array_equal(encode_image(grey, CLIP_LIKE).pixels, encode_image(grey.convert("RGB"), CLIP_LIKE).pixels)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((0, 10), "0 x 10 pixels is empty"),
        ((10, 0), "10 x 0 pixels is empty"),
        ((10_000, 10_000), "over 89,478,485 pixels: scale it down"),
        ((3, 8000), "3 x 8000 pixels is too long and thin: crop its longer side to 7140 pixels"),
        ((14, 4_000_000), "too long and thin"),
    ],
)
def test_images_that_cannot_be_encoded(size: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        encode_image(Image.new("1", size), ImageSettings())
    assert "\n" not in str(error.value)


def test_longest_image_that_the_message_promises() -> None:
    assert encode_image(Image.new("RGB", (7140, 3)), ImageSettings()).grid == (2, 510)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = write_tiny_tokenizer(tmp_path, "")
    config = {"model_type": "kimi_vl", "media_placeholder_token_id": tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_image_processor(tmp_path, CLIP_LIKE)
    return tmp_path


def test_settings_round_trip_in_the_published_layout(folder: Path) -> None:
    assert ImageSettings.from_folder(folder) == CLIP_LIKE
    written = json.loads((folder / "preprocessor_config.json").read_text())
    assert written["merge_kernel_size"] == [2, 2] and written["num_pooled_tokens"] == 16
    assert (
        KimiVLImageEncoder.from_folder(folder).placeholder_id
        == json.loads((folder / "config.json").read_text())["media_placeholder_token_id"]
    )


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("preprocessor_config.json", None, "cannot be read"),
        ("preprocessor_config.json", "{", "malformed image settings"),
        ("preprocessor_config.json", "[]", "malformed image settings"),
        ("preprocessor_config.json", '{"pad_input": false}', "`pad_input: false` is not offered"),
        ("preprocessor_config.json", '{"image_std": [1, 0, 1]}', "the second positive"),
        ("preprocessor_config.json", '{"in_token_limit": 0}', "at least 1"),
        ("preprocessor_config.json", '{"patch_size": "large"}', "malformed image settings"),
        ("config.json", "{}", "no `media_placeholder_token_id`"),
        ("config.json", "{", "cannot be read"),
    ],
)
def test_malformed_folders(folder: Path, file: str, text: str | None, message: str) -> None:
    (folder / file).unlink() if text is None else (folder / file).write_text(text)
    with pytest.raises(DataError, match=message):
        KimiVLImageEncoder.from_folder(folder)


def test_processor_expands_placeholders_and_gives_the_encoders_pixels(folder: Path) -> None:
    tokenizer = write_tiny_tokenizer(folder, "")
    processor = KimiVLProcessor(KimiVLImageProcessor.from_pretrained(folder), tokenizer)
    images = [noise(100, 50), noise(28, 28, seed=1), noise(300, 200, seed=2)]
    texts = [f"a{IMAGE_PLACEHOLDER}b{IMAGE_PLACEHOLDER}", f"{IMAGE_PLACEHOLDER}c"]
    output = processor(images=images, text=texts)
    encoder = KimiVLImageEncoder.from_folder(folder)
    encoded = [encoder.encode(image) for image in images]
    np.testing.assert_array_equal(output["pixel_values"], np.concatenate([one.pixels for one in encoded]))
    assert output["image_grid_hws"].tolist() == [list(one.grid) for one in encoded]
    counts = [one.num_tokens for one in encoded]
    assert [ids.count(encoder.placeholder_id) for ids in output["input_ids"]] == [counts[0] + counts[1], counts[2]]
    assert tokenizer.decode(output["input_ids"][1]) == IMAGE_PLACEHOLDER * counts[2] + "c"
    assert set(processor(text="only text")) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("text", ["no image", f"{IMAGE_PLACEHOLDER}{IMAGE_PLACEHOLDER}"])
def test_placeholders_are_counted(text: str) -> None:
    with pytest.raises(ValueError, match=f"{text.count(IMAGE_PLACEHOLDER)} `.*` in the text and 1 images: write one for each"):
        expand(text, [4])


def test_processor_names_the_image(folder: Path) -> None:
    with pytest.raises(ValueError, match="image 1: an image of 3 x 8000 pixels"):
        KimiVLImageProcessor.from_pretrained(folder)([noise(28, 28), noise(3, 8000)])
