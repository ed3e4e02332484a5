"""The weighted average of model folders (k1.5 sec. 2.4: model merging), one tensor in memory at a time.

Owns reading and writing safetensors for it. Which models are merged is the recipe's choice.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from bregman.errors import DataError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Per element, by the data types' names in safetensors."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")
"""Files that hold weights, in whatever format: those of one model have no place beside the average."""


def merge_models(folders: Sequence[Path], weights: Sequence[float], output: Path) -> int:
    """Write sum_i weights_i * model_i to `output`, laid out like the first model and in its data types; averages are taken in
    float64. Everything that is not weights (config, tokenizer, processor) is the first model's. Written aside, then renamed.

    Args:
        folders: at least two models in Hugging Face format with the same tensors.
        weights: one per model; divided by their sum.

    Returns:
        The number of tensors.

    Raises:
        DataError: a folder is no model, or the models differ in a tensor's name or shape, or it cannot be written.
    """
    if len(folders) < 2 or len(folders) != len(weights) or not sum(weights) > 0:
        raise ValueError("merging takes two models or more, with one weight each, whose sum is positive")
    shares = [weight / sum(weights) for weight in weights]
    models = [_Tensors(folder) for folder in folders]
    for other in models[1:]:
        _compare(models[0], other)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".part", dir=output.parent))
        try:
            for file in models[0].files:
                _write(aside / file.name, models, shares, file)
            for companion in folders[0].iterdir():
                if companion.is_file() and companion.suffix not in _WEIGHTS:
                    shutil.copyfile(companion, aside / companion.name)
            aside.chmod(0o755)
            if output.exists():
                shutil.rmtree(output)
            aside.rename(output)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise DataError(str(output), f"cannot be written ({error})", "free some space, or choose another folder") from error
    return len(models[0].place)


class _Tensors:
    """The tensors of a model folder, read one at a time.

    Attributes:
        files: the safetensors files, in order.
        place: which file holds a tensor, by name.
        shapes: shape and data type, as safetensors names it, by name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = self._find()
        self.place: dict[str, Path] = {}
        self.shapes: dict[str, tuple[list[int], str]] = {}
        for file in self.files:
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 - not a dictionary
                        part = opened.get_slice(name)
                        if part.get_dtype() not in BYTES:
                            raise DataError(str(file), f"`{name}` is quantised ({part.get_dtype()})", "merge models in full precision")
                        self.place[name], self.shapes[name] = file, (part.get_shape(), part.get_dtype())
            except (SafetensorError, OSError) as error:
                raise DataError(str(file), f"not a safetensors file ({error})", "export or download it again") from None

    def _find(self) -> list[Path]:
        if (self.folder / INDEX).is_file():
            try:
                named = set(json.loads((self.folder / INDEX).read_text())["weight_map"].values())
            except (ValueError, KeyError, AttributeError, TypeError):
                raise DataError(str(self.folder / INDEX), "not an index of safetensors files", "export or download it again") from None
            return [self.folder / Path(name).name for name in sorted(named)]
        if not (self.folder / SINGLE).is_file():
            raise DataError(str(self.folder), f"no {SINGLE} in it", "merge models in Hugging Face format")
        return [self.folder / SINGLE]

    def read(self, name: str) -> torch.Tensor:
        with safe_open(self.place[name], framework="pt") as opened:
            return opened.get_tensor(name)


def _compare(first: _Tensors, other: _Tensors) -> None:
    for name in sorted(first.shapes.keys() ^ other.shapes.keys()):
        has, lacks = (first, other) if name in first.shapes else (other, first)
        raise DataError(str(lacks.folder), f"has no tensor `{name}`, which {has.folder} has", "merge models of one architecture")
    for name, (shape, _) in first.shapes.items():
        if other.shapes[name][0] != shape:
            found = f"`{name}` has shape {other.shapes[name][0]}, in {first.folder} it has {shape}"
            raise DataError(str(other.folder), found, "merge models of one size")


def _write(path: Path, models: Sequence[_Tensors], shares: Sequence[float], file: Path) -> None:
    """One file of the merged model: safetensors' header, then the tensors one after the other. The format is written by hand since
    the library wants all tensors of a file in memory at once."""
    names = [name for name, place in models[0].place.items() if place == file]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        shape, kind = models[0].shapes[name]
        end = offset + math.prod(shape) * BYTES[kind]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    with path.open("wb") as out:
        _write_header(out, header)
        for name in names:
            out.write(_average(models, shares, name).contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _write_header(out: BinaryIO, header: Mapping[str, Any]) -> None:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    out.write(len(text).to_bytes(8, "little") + text)


def _average(models: Sequence[_Tensors], shares: Sequence[float], name: str) -> torch.Tensor:
    first = models[0].read(name)
    if not first.is_floating_point():
        return first  # counters and tables are no weights
    average = torch.zeros_like(first, dtype=torch.float64)
    for model, share in zip(models, shares, strict=True):
        average.add_(model.read(name).to(torch.float64), alpha=share)
    return average.to(first.dtype)
