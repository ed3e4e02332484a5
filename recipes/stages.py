"""Wires each kind of stage: data, workers and loop, from a fresh start or from a checkpoint.

Owns the wiring only; what a stage does is in `sft.loop`, `rl.loop` and `evals.evaluate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import rl.loop
import sft.loop
from bregman.errors import GateError
from bregman.tracking.ledger import SampleLedger
from bregman.types import Evaluation
from recipes.context import Context, Saver, read_state
from recipes.data_stages import run_curate, run_long_cot
from recipes.examples import losses, streams, tokenised
from recipes.model_stages import run_dpo, run_merge
from recipes.rejection import run_rejection
from recipes.schema import CurateStage, DPOStage, EvalStage, LongCoTStage, MergeStage, RejectionStage, RLStage, SFTStage, Stage
from rl.hacking_watch import HackingWatch
from samplers.build import build_sampler
from sft.stream import Stream


def total_steps(stage: Stage) -> int:
    """Steps of a stage as far as the recipe alone tells: those of epochs are counted once the data is read."""
    if isinstance(stage, SFTStage):
        return sum(phase.steps or 0 for phase in stage.plan) if all(phase.steps for phase in stage.plan) else 0
    return stage.iterations if isinstance(stage, RLStage) else 1


def run_stage(
    context: Context, stage: Stage, *, model: Path, output: Path, checkpoint: Path | None, first: int, saver: Saver
) -> Evaluation | None:
    """Run `stage` from `model`, or from `checkpoint`, after which step `first` is next, and leave what it makes in the folder `output`:
    a `model` (`schema.MODEL_KINDS`) or a data set (`schema.DATA_KINDS`). The evaluation it ended with, if it has one."""
    match stage:
        case SFTStage():
            evaluation = _run_sft(context, stage, model=model, checkpoint=checkpoint, first=first, saver=saver)
            _export(context, output)
            return evaluation
        case RLStage():
            _run_rl(context, stage, model=model, checkpoint=checkpoint, first=first, saver=saver)
            _export(context, output)
            return None
        case EvalStage():
            return _run_eval(context, stage, model=model)
        case MergeStage():
            run_merge(context, stage, output)
            return None
        case DPOStage():
            run_dpo(context, stage, model, output)
            return None
        case LongCoTStage():
            run_long_cot(context, stage, model, output)
            return None
        case CurateStage():
            run_curate(context, stage, model, output)
            return None
        case RejectionStage():
            run_rejection(context, stage, model, output)
            return None


def _export(context: Context, output: Path) -> None:
    context.tracker.waiting_for("the export of the model")
    context.workers.learner.export(output / "model")


def _run_sft(context: Context, stage: SFTStage, *, model: Path, checkpoint: Path | None, first: int, saver: Saver) -> Evaluation | None:
    """Supervised fine-tuning; with a gate, the evaluation that passed it."""
    plan = _plan_sft(context, stage)
    learner, tracker = context.workers.learner, context.tracker
    learner.begin_stage(model, stage.optimizer, training=stage)
    if checkpoint is not None:
        learner.load_checkpoint(checkpoint / "learner")
    gate = _Gate(context, stage) if stage.gate else None
    parts = sft.loop.Parts(learner=learner, tracker=tracker, save=saver, gate=gate or (lambda _: 0.0))
    sft.loop.train(plan, parts, gate=stage.gate, first=first, state=read_state(checkpoint) if checkpoint else None)
    return gate.last if gate else None


def _plan_sft(context: Context, stage: SFTStage) -> list[Stream]:
    """The phases with their data; says what became of rows that are not used as they are."""
    tracker = context.tracker
    tracker.waiting_for("the training data")
    stores = [
        tokenised(
            context.source(source),
            context.base,
            context.tokenizer,
            context.recipe.seed,
            stage.on_bad_row,
            encoder=context.encoder,
            progress=tracker.waiting_for,
        )
        for source in stage.sources
    ]
    plan = streams(context.recipe, stage, stores)
    tracker.plan(sum(stream.steps for stream in plan))
    for number, stream in enumerate(plan):
        place = f"phase {number + 1}, " if len(plan) > 1 else ""
        for text in losses(stores, stream):
            tracker.warn(f"{place}{text}")
    return plan


def _run_rl(context: Context, stage: RLStage, *, model: Path, checkpoint: Path | None, first: int, saver: Saver) -> None:
    """Reinforcement learning; the stage's own evaluations go to the metrics."""
    problems = context.problems(stage, stage.rollout.max_tokens)
    sampler, ledger, watch = build_sampler(stage.sampler, problems, context.recipe.seed), SampleLedger(), HackingWatch(stage.rewards)
    learner = context.workers.learner
    learner.begin_stage(model, stage.optimizer, training=stage, keep_fixed_reference=stage.kl_coefficient > 0)
    if checkpoint is not None:
        learner.load_checkpoint(checkpoint / "learner")
        state = read_state(checkpoint)
        sampler.load_state_dict(state["sampler"])
        ledger.load_state_dict(state["ledger"])
        watch.load_state_dict(state["watch"])
    evaluator = context.evaluation(stage.evaluation) if stage.evaluation else None

    def evaluate(iteration: int) -> Mapping[str, float]:
        due = evaluator is not None and stage.evaluation is not None and iteration % stage.evaluation.every == 0
        return evaluation_metrics(evaluator(iteration)) if due else {}  # type: ignore[misc]

    parts = rl.loop.Parts(
        engine=context.workers.engine,
        learner=learner,
        sampler=sampler,
        scorer=context.workers.rewards.scorer(stage.rewards, context.base),
        tracker=context.tracker,
        save=saver,
        evaluate=evaluate,
    )
    budget = context.recipe.learner.tokens_per_micro_batch
    rl.loop.train(stage, parts, seed=context.recipe.seed, tokens_per_micro_batch=budget, first=first, ledger=ledger, watch=watch)


def _run_eval(context: Context, stage: EvalStage, *, model: Path) -> Evaluation:
    """Evaluation of the model that the previous stage left."""
    evaluator = context.evaluation(stage)
    context.tracker.waiting_for("the evaluation")
    context.workers.engine.load_weights(model, version=0)
    evaluation = evaluator(0)
    context.tracker.log(0, evaluation_metrics(evaluation))
    return evaluation


class _Gate:
    """The gate's metric for the weights that the learner holds now."""

    def __init__(self, context: Context, stage: SFTStage) -> None:
        assert stage.gate is not None
        self._context, self._gate = context, stage.gate
        self._evaluator = context.evaluation(stage.gate.evaluation)
        self.last: Evaluation | None = None

    def __call__(self, step: int) -> float:
        self._context.tracker.waiting_for("the gate's evaluation")
        self._context.workers.engine.load_weights(self._context.workers.learner, version=step)
        self.last = self._evaluator(step, split="gate")
        metrics = evaluation_metrics(self.last)
        self._context.tracker.log(step - 1, metrics)
        value = metrics.get(f"eval/{self._gate.metric}")
        if value is None:
            raise GateError(f"gate `{self._gate.metric}`", "the metric applied to no response", "look at the warnings about failed rewards")
        return value


def evaluation_metrics(evaluation: Evaluation) -> dict[str, float]:
    """`eval/...` of everything an evaluation measured."""
    return {
        **{f"eval/{name}": value for name, value in evaluation.metrics.items()},
        "eval/accuracy": evaluation.accuracy,
        "eval/pass_at_k": evaluation.pass_at_k,
        "eval/mean_tokens": evaluation.mean_tokens,
        "eval/truncated": evaluation.truncated,
    }
