"""`bregman check` and `bregman show`: what a run would do and train on, before any worker is started.

Owns the look at data, lengths, batch arithmetic and rewards of every stage. Raises the first mistake as a `UserError`; prints the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bregman.data.chat import tokenize_conversations
from bregman.data.config import StageSource
from bregman.data.inspect import colour_mask, image_report, length_report, source_report
from bregman.data.shards import TokenStore
from bregman.data.sources import image_folder, read_conversation, read_problems, read_rows, source_name
from bregman.data.templates import PromptTemplate, asked_with
from bregman.errors import DataError, RecipeError, RewardError
from bregman.models.config import HFModelConfig
from bregman.types import Group, Problem, Segment, Trajectory
from evals.config import EvalConfig
from recipes.data_stages import endpoint_key, fate_table
from recipes.examples import losses, streams, tokenised
from recipes.model_stages import text_model_only
from recipes.models import recipe_encoder, recipe_tokenizer
from recipes.plan import config_file, plan_lines
from recipes.schema import CurateStage, DPOStage, LongCoTStage, MergeStage, Recipe, RejectionStage, RLStage, SFTStage
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


def check(recipe: Recipe, base: Path) -> None:
    """Print a section per stage.

    Raises:
        UserError: the first thing that would stop a run.
    """
    print(f"{recipe.name}: {len(recipe.stages)} stages, model {recipe.model.kind}, output in {recipe.output_dir}")
    _check_memory(recipe, base)
    tokenizer = recipe_tokenizer(recipe)
    for index, stage in enumerate(recipe.stages):
        print(f"\n[{index + 1}/{len(recipe.stages)}] {stage.name} ({stage.kind})")
        if isinstance(stage, SFTStage):
            _check_sft(recipe, stage, base, tokenizer)
        elif isinstance(stage, RLStage):
            _check_rl(recipe, stage, base, tokenizer)
        elif isinstance(stage, MergeStage):
            _check_merge(stage, base)
        elif isinstance(stage, DPOStage):
            _check_dpo(recipe, stage, base, tokenizer)
        elif isinstance(stage, LongCoTStage):
            _check_long_cot(recipe, stage, base, tokenizer)
        elif isinstance(stage, RejectionStage):
            kept = "the shortest right answer" if stage.keep == "shortest" else "preference pairs"
            print(f"  keeps {kept} of each problem, from samples:")
            _check_eval(recipe, stage, base, tokenizer)
        elif isinstance(stage, CurateStage):
            _check_curate(recipe, stage, base, tokenizer)
        else:
            _check_eval(recipe, stage, base, tokenizer)
    print("\nthe recipe is ready to run")


def _check_memory(recipe: Recipe, base: Path) -> None:
    """The plan comes before anything that needs the model itself, which may be on another machine."""
    if not isinstance(recipe.model, HFModelConfig):
        return
    file = config_file(recipe.model, base)
    if file is not None:
        from bregman.models.meta import meta_model

        print("\n".join(plan_lines(recipe, meta_model(file))))


def _check_sft(recipe: Recipe, stage: SFTStage, base: Path, tokenizer: Any) -> None:
    made = next((source.stage for source in stage.sources if isinstance(source, StageSource)), None)
    if made is not None:
        print(f"  rows that stage {made} will make: the data is looked at when the stage begins")
    else:
        encoder = recipe_encoder(recipe)
        stores = [tokenised(source, base, tokenizer, recipe.seed, stage.on_bad_row, encoder=encoder) for source in stage.sources]
        for number, stream in enumerate(streams(recipe, stage, stores)):
            if stage.phases:
                print(f"  phase {number + 1} of {len(stage.phases)}:")
            _print_stream(stream, stores)
    if stage.gate:
        wanted = [f">= {stage.gate.at_least:g}"] if stage.gate.at_least is not None else []
        wanted += [f"<= {stage.gate.at_most:g}"] if stage.gate.at_most is not None else []
        extensions = f"up to {stage.gate.max_extensions} x {stage.gate.extend_steps} more steps"
        print(f"  gate: {stage.gate.metric} {' and '.join(wanted)}, else {extensions}")
        _check_eval(recipe, stage.gate.evaluation, base, tokenizer)


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


def show(recipe: Recipe, base: Path, stage_name: str | None, count: int) -> None:
    """Print the first `count` conversations of each source of a supervised stage, trained tokens coloured.

    Raises:
        RecipeError: the recipe has no such supervised stage.
    """
    stages = {stage.name: stage for stage in recipe.stages if isinstance(stage, SFTStage)}
    if not stages or (stage_name is not None and stage_name not in stages):
        fix = f"choose one of {', '.join(stages)}" if stages else "the recipe has none"
        raise RecipeError("--stage", f"no supervised stage `{stage_name or ''}`", fix)
    tokenizer = recipe_tokenizer(recipe)
    for name, stage in stages.items():
        if stage_name in (None, name):
            for source in stage.sources:
                if isinstance(source, StageSource):
                    print(f"--- {name}: stage {source.stage} makes the rows of {source_name(source)}")
                    continue
                rows, folder = read_rows(source, base, recipe.seed), image_folder(source, base)
                conversations = [read_conversation(rows, index, folder) for index in range(min(count, len(rows)))]
                sequences = tokenize_conversations(tokenizer, conversations, encoder=recipe_encoder(recipe))
                for conversation, sequence in zip(conversations, sequences, strict=True):
                    print(f"--- {name}, {source_name(source)}, row {conversation.id}: {len(sequence.token_ids)} tokens")
                    Console(highlight=False).print(colour_mask(tokenizer, sequence))


def _check_rl(recipe: Recipe, stage: RLStage, base: Path, tokenizer: Any) -> None:
    problems = _check_problems(recipe, stage.problems, stage.rollout.max_tokens, base, tokenizer)
    if problems:
        build_sampler(stage.sampler, problems, recipe.seed)
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
        _check_rewards(stage.rewards, problems[0], base)
    if stage.evaluation:
        print(f"  held-out evaluation every {stage.evaluation.every} iterations:")
        _check_eval(recipe, stage.evaluation, base, tokenizer)


def _check_merge(stage: MergeStage, base: Path) -> None:
    total = sum(model.weight for model in stage.models)
    for index, model in enumerate(stage.models):
        folder = base / Path(model.path or "").expanduser()
        if model.path is not None and not (folder / "config.json").is_file():
            raise DataError(f"stage {stage.name}: models[{index}].path", f"no model in {folder}", "give a folder in Hugging Face format")
        name = f"the model of stage {model.stage}" if model.stage is not None else str(folder)
        print(f"  {model.weight / total:.3g} x {name}")


def _check_dpo(recipe: Recipe, stage: DPOStage, base: Path, tokenizer: Any) -> None:
    text_model_only(stage, recipe_encoder(recipe))
    if isinstance(stage.pairs, StageSource):
        print(f"  pairs that stage {stage.pairs.stage} will make")
        return
    pairs = read_pairs(stage.pairs, base, tokenizer, recipe.seed, stage.max_length)
    print(f"  {len(pairs)} pairs, {len(pairs) * stage.epochs / stage.batch_size:.0f} optimizer steps of {stage.batch_size}")


def _check_eval(recipe: Recipe, config: EvalConfig | RejectionStage, base: Path, tokenizer: Any) -> None:
    problems = _check_problems(recipe, config.problems, config.sampling.max_tokens, base, tokenizer)
    if not problems:
        return
    print(f"  {len(problems)} problems x {config.sampling.num_samples} samples at temperature {config.sampling.temperature:g}")
    _check_rewards(config.rewards, problems[0], base)


def _check_long_cot(recipe: Recipe, stage: LongCoTStage, base: Path, tokenizer: Any) -> None:
    problems = _check_problems(recipe, stage.problems, stage.sampling.max_tokens, base, tokenizer)
    samples = len(stage.templates) * stage.sampling.num_samples
    if isinstance(stage.generator, EndpointGenerator):
        endpoint_key(stage.generator)
        print(f"  samples from {stage.generator.model} at {stage.generator.base_url}, {stage.generator.concurrency} requests at once")
    if not problems:
        return
    for name in stage.templates:
        if isinstance(stage.generator, ModelGenerator):
            _check_template(recipe, stage.template(name), f"templates: `{name}`", problems, stage.sampling.max_tokens, tokenizer)
    print(
        f"  {len(problems)} problems x {len(stage.templates)} templates x {stage.sampling.num_samples} samples = "
        f"{len(problems) * samples} samples; at most {stage.quality.keep} kept per problem"
    )
    _check_rewards(stage.rewards, problems[0], base)


def _check_curate(recipe: Recipe, stage: CurateStage, base: Path, tokenizer: Any) -> None:
    problems = _check_problems(recipe, stage.problems, stage.sampling.max_tokens, base, tokenizer)
    for source in stage.duplicates.evaluation_sets:
        print("  kept out:")
        _check_problems(recipe, source, 0, base, tokenizer)
    if not problems:
        return
    curation = Curation(problems, stage)
    curation.apply_rules()
    for line in fate_table(curation.report()["fates"], "problems").splitlines():
        print(f"    {line}" if not line.startswith("kept") else f"    {line}  before duplicates and sampling")
    left = len(curation.left())
    if stage.hack is not None:
        _check_template(recipe, stage.hack.template, "hack.template", problems, stage.hack.sampling.max_tokens, tokenizer)
        print(f"  without thinking: at most {left} problems x {stage.hack.sampling.num_samples} samples")
    print(f"  difficulty: at most {left} problems x {stage.sampling.num_samples} samples at temperature {stage.sampling.temperature:g}")
    _check_rewards(stage.rewards, problems[0], base)


def _check_template(
    recipe: Recipe, template: PromptTemplate, key: str, problems: Sequence[Problem], max_tokens: int, tokenizer: Any
) -> None:
    ask, room = asked_with(template, tokenizer, recipe_encoder(recipe)), recipe.engine.max_model_len - max_tokens
    longest = max((ask(problem) for problem in problems), key=lambda problem: len(problem.prompt_ids))
    if len(longest.prompt_ids) > room:
        found = f"problem {longest.id} has {len(longest.prompt_ids)} tokens in it, and max_tokens {max_tokens} leaves {room}"
        raise RecipeError(key, found, "shorten the template, or make room: a larger engine.max_model_len or a smaller max_tokens")


def _check_problems(recipe: Recipe, source: Any, max_tokens: int, base: Path, tokenizer: Any) -> list[Problem]:
    """The problems of `source`; of a curated set those it is made from; none where an earlier stage makes them in another way."""
    while isinstance(source, StageSource):
        maker = next(stage for stage in recipe.stages if stage.name == source.stage)
        if not isinstance(maker, CurateStage):
            print(f"  problems that stage {maker.name} will make")
            return []
        print(f"  what stage {maker.name} will leave of:")
        source = maker.problems
    room = recipe.engine.max_model_len - max_tokens
    problems = read_problems(source, base, tokenizer, seed=recipe.seed, max_prompt_tokens=room, encoder=recipe_encoder(recipe))
    window = recipe.engine.max_model_len
    print(f"  {source_name(source)}: prompts against the {room} tokens that max_tokens {max_tokens} leaves of {window}")
    print(_indent(length_report([len(problem.prompt_ids) for problem in problems], room, "tokens")))
    if sizes := [patches.num_tokens for problem in problems for patches in problem.patches]:
        tokens, shown = sum(len(problem.prompt_ids) for problem in problems), sum(bool(problem.patches) for problem in problems)
        print(f"    {image_report(sizes, rows=len(problems), with_images=shown, tokens=tokens)}")
    return problems


def _check_rewards(rewards: RewardsConfig, problem: Problem, base: Path) -> None:
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
    pool = RewardPool(rewards, base)
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
