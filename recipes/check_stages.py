"""What `bregman check` says about one stage: its data, lengths, batch arithmetic and rewards.

Owns the look at each kind of stage. Raises the first mistake as a `UserError`; prints the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bregman.data.config import StageSource
from bregman.data.inspect import image_report, length_report, source_report
from bregman.data.shards import TokenStore
from bregman.data.sources import read_problems, source_name
from bregman.data.templates import PromptTemplate, asked_with
from bregman.errors import DataError, RecipeError, RewardError
from bregman.protocols import ImageEncoder
from bregman.types import Group, Problem, Segment, Trajectory
from evals.config import EvalConfig
from recipes.data_stages import endpoint_key, fate_table
from recipes.examples import losses, streams, tokenised
from recipes.model_stages import text_model_only
from recipes.schema import CurateStage, DPOStage, EvalStage, LongCoTStage, MergeStage, Recipe, RejectionStage, RLStage, SFTStage, Stage
from rewards.config import RewardsConfig
from rewards.pool import RewardPool
from rewards.sandbox import isolation
from rewards.scorer import Scorer
from rl.config import OPMDConfig
from samplers.build import build_sampler
from samplers.curation import Curation
from sft.dpo import read_pairs
from sft.long_cot_config import EndpointGenerator, ModelGenerator
from sft.stream import Stream


@dataclass(frozen=True, kw_only=True)
class Look:
    """What is looked at. `base` is the recipe's folder; `encoder` is None for a text model."""

    recipe: Recipe
    base: Path
    tokenizer: Any
    encoder: ImageEncoder | None


def check_stage(look: Look, stage: Stage) -> None:
    """Print what a run of `stage` would do and train on.

    Raises:
        UserError: the first thing that would stop it.
    """
    match stage:
        case SFTStage():
            _check_sft(look, stage)
        case RLStage():
            _check_rl(look, stage)
        case MergeStage():
            _check_merge(look, stage)
        case DPOStage():
            _check_dpo(look, stage)
        case LongCoTStage():
            _check_long_cot(look, stage)
        case CurateStage():
            _check_curate(look, stage)
        case RejectionStage():
            kept = "the shortest right answer" if stage.keep == "shortest" else "preference pairs"
            print(f"  keeps {kept} of each problem, from samples:")
            _check_eval(look, stage)
        case EvalStage():
            _check_eval(look, stage)


def _check_sft(look: Look, stage: SFTStage) -> None:
    made = next((source.stage for source in stage.sources if isinstance(source, StageSource)), None)
    if made is not None:
        print(f"  rows that stage {made} will make: the data is looked at when the stage begins")
    else:
        seed, policy = look.recipe.seed, stage.on_bad_row
        stores = [tokenised(source, look.base, look.tokenizer, seed, policy, encoder=look.encoder) for source in stage.sources]
        for number, stream in enumerate(streams(look.recipe, stage, stores)):
            if stage.phases:
                print(f"  phase {number + 1} of {len(stage.phases)}:")
            _print_stream(stream, stores)
    if stage.gate:
        wanted = [f">= {stage.gate.at_least:g}"] if stage.gate.at_least is not None else []
        wanted += [f"<= {stage.gate.at_most:g}"] if stage.gate.at_most is not None else []
        extensions = f"up to {stage.gate.max_extensions} x {stage.gate.extend_steps} more steps"
        print(f"  gate: {stage.gate.metric} {' and '.join(wanted)}, else {extensions}")
        _check_eval(look, stage.gate.evaluation)


def _print_stream(stream: Stream, stores: list[TokenStore]) -> None:
    phase, limit = stream.phase, stream.phase.max_length
    for store in stores:
        print(f"  {source_report(store.name, store.lengths.tolist(), limit, store.trained_tokens)}")
        if sizes := store.image_sizes():
            tokens = int(store.lengths.sum())
            print(f"    {image_report(sizes, rows=len(store), with_images=store.with_images, tokens=tokens)}")
    print(_indent(length_report([int(n) for store in stores for n in store.lengths], limit, "tokens")))
    for line in losses(stores, stream):
        print(f"  {line}")
    lengths = np.concatenate([source.lengths for source in stream.sources])
    per_step, drawn = phase.tokens_per_step / lengths.mean(), stream.limit
    passes = (
        f"{phase.epochs} x {drawn / phase.epochs:,.0f} conversations"
        if phase.epochs and drawn
        else (f"about {stream.steps * per_step / len(lengths):.1f} passes over the data")
    )
    print(
        f"  {stream.steps} optimizer steps x {phase.tokens_per_step} tokens (about {per_step:.0f} conversations each) in rows of up to "
        f"{stream.rows.capacity} tokens, {passes}"
    )
    rates = phase.learning_rate, phase.learning_rate * phase.schedule.final_ratio
    print(f"  learning rate {rates[0]:g}, {phase.schedule.kind}, {phase.schedule.warmup_steps} warm-up steps, at the end {rates[1]:g}")
    if stream.rows.capacity < phase.max_length <= phase.tokens_per_step and lengths.max() > stream.rows.capacity:
        fix = f"set tokens_per_step to a multiple of {phase.max_length * stream.rows.count}"
        print(f"  note: conversations longer than {stream.rows.capacity} tokens get rows of their own, which others cannot fill; {fix}")


def _check_rl(look: Look, stage: RLStage) -> None:
    problems = _check_problems(look, stage.problems, stage.rollout.max_tokens)
    if problems:
        build_sampler(stage.sampler, problems, look.recipe.seed)
    k, steps = stage.rollout.num_samples, stage.optimizer_steps
    responses = stage.num_problems * k
    print(
        f"  each iteration: {stage.num_problems} problems x {k} samples = {responses} responses -> {steps} optimizer steps of up to "
        f"{stage.num_problems / steps:g} groups ({responses / steps:g} responses); {stage.iterations} iterations -> "
        f"{stage.iterations * responses} responses, at most {stage.iterations * steps} optimizer steps"
    )
    if problems:
        passes = stage.iterations * stage.num_problems / len(problems)
        print(f"  {len(problems)} training problems: each is drawn {passes:.1f} times on average")
    if k == 1:
        print("  warning: with one sample per problem no group has a signal; set rollout.num_samples >= 2")
    if isinstance(stage.algorithm, OPMDConfig) and steps == 1 and stage.algorithm.tau > 0:
        print("  warning: tau has no effect with one optimizer step per iteration: the log-ratio S is 0 there (k1.5 Eq. 3)")
    if stage.length_reward.weight and stage.length_reward.warmup_iterations >= stage.iterations:
        print("  warning: the length reward is never switched on: its warm-up is as long as the stage")
    if problems:
        _check_rewards(look, stage.rewards, problems[0])
    if stage.evaluation:
        print(f"  held-out evaluation every {stage.evaluation.every} iterations:")
        _check_eval(look, stage.evaluation)


def _check_merge(look: Look, stage: MergeStage) -> None:
    total = sum(model.weight for model in stage.models)
    for index, model in enumerate(stage.models):
        folder = look.base / Path(model.path or "").expanduser()
        if model.path is not None and not (folder / "config.json").is_file():
            raise DataError(f"stage {stage.name}: models[{index}].path", f"no model in {folder}", "give a folder in Hugging Face format")
        name = f"the model of stage {model.stage}" if model.stage is not None else str(folder)
        print(f"  {model.weight / total:.3g} x {name}")


def _check_dpo(look: Look, stage: DPOStage) -> None:
    text_model_only(stage, look.encoder)
    if isinstance(stage.pairs, StageSource):
        print(f"  pairs that stage {stage.pairs.stage} will make")
        return
    pairs = read_pairs(stage.pairs, look.base, look.tokenizer, look.recipe.seed, stage.max_length)
    print(f"  {len(pairs)} pairs, {len(pairs) * stage.epochs / stage.batch_size:.0f} optimizer steps of {stage.batch_size}")


def _check_eval(look: Look, config: EvalConfig | RejectionStage) -> None:
    problems = _check_problems(look, config.problems, config.sampling.max_tokens)
    if not problems:
        return
    print(f"  {len(problems)} problems x {config.sampling.num_samples} samples at temperature {config.sampling.temperature:g}")
    _check_rewards(look, config.rewards, problems[0])


def _check_long_cot(look: Look, stage: LongCoTStage) -> None:
    problems = _check_problems(look, stage.problems, stage.sampling.max_tokens)
    samples = len(stage.templates) * stage.sampling.num_samples
    if isinstance(stage.generator, EndpointGenerator):
        endpoint_key(stage.generator)
        print(f"  samples from {stage.generator.model} at {stage.generator.base_url}, {stage.generator.concurrency} requests at once")
    if not problems:
        return
    for name in stage.templates:
        if isinstance(stage.generator, ModelGenerator):
            _check_template(look, stage.template(name), f"templates: `{name}`", problems, stage.sampling.max_tokens)
    print(
        f"  {len(problems)} problems x {len(stage.templates)} templates x {stage.sampling.num_samples} samples = "
        f"{len(problems) * samples} samples; at most {stage.quality.keep} kept per problem"
    )
    _check_rewards(look, stage.rewards, problems[0])


def _check_curate(look: Look, stage: CurateStage) -> None:
    problems = _check_problems(look, stage.problems, stage.sampling.max_tokens)
    for source in stage.duplicates.evaluation_sets:
        print("  kept out:")
        _check_problems(look, source, 0)
    if not problems:
        return
    curation = Curation(problems, stage)
    curation.apply_rules()
    for line in fate_table(curation.report()["fates"], "problems").splitlines():
        print(f"    {line}" if not line.startswith("kept") else f"    {line}  before duplicates and sampling")
    left = len(curation.left())
    if stage.hack is not None:
        _check_template(look, stage.hack.template, "hack.template", problems, stage.hack.sampling.max_tokens)
        print(f"  without thinking: at most {left} problems x {stage.hack.sampling.num_samples} samples")
    print(f"  difficulty: at most {left} problems x {stage.sampling.num_samples} samples at temperature {stage.sampling.temperature:g}")
    _check_rewards(look, stage.rewards, problems[0])


def _check_template(look: Look, template: PromptTemplate, key: str, problems: Sequence[Problem], max_tokens: int) -> None:
    ask, room = asked_with(template, look.tokenizer, look.encoder), look.recipe.engine.max_model_len - max_tokens
    longest = max((ask(problem) for problem in problems), key=lambda problem: len(problem.prompt_ids))
    if len(longest.prompt_ids) > room:
        found = f"problem {longest.id} has {len(longest.prompt_ids)} tokens in it, and max_tokens {max_tokens} leaves {room}"
        raise RecipeError(key, found, "shorten the template, or make room: a larger engine.max_model_len or a smaller max_tokens")


def _check_problems(look: Look, source: Any, max_tokens: int) -> list[Problem]:
    """The problems of `source`; of a curated set those it is made from; none where an earlier stage makes them in another way."""
    while isinstance(source, StageSource):
        maker = next(stage for stage in look.recipe.stages if stage.name == source.stage)
        if not isinstance(maker, CurateStage):
            print(f"  problems that stage {maker.name} will make")
            return []
        print(f"  what stage {maker.name} will leave of:")
        source = maker.problems
    room = look.recipe.engine.max_model_len - max_tokens
    problems = read_problems(source, look.base, look.tokenizer, seed=look.recipe.seed, max_prompt_tokens=room, encoder=look.encoder)
    window = look.recipe.engine.max_model_len
    print(f"  {source_name(source)}: prompts against the {room} tokens that max_tokens {max_tokens} leaves of {window}")
    print(_indent(length_report([len(problem.prompt_ids) for problem in problems], room, "tokens")))
    if sizes := [patches.num_tokens for problem in problems for patches in problem.patches]:
        tokens, shown = sum(len(problem.prompt_ids) for problem in problems), sum(bool(problem.patches) for problem in problems)
        print(f"    {image_report(sizes, rows=len(problems), with_images=shown, tokens=tokens)}")
    return problems


def _check_rewards(look: Look, rewards: RewardsConfig, problem: Problem) -> None:
    """Run every reward once, isolated as in a run, on the gold answer of `problem` (or an empty completion)."""
    gold = problem.columns.get("answer")
    answer = str(gold[0]) if isinstance(gold, list) and gold else problem.answer or ""  # of several acceptable answers the first
    trajectory = Trajectory(
        problem_id=problem.id,
        sample_index=0,
        token_ids=(0,),
        logprobs=(0.0,),
        segments=(Segment(policy_version=0, length=1),),
        finish_reason="stop",
        text=answer,
    )
    pool = RewardPool(rewards, look.base)
    try:
        (scored,) = Scorer(rewards, pool.run).score([Group(problem=problem, trajectories=(trajectory,))])
    finally:
        pool.close()
    result = scored.trajectories[0]
    if result.reward_error:
        raise RewardError("rewards", result.reward_error, "a reward must accept any completion, an empty one too")
    what = "the gold answer" if answer else "an empty completion"
    parts = ", ".join(f"{name} = {'not applicable' if value is None else f'{value:g}'}" for name, value in result.reward_parts.items())
    print(f"  rewards on {what} of problem {problem.id}: {parts}")
    if any(config.function == "code" for config in rewards.functions):
        print(f"  programs run in: {isolation()}")


def _indent(text: str, by: str = "    ") -> str:
    lines: Sequence[str] = text.splitlines()
    return "\n".join(by + line for line in lines)
