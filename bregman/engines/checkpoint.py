"""Checkpoints of a sharded model and its optimizer state, through torch.distributed.checkpoint, and the export to HF format.

Owns what lies in a checkpoint folder. When one is written, and that it is written aside and renamed, is its caller's business.
The metadata of torch's format is a pickle: a checkpoint is resumed by the run that wrote it; what users exchange is an export.
"""

from __future__ import annotations

import contextlib
import pickle
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from bregman.engines.optimizer import ShardedOptimizer
from bregman.errors import DataError


def save(folder: Path, model: nn.Module, optimizer: ShardedOptimizer, *, rank: int) -> None:
    """Write weights, optimizer and RNG states into `folder`, which exists. All ranks call it.

    Raises:
        DataError: no space left, or the folder cannot be written.
    """
    state = _state(model, optimizer, rank)
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, thread_count=1)
    with _explained(folder, "written"):
        dcp.save(state, storage_writer=writer)


def load(folder: Path, model: nn.Module, optimizer: ShardedOptimizer, *, rank: int) -> None:
    """Restore what `save` wrote, at any number of ranks; a rank that did not exist then keeps its RNG state.

    Raises:
        DataError: the folder is not a complete checkpoint of this model.
    """
    reader = dcp.FileSystemReader(folder)
    with _explained(folder, "read"):
        known = reader.read_metadata().state_dict_metadata
        state = {name: tensor for name, tensor in _state(model, optimizer, rank).items() if not name.startswith("rng.") or name in known}
        dcp.load(state, storage_reader=reader)
    optimizer.steps = int(state["optimizer.step"].item())
    if f"rng.{rank}" in state:
        torch.set_rng_state(state[f"rng.{rank}"])


def export(folder: Path, model: Any, weights: Mapping[str, torch.Tensor], source: Path, companions: tuple[str, ...]) -> None:
    """Write `weights` in HF format to `folder`, with the files named in `companions` from `source`; written aside, then renamed.

    Args:
        model: the transformers model whose config and weight names apply.
        weights: full tensors by parameter name, on the CPU.

    Raises:
        DataError: no space left, or the folder cannot be written.
    """
    with _explained(folder, "written"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
        try:
            model.save_pretrained(aside, state_dict=dict(weights))
            for name in companions:
                if (source / name).is_file():
                    shutil.copyfile(source / name, aside / name)
            aside.chmod(0o755)
            _replace(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _replace(aside: Path, folder: Path) -> None:
    """Rename `aside` to `folder`; what was there moves out of the way first and is removed last."""
    if not folder.exists():
        aside.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", suffix=".part", dir=folder.parent))
    folder.rename(old / folder.name)
    aside.rename(folder)
    shutil.rmtree(old)


def _state(model: nn.Module, optimizer: ShardedOptimizer, rank: int) -> dict[str, torch.Tensor]:
    """Flat names, tensors only. Tensors share memory with model and optimizer, so that loading is in place."""
    state: dict[str, torch.Tensor] = {"optimizer.step": torch.tensor(optimizer.steps), f"rng.{rank}": torch.get_rng_state()}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        state[f"weights.{name}"] = parameter.detach()
        for moment, local in optimizer.state(name).items() if parameter.requires_grad else ():
            state[f"optimizer.{moment}.{name}"] = DTensor.from_local(
                local, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
            )
    persistent = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in persistent:  # the router correction bias of a mixture of experts
            state[f"weights.{name}"] = buffer
    return state


@contextlib.contextmanager
def _explained(folder: Path, verb: str) -> Iterator[None]:
    try:
        yield
    except (OSError, CheckpointException, KeyError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        fix = "free some space, or choose another output_dir" if verb == "written" else "resume from an older checkpoint"
        raise DataError(str(folder), f"cannot be {verb} ({reason})", fix) from error
