"""The layout of a run on disk, who may write to it, and its checkpoints.

Owns paths, the lock, the rule that a folder belongs to one recipe, and how checkpoints appear and go. Writing metrics is `tracker`'s.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from bregman.errors import UserError
from bregman.tracking.disk import ASIDE_SUFFIX, disk_errors, sync_to_disk, write_json, write_text

__all__ = ["RunFolder", "checkpoint", "latest_checkpoint", "write_json"]

_RECIPE, _LOCK = "recipe.resolved.yaml", ".lock"
_MAY_CHANGE = re.compile(
    r"cluster|output_dir|learner\.(tokens_per_micro_batch|activation_checkpointing|threads)"
    r"|engine\.(kv_cache_mib|gpu_memory_utilization|max_num_seqs|max_num_batched_tokens)"
    r"|stages\[\d+\]\.(parity_bound|checkpoint|gate\.(max_extensions|at_least|at_most))"
    r"|stages\[\d+\]\.(.+\.)?rewards\.(on_failure|processes|memory_gib|total_timeout|functions\[\d+\]\.(timeout|load_timeout))"
    r"|stages\[\d+\]\.generator\.(base_url|api_key_env|timeout|retries|backoff|concurrency|max_requests|max_tokens_total)"
)
"""Recipe keys that say where a run happens and when it stops: a run may be moved, resumed with other workers, or go on
after one of its limits was raised. What is already computed stays right."""

_REPLACED = ".replaced-"
_STEP = re.compile(r"step_(\d+)")
_ROLLOUTS = re.compile(r".+_(\d{6,})\.parquet")


class RunFolder:
    """Paths of the run at `path`. Reading needs no lock; a process that runs the recipe takes it with `RunFolder.open`.

    Layout: `recipe.resolved.yaml`, `metrics.jsonl`, `summary.json`, `warnings.log`, `report.html`, `tensorboard/<stage>/`,
    `rollouts/<stage>/<split>_<iteration>.parquet`, `stages/<NN>_<name>/{checkpoints/step_<NNNNNN>,model,done.json}`.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.recipe_file = self.path / _RECIPE
        self.metrics_file = self.path / "metrics.jsonl"
        self.summary_file = self.path / "summary.json"
        self.warnings_file = self.path / "warnings.log"
        self.report_file = self.path / "report.html"
        self._lock: int | None = None

    @classmethod
    def open(cls, path: Path | str, resolved_recipe: Mapping[str, Any], *, fresh: bool = False) -> RunFolder:
        """Make the folder, or go on in one that the same recipe made; this process alone may write to it until `close`.

        Args:
            resolved_recipe: the whole recipe as plain JSON types.
            fresh: move what is there aside (`<path>.old-1`, ...) and start anew.

        Raises:
            UserError: another process is using the folder, it belongs to another recipe or holds something else, or it cannot
                be written.
        """
        folder = cls(path)
        with disk_errors(folder.path):
            folder.path.mkdir(parents=True, exist_ok=True)
            folder._take_lock()
        try:
            if fresh and any(entry.name != _LOCK for entry in folder.path.iterdir()):
                folder.path.rename(_unused_name(folder.path))
                folder.close()
                return cls.open(path, resolved_recipe)
            folder._claim(json.loads(json.dumps(resolved_recipe)))
        except BaseException:
            folder.close()
            raise
        return folder

    def close(self) -> None:
        """Let other processes use the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def stage_folder(self, index: int, name: str) -> Path:
        """Folder of the stage at place `index` of the recipe (from 0): its checkpoints, `model` and `done.json`."""
        return self.path / "stages" / f"{index:02d}_{name}"

    def rollouts_folder(self, stage: str) -> Path:
        return self.path / "rollouts" / stage

    def rollouts_file(self, stage: str, split: str, step: int) -> Path:
        return self.rollouts_folder(stage) / f"{split}_{step:06d}.parquet"

    def tensorboard_folder(self, stage: str) -> Path:
        return self.path / "tensorboard" / stage

    def read_recipe(self) -> dict[str, Any]:
        """The resolved recipe that the folder belongs to; empty if there is none."""
        if not self.recipe_file.exists():
            return {}
        try:
            data = yaml.safe_load(self.recipe_file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            data = None
        if not isinstance(data, dict):
            raise UserError(str(self.recipe_file), "is not the YAML of a recipe", "choose another output_dir, or start over with --fresh")
        return data

    def read_summary(self) -> list[dict[str, Any]]:
        """One row per finished stage, in the recipe's order."""
        if not self.summary_file.exists():
            return []
        order = {stage["name"]: index for index, stage in enumerate(self.read_recipe().get("stages", []))}
        rows = json.loads(self.summary_file.read_text(encoding="utf-8"))
        return sorted(rows, key=lambda row: order.get(row["name"], len(order)))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every row of `metrics.jsonl`; a half-written last line of a running or killed process is left out."""
        if not self.metrics_file.exists():
            return []
        *lines, _half = self.metrics_file.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line]

    def _take_lock(self) -> None:
        descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            fix = "wait for it or end it, or choose another output_dir"
            raise UserError(str(self.path), f"this run folder is in use by {holder}", fix) from None
        except OSError:
            # A file system without flock (some cluster mounts): going on without the guard beats not running at all.
            os.close(descriptor)
            return
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._lock = descriptor

    def _claim(self, recipe: dict[str, Any]) -> None:
        """Make the folder this recipe's, or check that it is."""
        strangers = sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith("."))
        if not self.recipe_file.exists() and strangers:
            raise UserError(str(self.path), f"is not empty and not a run folder (it holds {strangers[0]})", "choose another output_dir")
        held = self.read_recipe()
        if held:
            difference = _first_difference(held, recipe)
            if difference is not None:
                found = f"the folder holds a run of another recipe ({difference})"
                raise UserError(str(self.path), found, "choose another output_dir, or start over with --fresh")
        _remove_half_written(self.path)
        if held != recipe:
            write_text(self.recipe_file, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))


@contextmanager
def checkpoint(stage_folder: Path, step: int, keep: int) -> Iterator[Path]:
    """Yields an empty folder; when the block succeeds it becomes `checkpoints/step_<step>` at once, and only the `keep` newest stay.

    Raises:
        UserError: no space, or not writable; earlier checkpoints are untouched.
    """
    folder = stage_folder / "checkpoints"
    final, aside = folder / f"step_{step:06d}", folder / f".step_{step:06d}{ASIDE_SUFFIX}"
    with disk_errors(folder):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    try:
        with disk_errors(folder):  # judged before the removal below frees the space that tells a full disk
            yield aside
            _sync_tree(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    with disk_errors(folder):
        replaced = folder / f"{_REPLACED}{final.name}"
        if final.exists():
            final.rename(replaced)
        aside.rename(final)
        sync_to_disk(folder)
        shutil.rmtree(replaced, ignore_errors=True)
        for _, old in _checkpoints(folder)[:-keep]:
            _remove(old)


def latest_checkpoint(stage_folder: Path) -> tuple[int, Path] | None:
    """`(step, folder)` of the newest whole checkpoint of a stage, if it has one."""
    found = _checkpoints(stage_folder / "checkpoints")
    return found[-1] if found else None


def step_of_rollouts(path: Path) -> int | None:
    """The iteration whose rollouts the file `path` holds; None for any other file."""
    match = _ROLLOUTS.fullmatch(path.name)
    return int(match[1]) if match else None


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Whole checkpoints, oldest first; one whose replacement was cut off by a kill is put back."""
    if not folder.exists():
        return []
    for replaced in folder.glob(f"{_REPLACED}*"):
        final = folder / replaced.name.removeprefix(_REPLACED)
        if not final.exists():
            replaced.rename(final)
    matches = ((_STEP.fullmatch(entry.name), entry) for entry in folder.iterdir() if entry.is_dir())
    return sorted((int(match[1]), entry) for match, entry in matches if match)


def _remove(folder: Path) -> None:
    """Renamed first: a half-deleted checkpoint must not look like one."""
    deleted = folder.with_name(f".{folder.name}{ASIDE_SUFFIX}")
    shutil.rmtree(deleted, ignore_errors=True)
    folder.rename(deleted)
    shutil.rmtree(deleted, ignore_errors=True)


def _remove_half_written(path: Path) -> None:
    """What a killed process left aside in the places this room writes to."""
    for folder in path.glob("stages/*/checkpoints"):
        _checkpoints(folder)  # puts back what has no replacement; what is still there then has one
    places = [path, *path.glob("rollouts/*"), *path.glob("stages/*"), *path.glob("stages/*/checkpoints")]
    for leftover in [entry for place in places for form in (f".*{ASIDE_SUFFIX}", f"{_REPLACED}*") for entry in place.glob(form)]:
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            sync_to_disk(Path(parent, name))
        sync_to_disk(Path(parent))


def _unused_name(path: Path) -> Path:
    numbered = (path.with_name(f"{path.name}.old-{number}") for number in range(1, 10**6))
    return next(candidate for candidate in numbered if not candidate.exists())


def _first_difference(held: Any, wanted: Any, key: str = "") -> str | None:
    """The first key at which two trees of plain types differ and may not, with both values."""
    if _MAY_CHANGE.fullmatch(key):
        return None
    if isinstance(held, dict) and isinstance(wanted, dict):
        pairs = [(f"{key}.{name}" if key else name, held.get(name, ...), wanted.get(name, ...)) for name in {**held, **wanted}]
    elif isinstance(held, list) and isinstance(wanted, list):
        length = max(len(held), len(wanted))
        padded = [[*each, *[...] * (length - len(each))] for each in (held, wanted)]
        pairs = [(f"{key}[{index}]", padded[0][index], padded[1][index]) for index in range(length)]
    else:
        return None if held == wanted else f"{key}: {_brief(held)} there, {_brief(wanted)} now"
    return next((text for name, a, b in pairs if (text := _first_difference(a, b, name)) is not None), None)


def _brief(value: Any) -> str:
    if value is ...:
        return "not set"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
