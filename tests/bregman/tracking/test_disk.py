"""Aside-then-rename, whole-line appends and disk errors as one clear line."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from bregman.errors import UserError
from bregman.tracking.disk import AppendFile, disk_errors, write_json, write_text, written_aside


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left at"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space left at"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "no space left at"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot be written (read-only file system)"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be written (permission denied)"),
        (FileExistsError(errno.EEXIST, "File exists"), "a file is in the way of a folder"),
    ],
)
def test_disk_errors_become_one_line_with_the_path(tmp_path: Path, error: Exception, expected: str) -> None:
    with pytest.raises(UserError) as caught, disk_errors(tmp_path / "metrics.jsonl"):
        raise error
    assert expected in str(caught.value)
    assert str(tmp_path / "metrics.jsonl") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("failed writing file"), KeyError("x"), UserError("here", "found")])
def test_other_errors_pass_unchanged(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, disk_errors(tmp_path):
        raise error
    assert caught.value is error


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_json(path, [1])

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no space left"):
        write_json(path, [2])
    assert json.loads(path.read_text()) == [1]
    assert os.listdir(tmp_path) == ["summary.json"]


def test_an_interrupted_block_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), written_aside(tmp_path / "a") as aside:
        aside.write_text("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_appends_whole_lines_and_cuts_a_half_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"ste')
    file = AppendFile(path)
    file.write_line('{"step": 1}')
    file.close()
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'


def test_a_file_of_one_endless_half_line_is_emptied(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("x" * 200_000)
    AppendFile(path).close()
    assert path.read_text() == ""


def test_an_append_that_meets_a_full_disk_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    file = AppendFile(path)
    file.write_line("first")
    real_write = os.write

    def half_then_full(descriptor: int, data: bytes) -> int:
        if data.startswith(b"second"):
            return real_write(descriptor, data[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", half_then_full)
    with pytest.raises(UserError, match="no space left"):
        file.write_line("second")
    monkeypatch.setattr(os, "write", real_write)
    file.write_line("third")
    assert path.read_text() == "first\nthird\n"


def test_a_really_full_disk(small_disk: Path) -> None:
    lines = AppendFile(small_disk / "metrics.jsonl")
    lines.write_line("kept")
    write_text(small_disk / "report.html", "old")
    with pytest.raises(UserError, match="no space left"):
        write_text(small_disk / "report.html", "x" * 2**21)
    with pytest.raises(UserError, match="free some space"):
        lines.write_line("y" * 2**21)
    lines.write_line("kept too")
    assert (small_disk / "report.html").read_text() == "old"
    assert (small_disk / "metrics.jsonl").read_text() == "kept\nkept too\n"
