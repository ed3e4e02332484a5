"""Reward functions over many samples, each in a process that can be killed: the guilty samples fail, the others keep their scores.

Owns batching, finding the guilty samples and the time limit of a whole batch. One process is `rewards.process`; what a failure
does to a sample's total reward is `rewards.scorer`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from types import TracebackType

from bregman.errors import RewardError
from rewards.call import RESERVED, Failure, Outcome, Parameters, Sample
from rewards.config import RewardConfig, RewardsConfig
from rewards.process import CallFailed, RewardProcess

Observer = Callable[[int, int, float], None]
"""`observe(function, samples, seconds)`: a call of the function at that index took so long, whether it gave scores or failed."""


class RewardPool:
    """The reward functions of a stage, each with `rewards.processes` processes of its own.

    Processes start when they are first needed. Use it from one thread.

    Args:
        rewards: the functions and their limits.
        base_folder: the folder of the recipe; where relative paths start, and the working folder of the processes.
        observe: told of every call, from several threads.
    """

    def __init__(self, rewards: RewardsConfig, base_folder: Path, observe: Observer | None = None) -> None:
        self._rewards = rewards
        self._functions = [
            _Function(config, rewards, base_folder.resolve(), partial(observe, index) if observe else None)
            for index, config in enumerate(rewards.functions)
        ]

    def load(self) -> None:
        """Import every function now.

        Raises:
            RewardError: one of them cannot be loaded.
        """
        for function in self._functions:
            function.load()

    def run(self, samples: Sequence[Sample]) -> list[list[Outcome]]:
        """The outcome of every function for every sample, `[function][sample]`.

        A call that fails (exception, wrong length, dead or late process) is repeated sample by sample, so that only the samples
        that fail on their own get a `Failure`. Takes little longer than `rewards.total_timeout` seconds, however bad the functions.

        Raises:
            RewardError: a function cannot be loaded, or needs a column that no sample has.
        """
        deadline = time.monotonic() + self._rewards.total_timeout
        if not samples:
            return [[] for _ in self._functions]
        for function in self._functions:
            _check_columns(function.config, function.load(), samples)
        with ThreadPoolExecutor(self._rewards.processes, thread_name_prefix="reward") as threads:
            jobs = [
                [threads.submit(function.score, samples[start:stop], deadline) for start, stop in _batches(samples, function.batch)]
                for function in self._functions
            ]
            try:
                return [[outcome for job in of_function for outcome in job.result()] for of_function in jobs]
            except BaseException:  # an interrupt, most likely
                threads.shutdown(wait=False, cancel_futures=True)
                self._interrupt([job for of_function in jobs for job in of_function])
                raise

    def _interrupt(self, jobs: Sequence[Future[list[Outcome]]]) -> None:
        """End the calls that still run, so that their threads come back."""
        for function in self._functions:
            function.stopping.set()
        while not all(job.done() for job in jobs):
            for function in self._functions:
                function.interrupt()
            time.sleep(0.02)
        for function in self._functions:
            function.stopping.clear()

    def close(self) -> None:
        """Kill all processes."""
        for function in self._functions:
            function.close()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _Function:
    """One reward function and its processes."""

    def __init__(
        self, config: RewardConfig, rewards: RewardsConfig, base_folder: Path, observe: Callable[[int, float], None] | None
    ) -> None:
        self.config, self._observe = config, observe
        self.batch = config.batch
        self._total_timeout = rewards.total_timeout
        self._all = [RewardProcess(config, base_folder, rewards.memory_gib) for _ in range(rewards.processes)]
        self._idle: SimpleQueue[RewardProcess] = SimpleQueue()
        for process in self._all:
            self._idle.put(process)
        self._parameters: Parameters | None = None
        self.stopping = Event()

    def load(self) -> Parameters:
        if self._parameters is None:
            self._parameters = self._all[0].load()
        return self._parameters

    def score(self, samples: Sequence[Sample], deadline: float) -> list[Outcome]:
        """One call for all samples; if that fails, one for each. Runs in several threads."""
        process = self._idle.get()
        try:
            try:
                return self._call(process, samples, deadline)
            except CallFailed as failed:
                if len(samples) == 1:
                    return [Failure(str(failed))]
                started = time.monotonic()
                outcomes = [self._one(process, sample, deadline) for sample in samples]
                if failed.timed_out and not any(isinstance(outcome, Failure) for outcome in outcomes):
                    # Nobody is guilty, the function is just slow: calls that take about half its time limit from now on.
                    seconds = (time.monotonic() - started) / len(samples)
                    self.batch = max(1, min(self.batch, int(0.5 * self.config.timeout / seconds)))
                return outcomes
        finally:
            self._idle.put(process)

    def _one(self, process: RewardProcess, sample: Sample, deadline: float) -> Outcome:
        try:
            return self._call(process, [sample], deadline)[0]
        except CallFailed as failed:
            return Failure(str(failed))

    def _call(self, process: RewardProcess, samples: Sequence[Sample], deadline: float) -> list[Outcome]:
        left = deadline - time.monotonic()
        ran_out = f"the {self._total_timeout:.1f} s for all rewards of a batch ran out (rewards.total_timeout)"
        if self.stopping.is_set():
            raise CallFailed("not scored: the run was interrupted")
        if left <= 0:
            raise CallFailed(f"not scored: {ran_out}")
        started = time.monotonic()
        try:
            return process.call(samples, min(self.config.timeout, left))
        except CallFailed as failed:
            if failed.timed_out and left < self.config.timeout:
                raise CallFailed(f"no answer when {ran_out}", timed_out=True) from None
            raise
        except (RewardError, OSError) as error:  # it loaded before, when the pool started: no reason to end the run
            raise CallFailed(f"its process could not be started again ({error})") from None
        finally:
            if self._observe is not None:
                self._observe(len(samples), time.monotonic() - started)

    def interrupt(self) -> None:
        for process in self._all:
            process.interrupt()

    def close(self) -> None:
        for process in self._all:
            process.kill()


def _batches(samples: Sequence[Sample], size: int) -> list[tuple[int, int]]:
    """Ranges of about `size` samples that never split a group: a function may compare the samples of a group."""
    ranges: list[tuple[int, int]] = []
    start = stop = 0
    for _, group in groupby(samples, key=lambda sample: sample.problem_id):
        stop += len(list(group))
        if stop - start >= size:
            ranges.append((start, stop))
            start = stop
    if stop > start:
        ranges.append((start, stop))
    return ranges


def _check_columns(config: RewardConfig, parameters: Parameters, samples: Sequence[Sample]) -> None:
    missing = [name for name in parameters.required if name not in samples[0].columns]
    if missing:
        known = sorted(key for key in samples[0].columns if key not in RESERVED)
        has = f"the data has {', '.join(known)}" if known else "the data has no columns"
        raise RewardError(f"reward `{config.function}`", f"needs the column `{missing[0]}`", f"{has}; map it in the data source")
