"""Reward workers: Ray actors that host reward pools, and the scorer that spreads a batch over them.

Owns placement, splitting and the replacement of a dead worker. What runs inside is `rewards.pool`; how scores become rewards is
`rewards.scorer`, here in the driver, so that only what reward functions see travels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import ray

from bregman.engines import cluster
from bregman.engines.config import ClusterConfig
from bregman.errors import ClusterError
from rewards.call import Outcome, Sample
from rewards.config import RewardsConfig
from rewards.pool import RewardPool
from rewards.scorer import Scorer

MARGIN_SECONDS = 60.0
"""What a worker may take beyond `rewards.total_timeout` (and importing) before it counts as hung itself."""


class RewardHost:
    """What a reward worker runs: one pool for each set of rewards that it was asked for."""

    def __init__(self) -> None:
        self._pools: dict[str, RewardPool] = {}

    def ready(self) -> bool:
        return True

    def load(self, rewards: RewardsConfig, base_folder: Path) -> None:
        """Import every function of the set."""
        self._pool(rewards, base_folder).load()

    def run(self, rewards: RewardsConfig, base_folder: Path, samples: Sequence[Sample]) -> list[list[Outcome]]:
        """Outcomes as `[function][sample]`."""
        return self._pool(rewards, base_folder).run(samples)

    def release(self) -> None:
        """End the processes of all sets; one that is asked for again starts anew."""
        while self._pools:
            self._pools.popitem()[1].close()

    def _pool(self, rewards: RewardsConfig, base_folder: Path) -> RewardPool:
        return self._pools.setdefault(_key(rewards, base_folder), RewardPool(rewards, base_folder))


class RewardWorkers:
    """The reward workers of a run. One set of actors serves every stage, whatever rewards it has."""

    def __init__(self, config: ClusterConfig, actors: list[Any]) -> None:
        self._config, self._actors = config, actors

    @classmethod
    def start(cls, config: ClusterConfig) -> RewardWorkers:
        """Start `config.reward_workers` actors; needs a running cluster.

        Raises:
            ClusterError: they are not up within `config.start_timeout` seconds.
        """
        actors = [_new_actor() for _ in range(config.reward_workers)]
        cluster.wait([actor.ready.remote() for actor in actors], what="reward workers: start", timeout=config.start_timeout)
        return cls(config, actors)

    def scorer(self, rewards: RewardsConfig, base_folder: Path) -> Scorer:
        """A scorer for one set of rewards; imports the functions now, so that mistakes show before anything is sampled.

        Raises:
            RewardError: a function cannot be loaded, or two have the same name.
        """
        base_folder = base_folder.resolve()  # the workers may have another working folder

        def run(samples: Sequence[Sample]) -> list[list[Outcome]]:
            return self._run(rewards, base_folder, samples)

        scorer = Scorer(rewards, run)
        calls = [("load", (rewards, base_folder))] * len(self._actors)
        self._each(calls, "import the rewards", _import_seconds(rewards) + MARGIN_SECONDS)
        return scorer

    def release(self) -> None:
        """End the processes of all scorers once a stage is done, and give back their memory; a scorer used again restarts its own."""
        self._each([("release", ())] * len(self._actors), "release", self._config.step_timeout)

    def close(self) -> None:
        """End the actors; the kernel ends their reward processes with them."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def _run(self, rewards: RewardsConfig, base_folder: Path, samples: Sequence[Sample]) -> list[list[Outcome]]:
        parts = split(samples, len(self._actors))
        timeout = rewards.total_timeout + _import_seconds(rewards) + MARGIN_SECONDS
        results = self._each([("run", (rewards, base_folder, part)) for part in parts], f"score {len(samples)} samples", timeout)
        return [[outcome for result in results for outcome in result[function]] for function in range(len(rewards.functions))]

    def _each(self, calls: Sequence[tuple[str, tuple[Any, ...]]], doing: str, timeout: float) -> list[Any]:
        """One call to each actor, side by side; an actor that is dead or dies is replaced and asked once more."""
        refs = [getattr(actor, method).remote(*args) for actor, (method, args) in zip(self._actors, calls, strict=True)]
        return [self._answer(index, ref, call, doing, timeout) for index, (ref, call) in enumerate(zip(refs, calls, strict=True))]

    def _answer(self, index: int, ref: Any, call: tuple[str, tuple[Any, ...]], doing: str, timeout: float) -> Any:
        what = f"reward worker {index}: {doing}"
        try:
            return cluster.wait([ref], what=what, timeout=timeout)[0]
        except ClusterError as error:
            if not isinstance(error.__cause__, ray.exceptions.RayActorError):
                raise
        actor = self._actors[index] = _new_actor()
        cluster.wait([actor.ready.remote()], what=f"reward worker {index}: start again", timeout=self._config.start_timeout)
        method, args = call
        return cluster.wait([getattr(actor, method).remote(*args)], what=f"{what}, second try", timeout=timeout)[0]


def split(samples: Sequence[Sample], count: int) -> list[list[Sample]]:
    """`count` consecutive parts of about equal size that never split a group; the same for the same samples."""
    parts: list[list[Sample]] = [[] for _ in range(count)]
    done = 0
    for _, group in groupby(samples, key=lambda sample: sample.problem_id):
        members = list(group)
        parts[done * count // len(samples)] += members
        done += len(members)
    return parts


def _new_actor() -> Any:
    # No CPU slot: a worker waits for its processes most of the time, and must not keep a learner from being placed.
    return ray.remote(RewardHost).options(num_cpus=0, scheduling_strategy="SPREAD").remote()


def _key(rewards: RewardsConfig, base_folder: Path) -> str:
    return f"{base_folder} {rewards.model_dump_json()}"


def _import_seconds(rewards: RewardsConfig) -> float:
    return sum(function.load_timeout for function in rewards.functions)
