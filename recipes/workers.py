"""The worker groups of a run, started once and shared by its stages.

Owns when they start and end. On a cluster all groups come up side by side while the driver reads data. On one machine, where they
would fight for the cores, each starts when it is first needed, and vLLM as soon as the learner is up: it loads while SFT trains.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from bregman.data.chat import end_token_ids
from bregman.engines import cluster
from bregman.engines.learner_workers import LearnerWorkers
from bregman.engines.reward_workers import RewardWorkers
from bregman.engines.rollout_workers import RolloutWorkers
from bregman.models.rope import differ, rope_of
from bregman.protocols import Tracker
from recipes.schema import Recipe


class Workers:
    """Starts the cluster and all worker groups; a context manager that ends them.

    Args:
        model: HF folder that gives the engine its shapes; weights come later, by sync.
        learner: False for runs that only evaluate.
    """

    def __init__(self, recipe: Recipe, model: Path, tokenizer: Any, tracker: Tracker, *, learner: bool = True, engine: bool = True) -> None:
        self._recipe, self._model, self._tokenizer, self._tracker = recipe, model, tokenizer, tracker
        self._needs_learner, self._needs_engine = learner, engine
        tracker.waiting_for("the Ray cluster")
        cluster.start(recipe.cluster)
        self._learner = LearnerWorkers.start(recipe.learner, recipe.cluster) if learner else None
        self._engine: RolloutWorkers | None = None
        self._rewards: RewardWorkers | None = None
        if recipe.cluster.address != "local":
            self._start_engine()

    @cached_property
    def learner(self) -> LearnerWorkers:
        assert self._needs_learner, "this run was started without a learner"
        if self._learner is None:
            self._learner = LearnerWorkers.start(self._recipe.learner, self._recipe.cluster)
        self._tracker.waiting_for("the learner workers to start")
        self._learner.ready()
        self._start_engine()
        return self._learner

    @cached_property
    def engine(self) -> RolloutWorkers:
        self._start_engine()
        assert self._engine is not None, "this run was started without rollout workers"
        self._tracker.waiting_for("the rollout workers (vLLM) to start")
        self._engine.ready()
        return self._engine

    @cached_property
    def rewards(self) -> RewardWorkers:
        self._tracker.waiting_for("the reward workers to start")
        self._rewards = RewardWorkers.start(self._recipe.cluster)
        return self._rewards

    def use_model(self, model: Path) -> None:
        """Build the engine from `model`; one that runs is ended if its rotary base or its window is another, since weight sync
        carries weights only."""
        if self._engine is not None and differ(model, self._model):
            self._engine.close()
            self._engine = None
            self.__dict__.pop("engine", None)
        self._model = model

    def lend_gpus_of_learner(self) -> None:
        """Free the learner's GPUs for a stage that trains by other means; the next stage that needs the learner starts another."""
        if self._learner is not None and self._recipe.cluster.gpus_per_learner_worker:
            self._learner.close()
            self._learner = None
            self.__dict__.pop("learner", None)

    def end_stage(self) -> None:
        """Give back what only the finished stage needed."""
        if self._rewards is not None:
            self._rewards.release()

    def _start_engine(self) -> None:
        if self._needs_engine and self._engine is None:
            stop = end_token_ids(self._tokenizer)
            cluster_config = self._recipe.cluster
            window = min(self._recipe.engine.max_model_len, rope_of(self._model)[1] or self._recipe.engine.max_model_len)
            config = self._recipe.engine.model_copy(update={"max_model_len": window})  # before a later stage makes it longer
            self._engine = RolloutWorkers.start(self._model, config, cluster_config, tokenizer=self._tokenizer, stop_token_ids=stop)
            self._engine.on_note = self._tracker.warn

    def close(self) -> None:
        for group in (self._learner, self._engine, self._rewards):
            if group is not None:
                group.close()
        cluster.stop()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
