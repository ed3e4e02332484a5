"""Wires each kind of stage: data, workers and loop, from a fresh start or from a checkpoint.

Owns the wiring only; what a stage does is in `sft.loop`, `rl.loop` and `evals.evaluate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import rl.loop
import sft.loop
from bregman.data.chat import check_masks
from bregman.data.mixture import Mixture
from bregman.errors import GateError
from bregman.tracking.ledger import SampleLedger
from bregman.types import Evaluation
from recipes.context import Context, Saver, read_state
from recipes.examples import tokenised_sources
from recipes.schema import EvalStage, RLStage, SFTStage, Stage
from rl.hacking_watch import HackingWatch
from samplers.build import build_sampler


def total_steps(stage: Stage) -> int:
    return stage.steps if isinstance(stage, SFTStage) else stage.iterations if isinstance(stage, RLStage) else 1


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


def _export(context: Context, output: Path) -> None:
    context.tracker.waiting_for("the export of the model")
    context.workers.learner.export(output / "model")


def _run_sft(context: Context, stage: SFTStage, *, model: Path, checkpoint: Path | None, first: int, saver: Saver) -> Evaluation | None:
    """Supervised fine-tuning; with a gate, the evaluation that passed it."""
    context.tracker.waiting_for("the training data")
    sources = tokenised_sources(stage, context.base, context.tokenizer, context.recipe.seed, context.tracker.warn, context.source)
    check_masks([example for source in sources for example in source], context.tokenizer)
    mixture = Mixture(sources, [source.weight for source in stage.sources], context.recipe.seed)
    learner = context.workers.learner
    learner.begin_stage(model, stage.optimizer, training=stage)
    if checkpoint is not None:
        learner.load_checkpoint(checkpoint / "learner")
    gate = _Gate(context, stage) if stage.gate else None
    parts = sft.loop.Parts(learner=learner, tracker=context.tracker, examples=mixture.examples, save=saver, gate=gate or (lambda _: 0.0))
    state = read_state(checkpoint) if checkpoint else None
    budget = context.recipe.learner.tokens_per_micro_batch
    sft.loop.train(stage, parts, tokens_per_micro_batch=budget, first=first, state=state)
    return gate.last if gate else None


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
