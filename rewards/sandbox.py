"""Running a program that nobody trusts: shut in, limited, and gone afterwards.

Owns a run: the private folder, feeding and reading the pipes, limits that the kernel does not keep by itself, and killing. How
it is shut in is `rewards.sandbox_tiers`; languages are `rewards.sandbox_languages`.
"""

from __future__ import annotations

import os
import selectors
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from bregman.errors import RewardError
from rewards.sandbox_seccomp import seccomp_filter
from rewards.sandbox_tiers import INSTALL, SEARCH, STARTED, TIERS, Limits, Way, available, box_path, command, new_uid
from rewards.sandbox_watch import kill_tree, kill_user, usage

ENVIRONMENT = {"PATH": SEARCH, "HOME": "/tmp", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""All that a program sees of environment variables."""

PREFIX, STALE_SECONDS = "bregman_sandbox_", 3600
"""Of the folders of runs: their names, and the age at which one must have been left by a killed process."""

TICK_SECONDS = 0.025
"""How often processes, their memory and CPU time are counted."""

STDERR_BYTES = 16 * 1024
"""Kept of what a program prints to stderr; what it prints there counts as output all the same."""

Isolation = Literal["required", "best_effort"]


class SandboxError(RewardError):
    """The sandbox could not be started: says nothing about the program."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended.

    Attributes:
        stdout: what it printed, at most `Limits.output_kib`.
        stderr: the beginning of what it printed there.
        exit_code: as a shell gives it, 128 + number for a signal.
        limit: which limit it hit (`cpu time`, `wall time`, `memory`, `processes`, `output`), else empty.
        seconds: from start to end, the sandbox included.
    """

    stdout: bytes
    stderr: str
    exit_code: int
    limit: str
    seconds: float

    @property
    def ok(self) -> bool:
        return self.exit_code == 0 and not self.limit


def choose(isolation: Isolation) -> Way:
    """The strongest way this machine has.

    Raises:
        RewardError: none, or, where isolation is required, none with namespaces.
    """
    found = {tier: available(tier) for tier in TIERS}
    for tier, (way, _) in found.items():
        if way is not None and (tier != "rlimits" or isolation == "best_effort"):
            return way
    reasons = ", ".join(f"{tier}: {why}" for tier, (way, why) in found.items() if way is None)
    fix = INSTALL
    if found["rlimits"][0] is not None:
        fix += "; `isolation: best_effort` runs programs with resource limits alone, able to read your files and use the network"
    raise RewardError("sandbox", f"no isolation on this machine ({reasons})", fix)


@lru_cache
def isolation() -> str:
    """One line: the isolation in force on this machine, for people."""
    found = {tier: available(tier) for tier in TIERS}
    tier, way = next(((tier, way) for tier, (way, _) in found.items() if way is not None), ("", None))
    if way is None:
        return f"none: code rewards cannot run here; {INSTALL}"
    user = "a user id of its own" if way.drops_user else "the caller's user id"
    if tier == "rlimits":
        return f"rlimits (WEAK: no namespaces, {user}; files can be read and sockets opened; {INSTALL})"
    version = subprocess.run(
        ["bwrap" if tier == "bubblewrap" else "unshare", "--version"], capture_output=True, text=True, timeout=10, check=False
    ).stdout.strip()
    user_space = "" if way.drops_user else "user, "
    calls = "a system call filter" if tier == "bubblewrap" and seccomp_filter() else "no system call filter"
    return f"{tier} ({version}; {user_space}mount, pid, network, ipc and uts namespaces, no capabilities, {user}, {calls})"


def run_in(
    way: Way,
    program: Callable[[Path], Sequence[str]],
    files: Mapping[str, bytes],
    stdin: bytes,
    limits: Limits,
) -> Result:
    """Run a program shut in the given way; whatever it started is gone on return.

    Args:
        program: its command, from the folder in which it sees `files`; its working folder is another one, empty and its own.
        files: read-only for it, executable.
        stdin: all it can read.

    Raises:
        SandboxError: it was not started.
    """
    _sweep(Path(tempfile.gettempdir()))
    outside = Path(tempfile.mkdtemp(prefix=PREFIX))  # mode 0700: nobody else reads what is in it
    try:
        uid = new_uid()
        box, root, work = (outside / name for name in ("box", "root", "work"))
        for folder in (box, root, work):
            folder.mkdir()
            folder.chmod(0o755)
        for name, content in files.items():
            (box / name).write_bytes(content)
            (box / name).chmod(0o755)
        if way.tier == "rlimits" and way.drops_user:
            os.chown(work, uid, uid)
            outside.chmod(0o711)
        seccomp = _filter_file() if way.tier == "bubblewrap" else None
        words = command(way, program(box_path(way, box)), box, root, limits, uid, seccomp)
        try:
            run = _Run(way, words, work, uid, limits, stdin, () if seccomp is None else (seccomp,))
        finally:
            if seccomp is not None:
                os.close(seccomp)
        return run.finish()
    finally:
        shutil.rmtree(outside, ignore_errors=True)


def _filter_file() -> int | None:
    """A descriptor that bubblewrap reads the system call filter from; None where there is no filter."""
    if (content := seccomp_filter()) is None:
        return None
    file = os.memfd_create("seccomp")
    os.write(file, content)
    os.lseek(file, 0, os.SEEK_SET)
    return file


@lru_cache
def _sweep(folder: Path) -> None:
    """Remove what runs left behind whose process was killed; once for each process."""
    for left in folder.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if left.stat().st_uid == os.geteuid() and time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


class _Run:
    """One started program, its pipes and its limits."""

    def __init__(self, way: Way, words: Sequence[str], work: Path, uid: int, limits: Limits, stdin: bytes, pass_fds: Sequence[int]) -> None:
        self._way, self._uid, self._limits, self._left = way, uid, limits, memoryview(stdin)
        self._started = time.monotonic()
        self._out, self._error, self._errors_seen, self._limit = bytearray(), bytearray(), 0, ""
        # In our process group, so that it ends with it, except where the program itself could then signal that group.
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT | ({"HOME": str(work)} if way.tier == "rlimits" else {}),
            cwd=work,
            pass_fds=pass_fds,
            start_new_session=way.tier == "rlimits",
        )

    def finish(self) -> Result:
        process = self._process
        assert process.stdin and process.stdout and process.stderr
        try:
            with selectors.DefaultSelector() as waiting:
                for pipe in (process.stdin, process.stdout, process.stderr):
                    os.set_blocking(pipe.fileno(), False)
                waiting.register(process.stdin, selectors.EVENT_WRITE, self._write)
                waiting.register(process.stdout, selectors.EVENT_READ, self._read)
                waiting.register(process.stderr, selectors.EVENT_READ, self._read_error)
                self._serve(waiting)
        finally:
            self._kill()
            for pipe in (process.stdin, process.stdout, process.stderr):
                with suppress(OSError):
                    pipe.close()
        code = process.returncode if process.returncode >= 0 else 128 - process.returncode
        text = self._error.decode(errors="replace")
        if not self._out.startswith(STARTED):
            if self._limit:  # the machine was too busy to start it in time
                text = f"not started within its {self._limit} limit: {text}"
            raise SandboxError("sandbox", f"{self._way.tier} did not start: {text.strip()[-200:] or f'exit code {code}'}")
        seconds = time.monotonic() - self._started
        return Result(bytes(self._out[len(STARTED) :]), text, code, self._limit or _limit_of(code, text), seconds)

    def _serve(self, waiting: selectors.BaseSelector) -> None:
        """Until the program ends or hits a limit."""
        deadline = self._started + self._limits.wall_seconds
        tick = self._started + TICK_SECONDS
        ended = False
        while not self._limit:
            now = time.monotonic()
            if now >= deadline:
                self._limit = "wall time"
                return
            ready = waiting.select(max(0.0, min(tick, deadline) - now))
            for key, _ in ready:
                if not key.data(key.fileobj):
                    waiting.unregister(key.fileobj)
            if ended and not ready:
                return  # read to the end, or a process that it left behind holds the pipe open
            reading = any(key.events & selectors.EVENT_READ for key in waiting.get_map().values())
            if not reading or time.monotonic() >= tick:
                if not reading:
                    with suppress(subprocess.TimeoutExpired):
                        self._process.wait(TICK_SECONDS)
                tick = time.monotonic() + TICK_SECONDS
                ended = self._process.poll() is not None
                if ended and not reading:
                    return
                self._count()

    def _count(self) -> None:
        used = usage(self._process.pid)
        if used.seconds > self._limits.cpu_seconds:
            self._limit = "cpu time"
        elif used.memory > self._limits.memory_mib * 2**20:
            self._limit = "memory"
        elif used.processes > 2 * self._limits.processes + 8:  # the kernel's own limit comes first where it has one
            self._limit = "processes"

    def _write(self, pipe: object) -> bool:
        with suppress(BlockingIOError):
            try:
                self._left = self._left[os.write(self._process.stdin.fileno(), self._left[: 1 << 16]) :]  # type: ignore[union-attr]
            except BrokenPipeError:
                self._left = self._left[len(self._left) :]
        if not self._left:
            self._process.stdin.close()  # type: ignore[union-attr]
        return bool(self._left)

    def _read(self, pipe: object) -> bool:
        data = os.read(self._process.stdout.fileno(), 1 << 16)  # type: ignore[union-attr]
        self._out += data
        most = self._limits.output_kib * 1024 + len(STARTED)
        if len(self._out) > most:
            del self._out[most:]
            self._limit = "output"
        return bool(data)

    def _read_error(self, pipe: object) -> bool:
        data = os.read(self._process.stderr.fileno(), 1 << 16)  # type: ignore[union-attr]
        self._errors_seen += len(data)
        if len(self._error) < STDERR_BYTES:
            self._error += data
        if self._errors_seen > self._limits.output_kib * 1024 + STDERR_BYTES:
            self._limit = "output"
        return bool(data)

    def _kill(self) -> None:
        """End it with all it started; on return nothing of it is left."""
        if self._way.tier == "rlimits":
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            if self._way.drops_user:
                kill_user(self._uid)
        elif self._process.poll() is None:
            kill_tree(self._process.pid)  # its first process takes the whole pid namespace along
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout=5)


def _limit_of(code: int, stderr: str) -> str:
    """The limit that a program hit without our doing, from how it ended."""
    last = stderr.strip().rpartition("\n")[2] if code else ""
    if code == 128 + signal.SIGXCPU:
        return "cpu time"
    if code == 128 + signal.SIGXFSZ or "File too large" in last or "No space left on device" in last:
        return "files"
    if last.startswith("MemoryError") or "std::bad_alloc" in stderr:
        return "memory"
    if "Resource temporarily unavailable" in last or "can't start new thread" in last:
        return "processes"
    return ""
