"""The worker groups of a run, started once and shared by its stages.

Owns when they start and end. Engine, learner and reward workers come up side by side while the driver reads data; each is waited for
only when it is first needed.
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
from bregman.protocols import Tracker
from recipes.schema import Recipe


class Workers:
    """Starts the cluster and all worker groups; a context manager that ends them.

    Args:
        model: HF folder that gives the engine its shapes; weights come later, by sync.
        learner: False for runs that only evaluate.
    """

    def __init__(self, recipe: Recipe, model: Path, tokenizer: Any, tracker: Tracker, *, learner: bool = True, engine: bool = True) -> None:
        self._recipe, self._tracker = recipe, tracker
        tracker.waiting_for("the Ray cluster")
        cluster.start(recipe.cluster)
        self._learner = LearnerWorkers.start(recipe.learner, recipe.cluster) if learner else None
        self._engine = (
            RolloutWorkers.start(model, recipe.engine, recipe.cluster, tokenizer=tokenizer, stop_token_ids=end_token_ids(tokenizer))
            if engine
            else None
        )
        self._rewards = RewardWorkers.start(recipe.cluster)

    @cached_property
    def learner(self) -> LearnerWorkers:
        assert self._learner is not None, "this run was started without a learner"
        self._tracker.waiting_for("the learner workers to start")
        self._learner.ready()
        return self._learner

    @cached_property
    def engine(self) -> RolloutWorkers:
        assert self._engine is not None, "this run was started without rollout workers"
        self._tracker.waiting_for("the rollout workers (vLLM) to start")
        self._engine.ready()
        self._engine.on_note = self._tracker.warn
        return self._engine

    @property
    def rewards(self) -> RewardWorkers:
        return self._rewards

    def close(self) -> None:
        for group in (self._learner, self._engine, self._rewards):
            if group is not None:
                group.close()
        cluster.stop()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
