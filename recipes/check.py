"""`bregman check` and `bregman show`: what a run would do and train on, before any worker is started.

Owns the look at data, lengths, batch arithmetic and rewards of every stage. Raises the first mistake as a `UserError`; prints the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from bregman.data.chat import check_masks, tokenize_conversations
from bregman.data.inspect import colour_mask, length_report, source_report
from bregman.data.sources import read_conversations, read_problems, source_name
from bregman.errors import DataError, RecipeError, RewardError
from bregman.types import Group, Problem, Segment, Trajectory
from evals.config import EvalConfig
from recipes.models import recipe_tokenizer
from recipes.schema import Recipe, RLStage, SFTStage
from rewards.config import RewardsConfig
from rewards.pool import RewardPool
from rewards.sandbox import isolation
from rewards.scorer import Scorer
from rl.config import OPMDConfig
from samplers.build import build_sampler


def check(recipe: Recipe, base: Path) -> None:
    """Print a section per stage.

    Raises:
        UserError: the first thing that would stop a run.
    """
    tokenizer = recipe_tokenizer(recipe)
    print(f"{recipe.name}: {len(recipe.stages)} stages, model {recipe.model.kind}, output in {recipe.output_dir}")
    for index, stage in enumerate(recipe.stages):
        print(f"\n[{index + 1}/{len(recipe.stages)}] {stage.name} ({stage.kind})")
        if isinstance(stage, SFTStage):
            _check_sft(recipe, stage, base, tokenizer)
        elif isinstance(stage, RLStage):
            _check_rl(recipe, stage, base, tokenizer)
        else:
            _check_eval(recipe, stage, base, tokenizer)
    print("\nthe recipe is ready to run")


def _check_sft(recipe: Recipe, stage: SFTStage, base: Path, tokenizer: Any) -> None:
    lengths: list[int] = []
    for source in stage.sources:
        conversations = read_conversations(source, base, seed=recipe.seed)
        sequences = tokenize_conversations(tokenizer, conversations)
        check_masks(sequences, tokenizer)
        own = [len(sequence.token_ids) for sequence in sequences]
        lengths += own
        trained = sum(int(sequence.loss_mask.sum()) for sequence in sequences)
        print(f"  {source_report(source_name(source), own, stage.max_length, trained)}")
    print(_indent(length_report(lengths, stage.max_length, "tokens")))
    over = sum(length > stage.max_length for length in lengths)
    if over and stage.too_long == "skip":
        print(f"  {over} of {len(lengths)} conversations are above max_length {stage.max_length} and would be skipped")
    elif over:
        fix = f"set max_length: {max(lengths)}, or too_long: skip"
        raise DataError(f"stage {stage.name}", f"{over} of {len(lengths)} conversations are above max_length {stage.max_length}", fix)
    if over == len(lengths):
        raise DataError(f"stage {stage.name}", "no conversation is left", "raise max_length")
    per_step = stage.tokens_per_step / fmean(lengths)
    print(
        f"  {stage.steps} optimizer steps x {stage.tokens_per_step} tokens (about {per_step:.0f} conversations each), "
        f"about {stage.steps * per_step / len(lengths):.1f} passes over the data"
    )
    if stage.gate:
        wanted = [f">= {stage.gate.at_least:g}"] if stage.gate.at_least is not None else []
        wanted += [f"<= {stage.gate.at_most:g}"] if stage.gate.at_most is not None else []
        extensions = f"up to {stage.gate.max_extensions} x {stage.gate.extend_steps} more steps"
        print(f"  gate: {stage.gate.metric} {' and '.join(wanted)}, else {extensions}")
        _check_eval(recipe, stage.gate.evaluation, base, tokenizer)


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
                conversations = read_conversations(source, base, seed=recipe.seed)[:count]
                for conversation, sequence in zip(conversations, tokenize_conversations(tokenizer, conversations), strict=True):
                    print(f"--- {name}, {source_name(source)}, row {conversation.id}: {len(sequence.token_ids)} tokens")
                    Console(highlight=False).print(colour_mask(tokenizer, sequence))


def _check_rl(recipe: Recipe, stage: RLStage, base: Path, tokenizer: Any) -> None:
    problems = _check_problems(recipe, stage.problems, stage.rollout.max_tokens, base, tokenizer)
    build_sampler(stage.sampler, problems, recipe.seed)
    k, steps = stage.rollout.num_samples, stage.optimizer_steps
    responses = stage.num_problems * k
    print(
        f"  each iteration: {stage.num_problems} problems x {k} samples = {responses} responses -> {steps} optimizer steps of up to "
        f"{stage.num_problems / steps:g} groups ({responses / steps:g} responses); {stage.iterations} iterations -> "
        f"{stage.iterations * responses} responses, at most {stage.iterations * steps} optimizer steps"
    )
    passes = stage.iterations * stage.num_problems / len(problems)
    print(f"  {len(problems)} training problems: each is drawn {passes:.1f} times on average")
    if k == 1:
        print("  warning: with one sample per problem no group has a signal; set rollout.num_samples >= 2")
    if isinstance(stage.algorithm, OPMDConfig) and steps == 1 and stage.algorithm.tau > 0:
        print("  warning: tau has no effect with one optimizer step per iteration: the log-ratio S is 0 there (k1.5 Eq. 3)")
    if stage.length_reward.weight and stage.length_reward.warmup_iterations >= stage.iterations:
        print("  warning: the length reward is never switched on: its warm-up is as long as the stage")
    _check_rewards(stage.rewards, problems[0], base)
    if stage.evaluation:
        print(f"  held-out evaluation every {stage.evaluation.every} iterations:")
        _check_eval(recipe, stage.evaluation, base, tokenizer)


def _check_eval(recipe: Recipe, config: EvalConfig, base: Path, tokenizer: Any) -> None:
    problems = _check_problems(recipe, config.problems, config.sampling.max_tokens, base, tokenizer)
    print(f"  {len(problems)} problems x {config.sampling.num_samples} samples at temperature {config.sampling.temperature:g}")
    _check_rewards(config.rewards, problems[0], base)


def _check_problems(recipe: Recipe, source: Any, max_tokens: int, base: Path, tokenizer: Any) -> list[Problem]:
    room = recipe.engine.max_model_len - max_tokens
    problems = read_problems(source, base, tokenizer, seed=recipe.seed, max_prompt_tokens=room)
    window = recipe.engine.max_model_len
    print(f"  {source_name(source)}: prompts against the {room} tokens that max_tokens {max_tokens} leaves of {window}")
    print(_indent(length_report([len(problem.prompt_ids) for problem in problems], room, "tokens")))
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
