"""What the processes of a sandbox use together, and killing them: from `/proc`, since the kernel limits each one by itself.

Owns looking and killing; limits are `rewards.sandbox`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PAGE, TICKS = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process and its descendants use: processes and threads, CPU seconds (of ended children too), resident bytes."""

    processes: int
    seconds: float
    memory: int


def descendants(pid: int) -> Iterator[int]:
    """All processes that `pid` started, directly or not; in a pid namespace none can leave this tree."""
    for task in _tasks(pid):
        with suppress(OSError):
            for child in map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split()):
                yield child
                yield from descendants(child)


def _tasks(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []


def usage(pid: int) -> Usage:
    """What `pid` and its descendants use now."""
    processes = ticks = pages = 0
    for each in (pid, *descendants(pid)):
        with suppress(OSError, IndexError, ValueError):
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))
            processes += int(fields[17])
            pages += int(fields[21])
    return Usage(processes, ticks / TICKS, pages * PAGE)


def kill_tree(pid: int) -> None:
    """Kill what `pid` started, from the top: it sees its child end and ends itself."""
    children = list(descendants(pid))
    for each in children or [pid]:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(each, signal.SIGKILL)


def kill_user(uid: int) -> None:
    """Kill every process of a user until there are none; for a user id that only a sandbox has."""
    for _ in range(200):
        found = False
        for folder in Path("/proc").iterdir():
            with suppress(OSError):
                if folder.name.isdigit() and folder.stat().st_uid == uid and _alive(folder):
                    found = True
                    os.kill(int(folder.name), signal.SIGKILL)
        if not found:
            return
        time.sleep(0.01)


def _alive(folder: Path) -> bool:
    return (folder / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
