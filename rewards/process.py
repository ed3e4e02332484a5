"""The near side of one reward process: start, ask under a deadline, kill with everything it started.

Owns a single process. Which samples go where, and what a failure means for them, is `rewards.pool`.

Plain `subprocess` and a pipe of its own for each process, not a pool of `multiprocessing` or pebble: a fresh interpreter does not
import the parent's main module again (Ray's, in an actor), no lock is shared that a killed process could hold, and the whole
process group is killed, with the children that a function left behind.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bregman.errors import RewardError
from rewards.call import Failure, Outcome, Parameters, Sample
from rewards.config import RewardConfig

POLL_SECONDS = 0.05
"""How often a silent process is checked for having died; an answer is taken at once."""


class CallFailed(Exception):
    """A call gave no scores: one line that says what happened, without reward or sample.

    Attributes:
        timed_out: the deadline passed.
    """

    def __init__(self, text: str, *, timed_out: bool = False) -> None:
        super().__init__(text)
        self.timed_out = timed_out


class RewardProcess:
    """A process that holds one reward function. Started at the first use, and again after it died. Not for several threads."""

    def __init__(self, config: RewardConfig, base_folder: Path, memory_gib: float | None) -> None:
        self._config, self._base_folder, self._memory_gib = config, base_folder, memory_gib
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Connection | None = None
        self._lifeline: int | None = None
        self._parameters: Parameters | None = None

    def load(self) -> Parameters:
        """Start the process unless it runs, and import the function.

        Raises:
            RewardError: the function cannot be loaded.
        """
        if self._parameters is not None and self._channel is not None:
            return self._parameters
        where = f"reward `{self._config.function}`"
        request = {
            "function": self._config.function,
            "base_folder": str(self._base_folder),
            "args": self._config.args,
            "memory_gib": self._memory_gib,
        }
        self._start()
        try:
            answer = self._ask(request, self._config.load_timeout)
        except CallFailed as failed:
            fix = "raise its load_timeout" if failed.timed_out else ""
            raise RewardError(where, f"importing it failed: {failed}", fix) from None
        if "error" in answer:
            self.kill()
            raise RewardError(*answer["error"])
        self._parameters = Parameters(**answer["parameters"])
        return self._parameters

    def call(self, samples: Sequence[Sample], timeout: float) -> list[Outcome]:
        """The outcome of every sample from one call of the function.

        Raises:
            CallFailed: the function raised, returned no list of scores, or its process died or was killed at the deadline.
            RewardError: the function cannot be loaded.
        """
        parameters = self.load()
        answer = self._ask([_only_accepted(sample, parameters) for sample in samples], timeout)
        if "failure" in answer:
            raise CallFailed(answer["failure"])
        return [Failure(o["failure"]) if isinstance(o, dict) else o for o in answer["outcomes"]]

    def kill(self) -> None:
        """End the process and whatever it started. Does nothing if it does not run."""
        if self._process is None:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # before it is waited for: until then the kernel keeps its number
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)  # a process in an uninterruptible system call outlives even this
        if self._channel is not None:
            self._channel.close()
        if self._lifeline is not None:
            os.close(self._lifeline)
        self._process = self._channel = self._lifeline = None

    def interrupt(self) -> None:
        """Kill the process from another thread than the one that waits for it, which then gets `CallFailed`."""
        if (process := self._process) is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

    def _start(self) -> None:
        self.kill()
        ours, theirs = socket.socketpair()
        lifeline_read, lifeline = os.pipe()
        code = "from rewards.worker import main; main()"
        folder = self._base_folder if self._base_folder.is_dir() else None
        path = os.pathsep.join(os.path.abspath(p) for p in sys.path)
        try:
            self._process = subprocess.Popen(
                # -P: the recipe's folder is the working folder, and a file there must not stand in for a library
                [sys.executable, "-P", "-c", code, str(theirs.fileno()), str(lifeline_read)],
                pass_fds=[theirs.fileno(), lifeline_read],
                env={"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ, "PYTHONPATH": path},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError:
            ours.close()
            os.close(lifeline)
            raise
        finally:
            theirs.close()
            os.close(lifeline_read)
        self._channel, self._lifeline = Connection(ours.detach()), lifeline

    def _ask(self, request: Any, timeout: float) -> Mapping[str, Any]:
        """Send a request and wait for its answer; whatever goes wrong, the process is gone afterwards."""
        assert self._channel is not None
        deadline = time.monotonic() + timeout
        try:
            _limit_blocking(self._channel, timeout)
            self._channel.send_bytes(pickle.dumps(request))
            while not self._channel.poll(max(0.0, min(POLL_SECONDS, deadline - time.monotonic()))):
                if self._has_ended() and not self._channel.poll(0):
                    raise CallFailed(self._end())
                if time.monotonic() >= deadline:
                    raise CallFailed(f"no answer within {timeout:.1f} s", timed_out=True)
            return json.loads(self._channel.recv_bytes())
        except CallFailed:
            self.kill()
            raise
        except BlockingIOError:  # it stopped in the middle of a message
            self.kill()
            raise CallFailed(f"no answer within {timeout:.1f} s", timed_out=True) from None
        except (EOFError, OSError, ValueError):
            text = self._end()
            self.kill()
            raise CallFailed(text) from None
        except BaseException:  # an interrupt: the answer would be taken for that of the next request
            self.kill()
            raise

    def _has_ended(self) -> bool:
        assert self._process is not None
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _end(self) -> str:
        """How the process ended, in words; waits a moment for a process whose pipe has just closed."""
        assert self._process is not None
        for _ in range(20):
            if (ended := os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                break
            time.sleep(POLL_SECONDS)
        else:
            return "its process closed its channel"
        if ended.si_code == os.CLD_EXITED:
            return f"its process ended with exit code {ended.si_status}"
        hint = ", out of memory?" if ended.si_status == signal.SIGKILL else ""
        return f"its process was killed by signal {ended.si_status} ({signal.Signals(ended.si_status).name}{hint})"


def _limit_blocking(channel: Connection, seconds: float) -> None:
    """No read or write on the channel blocks for longer, even towards a stopped process."""
    whole = int(seconds)
    interval = struct.pack("ll", whole, int((seconds - whole) * 1e6) or (0 if whole else 1))
    with socket.socket(fileno=os.dup(channel.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, interval)
        same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, interval)


def _only_accepted(sample: Sample, parameters: Parameters) -> Sample:
    """Without the columns that the function does not take: they may be images."""
    if parameters.any_keyword:
        return sample
    return replace(sample, columns={key: value for key, value in sample.columns.items() if parameters.accepts(key)})
