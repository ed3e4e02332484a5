"""What the stages of a run share: recipe, folder, tracker, tokenizer and workers; evaluating and checkpointing through them.

Owns what a checkpoint holds. The order of stages is `recipes.runner`'s.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bregman.data.config import ParquetSource, SourceConfig, StageSource
from bregman.data.sources import read_problems
from bregman.errors import DataError
from bregman.protocols import ImageEncoder, RewardScorer
from bregman.tracking.run_folder import RunFolder, checkpoint, write_json
from bregman.tracking.tracker import RunTracker
from bregman.types import Evaluation, Problem
from evals.config import EvalConfig
from evals.evaluate import evaluate, warn_about_failures
from recipes.schema import START, CurateStage, LongCoTStage, Recipe, RejectionStage, RLStage, Stage
from recipes.workers import Workers


@dataclass(frozen=True, kw_only=True)
class Context:
    """What every stage of a run shares. `base` is the recipe's folder: plugin paths and data files are relative to it; `start` the
    model folder that the recipe began with; `encoder` is None for a text model."""

    recipe: Recipe
    base: Path
    folder: RunFolder
    start: Path
    tracker: RunTracker
    tokenizer: Any
    encoder: ImageEncoder | None
    workers: Workers

    def model_of(self, name: str) -> Path:
        """The model that the stage `name` left; the recipe's own if it is `start`."""
        names = [stage.name for stage in self.recipe.stages]
        return self.start if name == START else self.folder.stage_folder(names.index(name), name) / "model"

    def source(self, source: SourceConfig) -> SourceConfig:
        """`source`, or the file that the stage it names has left.

        Raises:
            DataError: that stage is not finished.
        """
        if not isinstance(source, StageSource):
            return source
        names = [stage.name for stage in self.recipe.stages]
        file = data_file(self.folder.stage_folder(names.index(source.stage), source.stage))
        if not file.exists():
            raise DataError(f"stage {source.stage}", "has not made its data set yet", "run that stage first")
        shared = {"name": source.name or source.stage, "weight": source.weight, "columns": source.columns, "format": source.format}
        return ParquetSource(path=str(file.absolute()), **shared)

    def problems(self, config: EvalConfig | RLStage | LongCoTStage | CurateStage | RejectionStage, max_tokens: int) -> list[Problem]:
        room = self.recipe.engine.max_model_len - max_tokens
        source, seed = self.source(config.problems), self.recipe.seed
        return read_problems(source, self.base, self.tokenizer, seed=seed, max_prompt_tokens=room, encoder=self.encoder)

    def evaluation(self, config: EvalConfig) -> Evaluator:
        scorer = self.workers.rewards.scorer(config.rewards, self.base)
        return Evaluator(self, config, self.problems(config, config.sampling.max_tokens), scorer)


def data_file(stage_folder: Path) -> Path:
    """The data set that a stage of kind `schema.DATA_KINDS` leaves."""
    return stage_folder / "data.parquet"


class Evaluator:
    """Evaluates whatever weights the engine holds, on one fixed problem set."""

    def __init__(self, context: Context, config: EvalConfig, problems: list[Problem], scorer: RewardScorer) -> None:
        self._context, self._config, self._problems, self._scorer = context, config, problems, scorer

    def __call__(self, step: int, split: str = "eval") -> Evaluation:
        evaluation, groups = evaluate(self._context.workers.engine, self._scorer, self._problems, self._config)
        warn_about_failures(groups, f"{split} at step {step}", self._context.tracker.warn)
        self._context.tracker.rollouts(step, groups, split=split)
        return evaluation


class Saver:
    """Writes checkpoints of a training stage when they are due."""

    def __init__(self, context: Context, stage: Stage, stage_folder: Path, started: float) -> None:
        self._context, self._stage, self._folder, self._started = context, stage, stage_folder, started

    def __call__(self, step: int, state: Mapping[str, Any]) -> None:
        """A checkpoint from which `step` is next, if one is due: learner state and `state` in one folder that appears at once."""
        settings = self._stage.checkpoint  # type: ignore[union-attr]
        if step % settings.every:
            return
        self._context.tracker.waiting_for("the checkpoint")
        with checkpoint(self._folder, step, settings.keep) as folder:
            self._context.workers.learner.save_checkpoint(folder / "learner")
            write_json(folder / "state.json", {**state, "seconds": time.monotonic() - self._started})


def read_state(checkpoint_folder: Path) -> dict[str, Any]:
    return json.loads((checkpoint_folder / "state.json").read_text())
