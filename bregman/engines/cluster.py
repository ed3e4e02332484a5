"""Ray at the edge: starting or joining a cluster, actor options, and waiting with a deadline and a name.

Owns everything Ray needs that is not specific to one kind of worker. The workers live in `rollout_workers`, `learner_workers`
and `reward_workers`.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.services import find_gcs_addresses
from ray._private.utils import read_ray_address

from bregman.engines.config import ClusterConfig
from bregman.errors import ClusterError, UserError

PROJECT_ROOT = Path(__file__).resolve().parents[2]

WORKER_ENV: Mapping[str, str] = {
    # One thread per worker process unless a worker says otherwise: oversubscribed OpenMP threads fall to a tenth of the speed.
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONDONTWRITEBYTECODE": "",  # torch and vLLM are thousands of modules: compile them once per machine, not per process
}


def start(config: ClusterConfig) -> None:
    """Start a Ray on this machine (`local`) or join a running one.

    Raises:
        ClusterError: no cluster answers at `config.address`.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # an actor without GPUs keeps CUDA_VISIBLE_DEVICES as it is
    path = os.pathsep.join(p for p in (str(PROJECT_ROOT), os.environ.get("PYTHONPATH", "")) if p)
    options: dict[str, Any] = {
        "runtime_env": {"env_vars": {**WORKER_ENV, "PYTHONPATH": path}},
        "logging_level": logging.ERROR,
        "log_to_driver": False,
        "configure_logging": False,
    }
    if config.address == "local":
        workers = config.learner_workers + config.rollout_workers + config.reward_workers
        options |= {
            "num_cpus": max(os.cpu_count() or 1, workers),  # workers mostly take turns; threads, not slots, guard the cores
            "include_dashboard": False,
            "object_store_memory": 256 * 2**20,
            # Every worker here has an environment of its own, so workers started in advance would never be used.
            "_system_config": {"prestart_worker_first_driver": False, "enable_worker_prestart": False},
        }
        _listen_on_loopback_only()
        # Its one message here: that token authentication is on, which is what we want.
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    try:
        _require_answer(config.address)
        ray.init(address=config.address, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ClusterError(
            f"cluster.address ({config.address})",
            f"no Ray cluster could be started or joined ({_first_line(error)})",
            "use `local`, or start one with `ray start --head` and give its address",
        ) from error


def _require_answer(address: str) -> None:
    """Fail at once where nothing listens at `address`; Ray itself would try for minutes.

    Raises:
        OSError: no connection within 10 s.
    """
    if address == "local":
        return
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or read_ray_address() or next(iter(find_gcs_addresses()), "")
        if address.startswith("127."):  # a local cluster like ours, which answers on loopback only
            _listen_on_loopback_only()
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _listen_on_loopback_only() -> None:
    """Ray binds every server to the address it finds for its node; its single-machine mode takes 127.0.0.1 for that."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # for Ray's own processes
    ray_constants.ENABLE_RAY_CLUSTER = False  # for this one, which has read the variable already


def stop() -> None:
    """Leave the cluster, ending it if this process started it."""
    if ray.is_initialized():
        ray.shutdown()


def wait(refs: Sequence[Any], *, what: str, timeout: float, setting: str = "cluster.step_timeout") -> list[Any]:
    """The results of `refs`, in order.

    Args:
        what: names the wait in the error, e.g. `rollout worker 0: generate`.
        timeout: seconds for all of them together.
        setting: the key of the recipe that is the deadline.

    Raises:
        UserError: as raised inside the worker.
        ClusterError: the deadline passed, or a worker died.
    """
    started = time.monotonic()
    try:
        return ray.get(list(refs), timeout=timeout)
    except ray.exceptions.GetTimeoutError:
        waited = f"no answer after {time.monotonic() - started:.0f} s"
        raise ClusterError(what, waited, f"raise {setting}, or look at the worker's log in {log_folder()}") from None
    except ray.exceptions.RayTaskError as error:
        cause = _user_error_in(error)
        if cause is not None:
            raise cause from None
        raise
    except ray.exceptions.RayActorError as error:
        died = f"the worker died ({_first_line(error)})"
        raise ClusterError(what, died, f"its log is in {log_folder()}; the same command resumes the run") from error


def run_alone(function: Callable[..., Any], *arguments: Any, what: str, timeout: float, gpus: float = 0, **options: Any) -> Any:
    """Call `function` once in a process of its own, which ends with it.

    Args:
        what: names the wait in errors.
        timeout: seconds; then the process is killed.
        gpus: that the process sees.

    Raises:
        UserError: as raised inside; ClusterError: the deadline passed, or the process died.
    """
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_calls=1, max_retries=0)(function).remote(*arguments, **options)
    try:
        return wait([task], what=what, timeout=timeout, setting="the stage's timeout")[0]
    except ray.exceptions.WorkerCrashedError as error:
        raise ClusterError(what, "its process died", f"its log is in {log_folder()}; the same command resumes the run") from error
    finally:
        if not ray.wait([task], timeout=0)[0]:  # cancelling a task that has just ended can crash Ray's driver
            ray.cancel(task, force=True)


def log_folder() -> str:
    """Where Ray keeps the output of the workers."""
    try:
        return str(ray._private.worker._global_node.get_logs_dir_path())  # type: ignore[union-attr,attr-defined]
    except AttributeError:
        return "the logs of the Ray session"


def say(text: str) -> None:
    """A line in the worker's own log."""
    print(text, file=sys.stderr, flush=True)


def _user_error_in(error: BaseException) -> UserError | None:
    """The user error that a worker raised, however deep Ray wrapped it."""
    seen: BaseException | None = error
    while isinstance(seen, ray.exceptions.RayTaskError):  # Ray's wrapper also passes for the class that it wraps
        seen = seen.cause
    return seen if isinstance(seen, UserError) else None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
