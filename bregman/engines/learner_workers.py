"""The learner as Ray actors, one per rank: implements `bregman.protocols.Learner` for the loops.

Owns starting the ranks, spreading micro-batches over them and waiting for them. What a rank computes is in `fsdp2_learner`,
which only the actors import.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from bregman.engines import cluster
from bregman.engines.config import ClusterConfig, LearnerConfig, ModelTraining, OptimizerConfig
from bregman.errors import ClusterError, UserError
from bregman.protocols import LossFunction, MiniBatch
from bregman.types import PackedBatch, StepStats

if TYPE_CHECKING:
    from bregman.engines.weight_sync import WeightHandle

CPUS_PER_RANK = 0.1
"""Of Ray's slots on this machine: learner and engines mostly take turns, and threads, not slots, guard the cores."""
GRACE_SECONDS = 5.0
"""How long the other ranks may take to say why they failed, when one reports that a collective broke."""


class LearnerWorkers:
    """Starts one actor per rank and returns at once; any call waits for them."""

    def __init__(self, learner: LearnerConfig, config: ClusterConfig) -> None:
        if config.learner_workers % learner.context_parallel:
            raise ValueError(f"{config.learner_workers} ranks cannot be divided into groups of {learner.context_parallel}")
        self._config, self._context = config, learner.context_parallel
        self._actors = [_start_actor(learner, config, rank) for rank in range(config.learner_workers)]
        address = self._actors[0].serve.remote()
        self._started = [actor.join.remote(address) for actor in self._actors]

    @classmethod
    def start(cls, learner: LearnerConfig, config: ClusterConfig) -> LearnerWorkers:
        """Start the ranks on a running Ray; `ready` waits for them."""
        return cls(learner, config)

    def ready(self) -> None:
        """Wait until every rank is up.

        Raises:
            ClusterError: one did not come up within `cluster.start_timeout`.
        """
        if self._started:
            started, self._started = self._started, []
            self._node = self._gather(started, "start", self._config.start_timeout)[0]

    @property
    def num_ranks(self) -> int:
        """Groups of ranks with micro-batches of their own: all ranks, unless `learner.context_parallel` of them share theirs."""
        return len(self._actors) // self._context

    def begin_stage(
        self, model: Path, optimizer: OptimizerConfig, *, training: ModelTraining | None = None, keep_fixed_reference: bool = False
    ) -> None:
        """Load `model` (an HF folder) and a fresh optimizer; keep a frozen copy of it for KL if asked.

        Raises:
            DataError: the folder is no model that can be trained here.
        """
        self._all("begin_stage", model.absolute(), optimizer, training=training, keep_fixed_reference=keep_fixed_reference)

    def begin_iteration(self, minibatches: Sequence[MiniBatch], *, reset_optimizer: bool = True) -> list[MiniBatch]:
        """Reset the optimizer if asked and return the batches with `reference_logprobs` (and `fixed_logprobs`) filled in."""
        for minibatch in minibatches:
            self._check(minibatch)
        answers = self._each(
            "begin_iteration",
            [([self._share(minibatch, rank) for minibatch in minibatches],) for rank in range(len(self._actors))],
            reset_optimizer=reset_optimizer,
        )[:: self._context]
        return [
            [
                _with_logprobs(batch, answers[position % self.num_ranks][index][position // self.num_ranks])
                for position, batch in enumerate(minibatch)
            ]
            for index, minibatch in enumerate(minibatches)
        ]

    def step(self, minibatch: MiniBatch, loss: LossFunction, learning_rate: float) -> StepStats:
        """One optimizer step over all micro-batches of `minibatch`, whose number is a multiple of `num_ranks`.

        Raises:
            UserError: loss or gradient is not finite; the weights are as before.
        """
        self._check(minibatch)
        return self._each("step", [(self._share(minibatch, rank), loss, learning_rate) for rank in range(len(self._actors))])[0]

    def save_checkpoint(self, folder: Path) -> None:
        """Write weights, optimizer and RNG states into `folder`, which exists and which every rank can see."""
        self._all("save_checkpoint", folder.absolute())

    def load_checkpoint(self, folder: Path) -> None:
        """Restore what `save_checkpoint` wrote, at any number of ranks; `begin_stage` comes first."""
        self._all("load_checkpoint", folder.absolute())

    def export(self, folder: Path) -> None:
        """Write the model in Hugging Face format (written aside, then renamed)."""
        self._all("export", folder.absolute())

    def publish_weights(self, engine_dtype: str | None = None) -> WeightHandle:
        """Write all weights where rollout engines on the node of rank 0 can read them; valid until the next call.

        Args:
            engine_dtype: of the engines, in which matrices are sent; None sends float32.

        Raises:
            ClusterError: there is no room for them.
        """
        return replace(self._all("publish_weights", engine_dtype)[0], node=self._node)

    def close(self) -> None:
        """End the actors and remove published weights; calling it again does nothing."""
        actors, self._actors = self._actors, []
        closed = [actor.close.remote() for actor in actors]
        if closed:
            ray.wait(closed, num_returns=len(closed), timeout=GRACE_SECONDS)
        for actor in actors:
            ray.kill(actor)

    def _check(self, minibatch: MiniBatch) -> None:
        if not minibatch or len(minibatch) % self.num_ranks:
            raise ValueError(f"{len(minibatch)} micro-batches cannot be spread over {self.num_ranks} ranks; pack with num_ranks")

    def _share(self, minibatch: MiniBatch, rank: int) -> list[PackedBatch]:
        return list(minibatch)[rank // self._context :: self.num_ranks]

    def _all(self, method: str, *arguments: Any, **options: Any) -> list[Any]:
        return self._each(method, [arguments] * len(self._actors), **options)

    def _each(self, method: str, arguments: Sequence[tuple[Any, ...]], **options: Any) -> list[Any]:
        """Call `method` on every rank with its own arguments; the results by rank."""
        self.ready()
        refs = [actor.call.remote(method, *own, **options) for actor, own in zip(self._actors, arguments, strict=True)]
        return self._gather(refs, method, self._config.step_timeout)

    def _gather(self, refs: list[Any], what: str, timeout: float) -> list[Any]:
        """Results by rank. Taken as they come: a rank that fails leaves the others waiting for it in a collective."""
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        pending = dict(zip(refs, range(len(refs)), strict=True))
        while pending:
            done, _ = ray.wait(list(pending), timeout=max(deadline - time.monotonic(), 0))
            if not done:
                ranks = ", ".join(str(rank) for rank in pending.values())
                fix = f"raise cluster.step_timeout, or look at the logs in {cluster.log_folder()}"
                raise ClusterError(f"learner rank {ranks}: {what}", f"no answer after {timeout:.0f} s", fix)
            rank = pending.pop(done[0])
            try:
                results[rank] = _result(done[0], rank, what)
            except UserError:
                raise
            except Exception:
                _raise_clearer(pending, what)
                raise
        return [results[rank] for rank in range(len(refs))]


def _result(ref: Any, rank: int, what: str) -> Any:
    return cluster.wait([ref], what=f"learner rank {rank}: {what}", timeout=GRACE_SECONDS)[0]


def _raise_clearer(pending: dict[Any, int], what: str) -> None:
    """Raise the user error of another rank, if one comes soon: it is the cause, a broken collective here the consequence."""
    done, _ = ray.wait(list(pending), num_returns=len(pending), timeout=GRACE_SECONDS) if pending else ([], [])
    for ref in done:
        try:
            _result(ref, pending[ref], what)
        except UserError:
            raise
        except Exception:
            continue  # another consequence of the same failure


def _with_logprobs(batch: PackedBatch, logprobs: tuple[Any, Any]) -> PackedBatch:
    return replace(batch, reference_logprobs=logprobs[0], fixed_logprobs=logprobs[1])


def _start_actor(learner: LearnerConfig, config: ClusterConfig, rank: int) -> Any:
    gpus = config.gpus_per_learner_worker
    options: dict[str, Any] = {"num_cpus": CPUS_PER_RANK if config.address == "local" else learner.threads, "num_gpus": gpus}
    if learner.threads != 1:  # `cluster.start` sets one thread for every worker
        options["runtime_env"] = {"env_vars": {"OMP_NUM_THREADS": str(learner.threads)}}
    actor = ray.remote(_LearnerActor).options(**options)
    return actor.remote(learner, rank, config.learner_workers, gpus > 0, local=config.address == "local", timeout=config.step_timeout)


class _LearnerActor:
    """One rank in its own process. Imports of torch and transformers happen here, not in the driver."""

    def __init__(self, config: LearnerConfig, rank: int, world_size: int, on_gpu: bool, *, local: bool, timeout: float) -> None:
        import torch

        torch.set_num_threads(config.threads)
        self._config, self._rank, self._world_size, self._local = config, rank, world_size, local
        self._device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
        self._timeout = timedelta(seconds=timeout)
        self._store: Any = None

    def serve(self) -> tuple[str, int]:
        """Rank 0: open the rendezvous on a port that the system chooses, so that no port can be taken; its address."""
        import torch.distributed as dist

        host = "127.0.0.1" if self._local else ray.util.get_node_ip_address()
        self._store = dist.TCPStore(host, 0, self._world_size, is_master=True, wait_for_workers=False, timeout=self._timeout)
        return host, self._store.port

    def join(self, address: tuple[str, int]) -> str:
        """Connect the ranks, and import what a stage needs; Ray's id of the node."""
        import os

        import torch
        import torch.distributed as dist

        if self._local:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if self._store is None:
            self._store = dist.TCPStore(*address, self._world_size, is_master=False, timeout=self._timeout)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        backend = "cpu:gloo,cuda:nccl" if self._device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=self._store, rank=self._rank, world_size=self._world_size, timeout=self._timeout)
        from bregman.models.loading import hide_cuda_builds

        hide_cuda_builds()
        from transformers.utils import logging

        from bregman.engines.fsdp2_learner import FSDP2Learner

        logging.disable_progress_bar()
        self._learner = FSDP2Learner(self._config, rank=self._rank, world_size=self._world_size, device=self._device)
        return ray.get_runtime_context().get_node_id()

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        bound: Callable[..., Any] = getattr(self._learner, method)
        return bound(*arguments, **options)

    def close(self) -> None:
        learner = getattr(self, "_learner", None)
        if learner is not None:
            learner.close()
