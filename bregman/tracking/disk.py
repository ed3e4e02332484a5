"""Writing files so that nothing half-written is ever taken for whole, and a full disk becomes one clear line.

Owns aside-then-rename, whole-line appends and the translation of disk errors. What is written where is `run_folder`'s.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bregman.errors import UserError

ASIDE_SUFFIX = ".part"

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}
# Writers in C++ and in worker processes lose the errno; these are the words of the OS, of Arrow and of torch's zip writer.
_FULL_WORDS = ("no space left on device", "disk quota exceeded")
_FAILED_WRITE_WORDS = ("failed writing", "file write failed", "error writing bytes")
_FREE_BYTES_OF_A_FULL_DISK = 2**20


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise a full, read-only or forbidden disk under `path` as a `UserError`; any other exception passes unchanged."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        problem = _disk_problem(error, path)
        if problem is None:
            raise
        raise problem from error


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields a path beside `path`; what the block writes there takes the place of `path` when the block succeeds.

    Raises:
        UserError: no space, or not writable; `path` is as it was.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}{ASIDE_SUFFIX}")
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield aside
            sync_to_disk(aside)
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        sync_to_disk(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace the text of `path` at once.

    Raises:
        UserError: as `written_aside`.
    """
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Replace `path` by `data` as JSON at once.

    Raises:
        UserError: as `written_aside`.
    """
    write_text(path, json.dumps(data, indent=2) + "\n")


def sync_to_disk(path: Path) -> None:
    """fsync a file or a folder's entries, so that a machine that loses power keeps it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot fsync a folder
            raise
    finally:
        os.close(descriptor)


class AppendFile:
    """Whole lines at the end of a file, handed to the OS at once: a killed process loses none, and a line that met a full disk
    is taken back."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            _cut_half_line(self._descriptor)

    def write_line(self, line: str) -> None:
        """Append `line`, which holds no newline.

        Raises:
            UserError: no space, or not writable; the file is as it was.
        """
        data = line.encode() + b"\n"
        size = os.fstat(self._descriptor).st_size
        with disk_errors(self._path):
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError:
                os.ftruncate(self._descriptor, size)
                raise

    def close(self) -> None:
        os.close(self._descriptor)


def _cut_half_line(descriptor: int) -> None:
    """Drop what a killed process wrote after the last newline."""
    size = os.fstat(descriptor).st_size
    end = size
    while end > 0:
        start = max(0, end - 65536)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(descriptor, end)


def _disk_problem(error: BaseException, path: Path) -> UserError | None:
    number = error.errno if isinstance(error, OSError) else None
    text = str(error).lower()
    free = _free_bytes(path)
    if number in _FULL or any(words in text for words in _FULL_WORDS) or _failed_on_full_disk(text, free):
        left = "" if free is None else f" ({free // 2**20} MiB free)"
        return UserError(str(path), f"no space left at {_existing(path)}{left}", "free some space; the same command resumes the run")
    if number in _FORBIDDEN:
        reason = os.strerror(number).lower() if number else ""
        return UserError(str(path), f"cannot be written ({reason})", "make the folder writable, or choose another output_dir")
    if number in (errno.ENOTDIR, errno.EEXIST):
        return UserError(str(path), "a file is in the way of a folder", "choose another output_dir")
    return None


def _failed_on_full_disk(text: str, free: int | None) -> bool:
    return free is not None and free < _FREE_BYTES_OF_A_FULL_DISK and any(words in text for words in _FAILED_WRITE_WORDS)


def _free_bytes(path: Path) -> int | None:
    try:
        return shutil.disk_usage(_existing(path)).free
    except OSError:
        return None


def _existing(path: Path) -> Path:
    """`path` or its nearest parent that exists."""
    return next((folder for folder in (path, *path.absolute().parents) if folder.exists()), path)
