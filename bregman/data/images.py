"""Images of data rows: a payload -> an RGB picture -> patches, and what can be wrong with it.

Owns opening and checking payloads, and when they are encoded. Which place in the text an image takes is `bregman.data.sources`'
and `bregman.data.chat`'s business; how a picture becomes patches is the model's encoder's.

A payload is a path, the bytes of an image file, a PIL image, or a dict of `datasets` ({"bytes": ..., "path": ...}). URLs are not fetched.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bregman.errors import DataError
from bregman.types import ImagePatches

if TYPE_CHECKING:
    from PIL.Image import Image

    from bregman.protocols import ImageEncoder

MAX_PIXELS = 2**26
"""Larger images (8192 x 8192) are refused before they are decompressed."""
CACHED_BYTES = 2**30
"""Patches kept in memory; images beyond are opened and encoded again when a pack needs them."""

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # not those that start other programs, such as EPS
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, struct.error, OverflowError)
_KINDS = "give a path, the bytes of an image file, a PIL image, or a `datasets` image"


class StoredImage(ImagePatches):
    """Patches of a payload that need not stay in memory: `pixels` are encoded anew where the cache has dropped them.

    Pickled as a plain `ImagePatches`, pixels included. Two of them are never equal: a pack tells images apart by identity.
    """

    __slots__ = ("_encoder", "_key", "_payload", "_where")
    __hash__ = object.__hash__
    _encoder: ImageEncoder
    _key: str
    _payload: Any
    _where: str

    def __init__(self, payload: Any, encoder: ImageEncoder, where: str) -> None:
        """Opens and encodes the image, if the cache has not got it.

        Raises:
            DataError: naming `where`: it is broken, or the model cannot take it.
        """
        values = {"_payload": payload, "_encoder": encoder, "_where": where, "_key": content_hash(payload, where)}
        for name, value in values.items():
            object.__setattr__(self, name, value)
        patches = self._patches()
        object.__setattr__(self, "grid", patches.grid)
        object.__setattr__(self, "num_tokens", patches.num_tokens)

    @property
    def pixels(self) -> np.ndarray:  # type: ignore[override]
        return self._patches().pixels

    def _patches(self) -> ImagePatches:
        found = _CACHE.get(self._encoder, self._key)
        if found is None:
            found = _encoded(self._payload, self._encoder, self._where)
            _CACHE.put(self._encoder, self._key, found)
        return found

    def __eq__(self, other: object) -> bool:
        return self is other

    def __reduce__(self) -> tuple[Any, ...]:
        return _plain, (self.pixels, self.grid, self.num_tokens)


def encode_images(payloads: Sequence[Any], encoder: ImageEncoder | None, where: str) -> tuple[ImagePatches, ...]:
    """The images of one row as the model takes them.

    Raises:
        DataError: naming `where` and the image: the model is a text model, or an image cannot be opened or encoded.
    """
    if not payloads:
        return ()
    if encoder is None:
        raise refused(where)
    return tuple(StoredImage(payload, encoder, named(where, index, len(payloads))) for index, payload in enumerate(payloads))


def refused(where: str) -> DataError:
    """The error of a row with images for a text model."""
    return DataError(where, "has images, and the model is a text model", "remove the `images` column or use a vision model")


def open_image(payload: Any, where: str) -> Image:
    """The payload as an RGB picture with 8 bits per channel.

    EXIF orientation is applied. Transparency is laid on white; CMYK, palettes and grey levels are converted; 16-bit grey levels
    are scaled to 8 bits. Refused rather than guessed: animations and files of several pages, floating-point pixels.

    Raises:
        DataError: naming `where`: there is no such file, it is broken or truncated, empty, larger than `MAX_PIXELS`, or refused.
    """
    from PIL import Image, ImageOps

    try:
        image = _opened(payload, where)
        _check_size(image, where)
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # phones put previews and depth maps behind the picture
            raise DataError(where, f"is an animation or has several pages ({frames})", "give the frames that matter as images of their own")
        image.load()
        image = ImageOps.exif_transpose(image)
        return _rgb(image, where)
    except Image.DecompressionBombError:
        raise DataError(where, f"is larger than {MAX_PIXELS:,} pixels", "scale it down") from None
    except _BROKEN as error:
        raise _unreadable(error, where) from None


def resolve(payload: Any, folder: Path, where: str) -> Any:
    """`payload` with a relative path made absolute from `folder`; `datasets` images become the bytes or the path that they hold.

    Raises:
        DataError: naming `where`: it is a URL, there is no such file, or no payload at all.
    """
    from PIL.Image import Image

    if isinstance(payload, Mapping) and ("bytes" in payload or "path" in payload):
        content, path = payload.get("bytes"), payload.get("path")
        if content is None and path is None:
            raise DataError(where, "has neither bytes nor a path", _KINDS)
        payload = content if content is not None else path
    if isinstance(payload, bytes | bytearray):
        return bytes(payload)
    if isinstance(payload, Image):
        return payload
    if not isinstance(payload, str | os.PathLike) or not str(payload):
        raise DataError(where, f"is a {type(payload).__name__}" if payload != "" else "is an empty path", _KINDS)
    text = os.fspath(payload)
    if text.startswith("data:") or "://" in text:
        raise DataError(where, f"is a URL ({text[:60]})", "download it first: nothing is fetched while a run reads its data")
    path = folder / Path(text).expanduser()
    if "\0" in text or not path.is_file():
        raise DataError(where, f"no such file: {path}", "relative paths start at the data file; those of a generator at the recipe")
    return str(path)


def storable(payload: Any, where: str) -> dict[str, Any]:
    """A resolved payload as a `datasets` image, for a data file: {"bytes": ..., "path": ...}, one of them None.

    Raises:
        DataError: naming `where`: a PIL image that cannot be read.
    """
    if isinstance(payload, str):
        return {"bytes": None, "path": payload}
    if not isinstance(payload, bytes):
        content = io.BytesIO()
        open_image(payload, where).save(content, "PNG")
        payload = content.getvalue()
    return {"bytes": payload, "path": None}


def named(where: str, index: int, count: int) -> str:
    """What image `index` of a row is called in an error; counted from 1."""
    return f"{where}, image {index + 1} of {count}"


def content_hash(payload: Any, where: str) -> str:
    """16 hex digits that depend on the payload's content, not on where it lies.

    Raises:
        DataError: naming `where`: it cannot be read, or `open_image` refuses it.
    """
    digest = hashlib.sha256()
    try:
        if isinstance(payload, bytes):
            digest.update(payload)
        elif isinstance(payload, str):
            with open(payload, "rb") as file:
                digest = hashlib.file_digest(file, "sha256")
        else:  # what is seen of it: the same indices under another palette, or pixels turned by EXIF, are another picture
            image = open_image(payload, where)
            digest.update(f"{image.size}".encode())
            digest.update(image.tobytes())
    except _BROKEN as error:
        raise _unreadable(error, where) from None
    return digest.hexdigest()[:16]


def _opened(payload: Any, where: str) -> Image:
    """The image with its header read."""
    from PIL import Image

    if isinstance(payload, Image.Image):
        return payload
    if isinstance(payload, bytes) and not payload:
        raise DataError(where, "is empty (0 bytes)", "give the bytes of an image file, or drop the row")
    return Image.open(io.BytesIO(payload) if isinstance(payload, bytes) else payload, formats=_FORMATS)


def _check_size(image: Image, where: str) -> None:
    width, height = image.size
    if width * height == 0:
        raise DataError(where, f"has no pixels ({width} x {height})", "drop the row")
    if width * height > MAX_PIXELS:
        raise DataError(where, f"has {width} x {height} pixels, more than {MAX_PIXELS:,}", "scale it down")


def _rgb(image: Image, where: str) -> Image:
    from PIL import Image

    if image.mode == "F":
        raise DataError(where, "has floating-point pixels", "save it with 8 or 16 bits per channel")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(where, "has 32-bit pixels beyond the range of 16 bits", "save it with 8 or 16 bits per channel")
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _encoded(payload: Any, encoder: ImageEncoder, where: str) -> ImagePatches:
    image = open_image(payload, where)
    try:
        return encoder.encode(image)
    except ValueError as error:
        raise DataError(where, f"{image.width} x {image.height} pixels: {error}", "change or drop the image") from None


def _plain(pixels: np.ndarray, grid: tuple[int, int], num_tokens: int) -> ImagePatches:
    return ImagePatches(pixels=pixels, grid=grid, num_tokens=num_tokens)


def _unreadable(error: Exception, where: str) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(where, f"cannot be read as an image ({reason})", f"use one of {', '.join(_FORMATS)}, whole")


class _PatchCache:
    """Patches by encoder and content of the image; the least recently used are dropped once they take more than `capacity` bytes."""

    def __init__(self, capacity: int) -> None:
        self._capacity, self._bytes = capacity, 0
        self._held: OrderedDict[tuple[int, str], tuple[ImageEncoder, ImagePatches]] = OrderedDict()

    def get(self, encoder: ImageEncoder, key: str) -> ImagePatches | None:
        place = id(encoder), key
        if place not in self._held:
            return None
        self._held.move_to_end(place)
        return self._held[place][1]

    def put(self, encoder: ImageEncoder, key: str, patches: ImagePatches) -> None:
        self._held[id(encoder), key] = encoder, patches  # holding the encoder keeps its id from being used again
        self._bytes += patches.pixels.nbytes
        while self._bytes > self._capacity:
            self._bytes -= self._held.popitem(last=False)[1][1].pixels.nbytes


_CACHE = _PatchCache(CACHED_BYTES)
