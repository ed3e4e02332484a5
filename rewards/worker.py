"""The process that runs one reward function: what happens on the far side of the pipe.

Owns start-up, limits and the answer loop; started and killed by `rewards.process`. Requests are pickles from our own parent;
answers are JSON, so that nothing a plugin returns is unpickled outside its process.
"""

from __future__ import annotations

import asyncio
import fcntl
import inspect
import json
import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bregman.errors import RewardError
from rewards.call import BadResult, Failure, Outcome, Parameters, call_reward, parameters_of
from rewards.loader import describe, load
from rewards.sample import call_each, is_single_sample, sample_parameters


def main() -> None:
    """Entry point; the arguments are two file descriptors: the channel to the parent and the read end of its lifeline."""
    channel_fd, lifeline_fd = int(sys.argv[1]), int(sys.argv[2])
    for fd in (channel_fd, lifeline_fd):
        os.set_inheritable(fd, False)
    _die_with_parent(lifeline_fd)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # when memory runs out, this process goes and not the run
    channel = Connection(channel_fd)
    request = pickle.loads(channel.recv_bytes())
    _limit_memory(request["memory_gib"])
    loop = asyncio.new_event_loop()
    try:
        function, parameters = _load(request["function"], Path(request["base_folder"]), request["args"])
    except RewardError as error:
        _send(channel, {"error": error.args})
        return
    except Exception as error:
        _send(channel, {"error": (f"reward `{request['function']}`", f"loading it failed: {describe(error)}", "")})
        return
    _send(channel, {"parameters": asdict(parameters)})
    _serve(channel, function, parameters, request["args"], loop)


def _load(name: str, base_folder: Path, args: Mapping[str, Any]) -> tuple[Callable[..., Any], Parameters]:
    place = name.rpartition(":")[0]
    if place.endswith(".py"):
        sys.path.append(str((base_folder / place).resolve().parent))  # a plugin may import the files beside it
    function = load(name, base_folder)
    if is_single_sample(function):
        return function, sample_parameters(function, args)
    parameters = parameters_of(function, args)
    unknown = [key for key in args if not parameters.accepts(key)]
    if unknown:
        raise RewardError(f"reward `{name}`", f"takes no argument `{unknown[0]}`", f"it takes {', '.join(parameters.names)}")
    prepare = getattr(function, "prepare", None)  # what a function needs and may lack on this machine shows before anything is sampled
    if prepare is not None:
        prepare(**args)
    return function, parameters


def _serve(
    channel: Connection, function: Callable[..., Any], parameters: Parameters, args: Mapping[str, Any], loop: asyncio.AbstractEventLoop
) -> None:
    pid, file = os.getpid(), _file_of(function)
    while True:
        try:
            request = channel.recv_bytes()
        except (EOFError, ConnectionError):
            return
        try:
            samples = pickle.loads(request)
            if is_single_sample(function):
                outcomes = call_each(function, samples, args, file, loop)
            else:
                outcomes = call_reward(function, samples, args, parameters, loop)
            answer: dict[str, Any] = {"outcomes": [_encode(outcome) for outcome in outcomes]}
        except BadResult as error:
            answer = {"failure": str(error)}
        except BaseException as error:  # SystemExit and KeyboardInterrupt of a plugin too
            answer = {"failure": describe(error, file)}
        if os.getpid() != pid:  # the function forked and its child came back here
            os._exit(0)
        _send(channel, answer)


def _encode(outcome: Outcome) -> Any:
    return {"failure": outcome.text} if isinstance(outcome, Failure) else outcome


def _send(channel: Connection, answer: Mapping[str, Any]) -> None:
    channel.send_bytes(json.dumps(answer).encode())


def _file_of(function: Callable[..., Any]) -> str | None:
    try:
        return inspect.getsourcefile(inspect.unwrap(function))
    except (TypeError, ValueError):  # a callable object, or not written in Python
        return inspect.getsourcefile(type(function)) if hasattr(type(function), "__module__") else None


def _die_with_parent(lifeline: int) -> None:
    """Let the kernel kill this process group when the other end of the pipe closes.

    Works however the parent died and whatever runs here: a thread that watches the pipe would never get its turn while, say, a
    regular expression backtracks and holds the interpreter lock.
    """
    if hasattr(fcntl, "F_SETSIG"):  # Linux
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)


def _limit_memory(gib: float | None) -> None:
    """Limit private writable memory: address space would also count what libraries reserve and never touch."""
    if gib is not None and sys.platform == "linux":
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        soft = int(gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


if __name__ == "__main__":
    main()
