"""Rollout workers: vLLM engines in Ray actors, problems in, groups of trajectories out.

Owns how problems become requests (seeds, order, spread over workers), and replacing a worker that died. Sampling itself is in
`vllm_engine`, what weights are and how they travel in `weight_sync`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from bregman.data.chat import decode_response
from bregman.engines import cluster
from bregman.engines.config import ClusterConfig, EngineConfig, SamplingConfig
from bregman.engines.vllm_engine import EAGER_ENV, VLLM_ENV, Generation, GenerationRequest, VLLMEngine, check_fits
from bregman.engines.weight_relay import WeightRelays, node_name
from bregman.engines.weight_sync import WeightHandle, folder_handle
from bregman.errors import ClusterError
from bregman.types import Group, Problem, Segment, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from bregman.protocols import Learner

MAX_REPLACEMENTS = 2  # of one worker within one call


class RolloutWorker:
    """The Ray actor around one VLLMEngine; `start` is a call of its own so that its errors arrive as they were raised."""

    def start(self, model: str, config: EngineConfig, seed: int, tensor_parallel: int) -> tuple[float, str]:
        """Seconds that loading took, and Ray's id of this node."""
        self.engine = VLLMEngine(model, config, seed, tensor_parallel=tensor_parallel)
        return self.engine.start_seconds, ray.get_runtime_context().get_node_id()

    def generate(self, requests: Sequence[GenerationRequest]) -> tuple[list[Generation], float]:
        """The generations, and the seconds they took without the way here and back."""
        started = time.perf_counter()
        return self.engine.generate(requests), time.perf_counter() - started

    def load_weights(self, handle: WeightHandle, version: int) -> dict[str, float]:
        return self.engine.load_weights(handle, version)

    def process_id(self) -> int:
        return os.getpid()


class RolloutWorkers:
    """Implements `protocols.RolloutEngine` over `cluster.rollout_workers` engines. Make one with `start`.

    Attributes:
        version: the policy version last loaded; -1 before the first `load_weights`.
        last_stats: of the last `rollout`: `tokens` sampled, `seconds` in all, `tokens_per_second`, `worker_seconds` of the slowest
            worker inside its engine, `replaced_workers`.
        on_note: called with one line about everything a user should know, e.g. a replaced worker.
    """

    def __init__(
        self,
        model: Path,
        engine: EngineConfig,
        cluster_config: ClusterConfig,
        *,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Sequence[int],
    ) -> None:
        self.model, self.engine, self.cluster = model, engine, cluster_config
        self.tokenizer = tokenizer
        self.stop_token_ids = tuple(stop_token_ids)
        self.version = -1
        self.last_stats: dict[str, float] = {}
        self.on_note: Callable[[str], None] = logging.getLogger(__name__).warning
        self._handle: WeightHandle | None = None
        self._relays = WeightRelays(timeout=cluster_config.step_timeout, on_note=lambda note: self.on_note(note))
        self._workers: list[Any] = []
        self._starting: list[Any] = []
        self._nodes: list[str] = []  # of each worker, once ready

    @classmethod
    def start(
        cls,
        model: Path,
        engine: EngineConfig,
        cluster_config: ClusterConfig,
        *,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Sequence[int],
    ) -> RolloutWorkers:
        """Begin to start all workers and return at once; `ready` waits for them.

        Args:
            model: Hugging Face folder that the engines are built from.
            tokenizer: decodes responses; never encodes.
            stop_token_ids: tokens that end a response.
        """
        workers = cls(model, engine, cluster_config, tokenizer=tokenizer, stop_token_ids=stop_token_ids)
        for _ in range(cluster_config.rollout_workers):
            worker, starting = workers._start_one()
            workers._workers.append(worker)
            workers._starting.append(starting)
        return workers

    def ready(self) -> float:
        """Wait until every engine is up; returns the seconds the slowest took to load.

        Raises:
            ClusterError: one cannot start, or `cluster.start_timeout` passed.
        """
        started = cluster.wait(self._starting, what="rollout workers: start", timeout=self.cluster.start_timeout)
        self._nodes = [node for _, node in started]
        return max(seconds for seconds, _ in started)

    def load_weights(self, source: Learner | Path, version: int) -> dict[str, float]:
        """Take over the weights of a learner, or of a Hugging Face folder, as policy `version`.

        Returns:
            Seconds: `publish` (the learner writes), `relay` (to other nodes), `load` and `caches` (slowest worker), `total`.

        Raises:
            ClusterError: the weights do not fit the engine's model or a node's shared memory, or a worker failed.
            DataError: the folder holds no usable weights.
        """
        if not self._nodes:
            self.ready()
        started = time.perf_counter()
        self._handle = self._publish(source)
        self.version = version
        published = time.perf_counter()
        self._leave_lost_nodes()
        handles = self._local_handles(self._nodes)
        relayed = time.perf_counter()

        def arguments(index: int) -> tuple[WeightHandle, int]:
            node = self._nodes[index]  # another one, if the worker was replaced
            return handles.get(node) or self._local_handles([node])[node], version

        timings = self._call_all("load_weights", range(len(self._workers)), arguments)[0].values()
        slowest = {key: max(timing[key] for timing in timings) for key in ("load", "caches")}
        return {"publish": published - started, "relay": relayed - published, **slowest, "total": time.perf_counter() - started}

    def rollout(self, problems: Sequence[Problem], sampling: SamplingConfig, *, seed: int) -> list[Group]:
        """`sampling.num_samples` responses to each problem, in the order of `problems`.

        Whole groups go to the workers in turn; every response has a random stream of its own from `seed`, the problem's id and its
        sample index. The same call on the same weights returns the same tokens as long as the number of workers is the same.

        Raises:
            RecipeError: a prompt and `max_tokens` do not fit the engine's window together.
            ClusterError: a worker kept dying, or missed `cluster.step_timeout`.
        """
        if not problems:
            return []
        started = time.perf_counter()
        requests = self._requests(problems, sampling, seed)
        places = [[i for i in range(len(problems)) if i % len(self._workers) == worker] for worker in range(len(self._workers))]
        calls = {worker: ([r for i in mine for r in requests[i]],) for worker, mine in enumerate(places) if mine}
        answers, replaced = self._call_all("generate", calls, calls.__getitem__)
        generations: dict[int, list[Generation]] = {}
        for worker, (flat, _) in answers.items():
            k = sampling.num_samples
            generations |= {i: flat[place * k : (place + 1) * k] for place, i in enumerate(places[worker])}
        groups = [self._group(problem, generations[i]) for i, problem in enumerate(problems)]
        tokens = sum(len(t.token_ids) for group in groups for t in group.trajectories)
        seconds = time.perf_counter() - started
        self.last_stats = {
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "worker_seconds": max(inside for _, inside in answers.values()),
            "replaced_workers": replaced,
        }
        return groups

    def close(self) -> None:
        """End all workers and relays."""
        for worker in self._workers:
            ray.kill(worker)
        self._relays.close()
        self._workers, self._starting, self._nodes = [], [], []

    def _publish(self, source: Learner | Path) -> WeightHandle:
        if isinstance(source, Path):
            return folder_handle(source)
        handle: WeightHandle = source.publish_weights(self.engine.dtype)  # type: ignore[attr-defined]
        return handle if handle.node else replace(handle, node=ray.get_runtime_context().get_node_id())

    def _local_handles(self, nodes: Iterable[str]) -> dict[str, WeightHandle]:
        """For each node, what its workers load: the learner's own segment, or the copy of a relay, made now if need be.

        Raises:
            ClusterError: a node has no room for a copy, or `engine.weight_sync` allows none.
        """
        handle, how = self._handle, self.engine.weight_sync
        assert handle is not None
        direct = {node for node in nodes if handle.backend == "folder" or (node == handle.node and how != "relay")}
        far = set(nodes) - direct
        if far and how == "shared_memory":
            found = f"`shared_memory` reaches {node_name(handle.node)} only, and a rollout worker is on {node_name(min(far))}"
            raise ClusterError("engine.weight_sync", found, "use `auto`, which copies weights to other nodes")
        return dict.fromkeys(direct, handle) | (self._relays.deliver(handle, far) if far else {})

    def _leave_lost_nodes(self) -> None:
        """Replace the workers of nodes that left the cluster, before weights are sent there."""
        assert self._handle is not None
        if set(self._nodes) == {self._handle.node}:
            return
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for index, node in enumerate(self._nodes):
            if node not in alive:
                self.on_note(f"rollout worker {index}: its node left the cluster; replacing it")
                self._replace(index)

    def _requests(self, problems: Sequence[Problem], sampling: SamplingConfig, seed: int) -> list[list[GenerationRequest]]:
        seen: Counter[str] = Counter()
        requests = []
        for problem in problems:
            group = [
                GenerationRequest(
                    prompt_ids=tuple(problem.prompt_ids),
                    max_tokens=sampling.max_tokens,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    seed=_stream(seed, problem.id, seen[problem.id], sample),
                    stop_token_ids=self.stop_token_ids,
                    stop_on_repetition=sampling.stop_on_repetition,
                    images=problem.patches,
                    image_positions=problem.image_positions,
                )
                for sample in range(sampling.num_samples)
            ]
            check_fits(group[0], self.engine.max_model_len, f"problem {problem.id}")
            seen[problem.id] += 1
            requests.append(group)
        return requests

    def _group(self, problem: Problem, generations: Sequence[Generation]) -> Group:
        trajectories = tuple(
            Trajectory(
                problem_id=problem.id,
                sample_index=index,
                token_ids=generation.token_ids,
                logprobs=generation.logprobs,
                segments=(Segment(policy_version=self.version, length=len(generation.token_ids)),),
                finish_reason=generation.finish_reason,
                text=decode_response(self.tokenizer, generation.token_ids),
            )
            for index, generation in enumerate(generations)
        )
        return Group(problem=problem, trajectories=trajectories)

    def _start_one(self) -> tuple[Any, Any]:
        gpus = self.cluster.gpus_per_rollout_worker
        environment = {**cluster.WORKER_ENV, **VLLM_ENV, **(EAGER_ENV if self.engine.enforce_eager else {})}
        options = {"num_cpus": 1, "num_gpus": gpus, "max_restarts": 0, "runtime_env": {"env_vars": environment}}
        worker: Any = ray.remote(RolloutWorker).options(**options).remote()
        return worker, worker.start.remote(str(self.model), self.engine, 0, max(1, int(gpus)))

    def _call_all(self, method: str, workers: Iterable[int], arguments: Callable[[int], tuple[Any, ...]]) -> tuple[dict[int, Any], int]:
        """Call `method` on several workers at once; a worker that dies is replaced and its call repeated.

        Args:
            arguments: of the call, by worker index; asked again for a repeated call.

        Returns:
            Answers by worker index, and how many workers were replaced.
        """
        if not self._nodes:
            self.ready()
        deadline = time.monotonic() + self.cluster.step_timeout
        refs = {index: getattr(self._workers[index], method).remote(*arguments(index)) for index in workers}
        answers: dict[int, Any] = {}
        replaced: Counter[int] = Counter()
        for index in refs:
            what = f"rollout worker {index}: {method}"
            while index not in answers:
                try:
                    answers[index] = cluster.wait([refs[index]], what=what, timeout=max(0.0, deadline - time.monotonic()))[0]
                except ClusterError as error:
                    died = isinstance(error.__cause__, ray.exceptions.RayActorError)
                    if not died or replaced[index] == MAX_REPLACEMENTS:
                        raise
                    replaced[index] += 1
                    self.on_note(f"{what}: {error.found}; replacing it ({replaced[index]} of {MAX_REPLACEMENTS}) and repeating the call")
                    self._replace(index)
                    if method != "load_weights":
                        self._reload(index)
                    refs[index] = getattr(self._workers[index], method).remote(*arguments(index))
        return answers, sum(replaced.values())

    def _replace(self, index: int) -> None:
        """A fresh engine in place of worker `index`, on whichever node has room."""
        ray.kill(self._workers[index])
        self._workers[index], starting = self._start_one()
        self._starting[index] = starting
        started = cluster.wait([starting], what=f"rollout worker {index}: restart", timeout=self.cluster.start_timeout)
        self._nodes[index] = started[0][1]

    def _reload(self, index: int) -> None:
        """Give worker `index` the weights last loaded."""
        if self._handle is not None:
            node = self._nodes[index]
            loading = self._workers[index].load_weights.remote(self._local_handles([node])[node], self.version)
            cluster.wait([loading], what=f"rollout worker {index}: load_weights", timeout=self.cluster.step_timeout)


def _stream(seed: int, problem_id: str, occurrence: int, sample: int) -> int:
    """Seed of one response's random stream: the same on every machine and in every run. 63 bits."""
    key = f"{seed}/{problem_id}/{occurrence}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
