"""`bregman rewards test` and `bregman rewards new`: try rewards on saved rollouts before a run, and start writing one.

Owns reading rollouts back into groups and running a stage's rewards over them as a run does. The text is `rewards.trial`, the
files of a new reward are `rewards.scaffold`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bregman.errors import RecipeError, UserError
from bregman.types import Group, Problem, Trajectory
from evals.config import EvalConfig
from recipes.schema import EvalStage, Recipe, RLStage, SFTStage, Stage, load_recipe
from rewards.config import RewardsConfig
from rewards.pool import RewardPool
from rewards.sandbox import isolation
from rewards.scorer import NOT_SCORED, Scorer
from rewards.trial import Calls, Tried, changes_of_score, disagreements, failures, latency_table, sample_text, score_histogram, verdict_of


def add_commands(commands: Any) -> None:
    """Add `rewards test` and `rewards new` to the command line's subcommands."""
    rewards = commands.add_parser("rewards", help="try the rewards of a recipe on saved rollouts, or start a new one")
    subcommands = rewards.add_subparsers(required=True, metavar="COMMAND")
    test = subcommands.add_parser("test", help="run a stage's rewards over saved rollouts, isolated as in a run")
    test.add_argument("recipe", type=Path, help="recipe YAML")
    test.add_argument("--on", type=Path, required=True, metavar="FOLDER", help="run folder, its rollouts/STAGE folder, or one Parquet file")
    test.add_argument("--stage", help="whose rewards; default: the stage the folder is named after, else the last RL stage")
    test.add_argument("--limit", type=int, metavar="N", help="at most about N responses, whole groups, evenly spread; default: all")
    test.add_argument("--show", type=int, default=1, metavar="N", help="samples shown of each verdict")
    test.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override, e.g. seed=1")
    test.set_defaults(command=_test)
    new = subcommands.add_parser("new", help="write a folder with a reward, its test and a README")
    new.add_argument("name", help="name of the function, e.g. my_reward")
    new.add_argument("--to", type=Path, help="folder to make; default: NAME")
    new.set_defaults(command=_new)


def _new(options: argparse.Namespace) -> None:
    from rewards.scaffold import write_plugin

    folder = write_plugin(options.name, options.to or Path(options.name))
    print((folder / "README.md").read_text(), end="")


def _test(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, options.overrides)
    lines = try_rewards(recipe, options.recipe.resolve().parent, options.on, options.stage, limit=options.limit, show=options.show)
    try:
        for line in lines:
            print(line, flush=True)
    except BrokenPipeError:  # whoever reads has seen enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that nothing is written when the interpreter ends


@dataclass(frozen=True, kw_only=True, slots=True)
class _Judged:
    """The part of a stage that has rewards, and the prefix of its rollout files."""

    config: RLStage | EvalConfig
    split: str

    @property
    def rewards(self) -> RewardsConfig:
        return self.config.rewards

    @property
    def max_tokens(self) -> int:
        return self.config.rollout.max_tokens if isinstance(self.config, RLStage) else self.config.sampling.max_tokens


def try_rewards(recipe: Recipe, base: Path, on: Path, stage_name: str | None, *, limit: int | None, show: int) -> Iterator[str]:
    """Run the rewards of a stage over the rollouts in `on`, one file (one iteration) after the other as in training; yields the text.

    A stage with `on_failure: stop` does not stop: failures are what is looked for.

    Raises:
        RecipeError: no such stage, or it has no rewards.
        UserError: no such folder or no rollouts in it, or they are of problems that the stage's source does not have.
        RewardError: a reward cannot be loaded.
    """
    stage, judged = _judged(recipe, on, stage_name)
    files = _rollout_files(on, stage.name, judged.split)
    problems = _problems(recipe, judged, base)
    iterations = [_groups(file, problems, stage.name) for file in files]
    if limit is not None:
        iterations = _thinned(iterations, limit)
    total = sum(len(group.trajectories) for groups in iterations for group, _ in groups)
    yield f"stage {stage.name}: {total} responses to {len({g.problem.id for gs in iterations for g, _ in gs})} problems, {len(files)} files"
    rewards = judged.rewards.model_copy(update={"on_failure": "drop"})
    calls = [Calls() for _ in rewards.functions]
    tried: list[Tried] = []
    started = time.monotonic()
    with RewardPool(rewards, base, observe=lambda index, samples, seconds: calls[index].add(samples, seconds)) as pool:
        pool.load()
        yield f"rewards imported in {time.monotonic() - started:.1f} s"
        if any(config.function == "code" for config in rewards.functions):
            yield f"programs run in: {isolation()}"
        started = time.monotonic()
        scorer = Scorer(rewards, pool.run)
        for groups in iterations:
            scored = scorer.score([group for group, _ in groups])
            tried += [
                Tried(prompt=row["prompt"], gold=row["answer"], scored=trajectory, stored=row["reward_parts"])
                for group, (_, rows) in zip(scored, groups, strict=True)
                for trajectory, row in zip(group.trajectories, rows, strict=True)
                if trajectory.finish_reason not in NOT_SCORED
            ]
    seconds = time.monotonic() - started
    if not tried:
        raise UserError(str(on), "no finished response in the rollouts", "give rollouts of a run that got further")
    rate, processes = len(tried) / seconds, rewards.processes
    yield f"{len(tried)} responses scored in {seconds:.1f} s: {rate:.0f} per second, {processes} processes per reward"
    yield from _report(tried, dict(zip(scorer.names, calls, strict=True)), show)


def _report(tried: Sequence[Tried], calls: Mapping[str, Calls], show: int) -> Iterator[str]:
    names = list(calls)
    yield from ("", "latency of a call", *latency_table(calls), "", "scores")
    for name in names:
        failed = sum(f"reward `{name}`," in t.scored.reward_error for t in tried)
        yield from score_histogram(name, [t.scored.reward_parts.get(name) for t in tried], failed)
    yield from ("", "against the stored scores", *changes_of_score(tried, names))
    if failed_lines := failures(tried):
        yield from ("", "failures", *failed_lines)
    if found := disagreements(tried, names):
        yield from ("", "disagreements between rewards")
        for line, examples in found:
            yield line
            for example in examples if show else ():
                yield from sample_text(example)
    yield from ("", f"samples by the verdict of {names[0]}")
    for verdict in ("right", "wrong", "not applicable", "failed"):
        of_verdict = [t for t in tried if verdict_of(t.scored, names[0]) == verdict]
        yield f"{verdict}: {len(of_verdict)} of {len(tried)}"
        for index in range(min(show, len(of_verdict))):
            yield from sample_text(of_verdict[index * len(of_verdict) // show])


def _judged(recipe: Recipe, on: Path, name: str | None) -> tuple[Stage, _Judged]:
    judged = {stage.name: (stage, found) for stage in recipe.stages if (found := _judged_part(stage)) is not None}
    if name is not None and name not in judged:
        known = f"choose one of {', '.join(judged)}" if judged else "the recipe has none"
        raise RecipeError("--stage", f"no stage `{name}` with rewards", known)
    if name is None:
        folder = on.parent.name if on.suffix == ".parquet" else on.name
        last_rl = [stage.name for stage in recipe.stages if isinstance(stage, RLStage)][-1:]
        name = folder if folder in judged else next(iter(last_rl or judged), None)
    if name is None:
        raise RecipeError(recipe.name, "no stage has rewards", "add an rl or an eval stage")
    stage, found = judged[name]
    if isinstance(stage, RLStage) and stage.evaluation is not None and on.match("eval_*.parquet"):
        found = _Judged(config=stage.evaluation, split="eval")  # one of the evaluations within the stage
    return stage, found


def _judged_part(stage: Stage) -> _Judged | None:
    if isinstance(stage, RLStage):
        return _Judged(config=stage, split="train")
    if isinstance(stage, SFTStage):
        return _Judged(config=stage.gate.evaluation, split="gate") if stage.gate else None
    return _Judged(config=stage, split="eval") if isinstance(stage, EvalStage) else None


def _rollout_files(on: Path, stage: str, split: str) -> list[Path]:
    """Rollout files of a stage in a run folder, its rollouts folder or the stage's folder within; or the one file given."""
    if on.suffix == ".parquet":
        if not on.is_file():
            raise UserError(str(on), "no such file", "give a file or a folder of a run's rollouts")
        return [on]
    if not on.is_dir():
        raise UserError(str(on), "no such folder", "give a run folder or its rollouts/STAGE folder")
    places = (on / "rollouts" / stage, on / stage, on)
    for place in places:
        if files := sorted(place.glob(f"{split}_*.parquet")):
            return files
    raise UserError(str(on), f"no {split}_*.parquet of stage `{stage}` in it", "give rollouts/STAGE of a run that has got to this stage")


def _problems(recipe: Recipe, judged: _Judged, base: Path) -> dict[str, Problem]:
    from bregman.data.sources import read_problems
    from recipes.models import recipe_encoder, recipe_tokenizer

    room, encoder = recipe.engine.max_model_len - judged.max_tokens, recipe_encoder(recipe)
    tokenizer, problems = recipe_tokenizer(recipe), judged.config.problems
    found = read_problems(problems, base, tokenizer, seed=recipe.seed, max_prompt_tokens=room, encoder=encoder)
    return {problem.id: problem for problem in found}


Rows = list[dict[str, Any]]


def _groups(file: Path, problems: Mapping[str, Problem], stage: str) -> list[tuple[Group, Rows]]:
    """The groups of one file, each with its rows.

    Raises:
        UserError: not a rollout file, or of other problems than the stage's.
    """
    import pyarrow

    from bregman.tracking.rollouts import read_rollouts

    try:
        rows = read_rollouts(file, token_ids=True)
    except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
        raise UserError(str(file), f"not a rollout file ({str(error).splitlines()[0]})", "give Parquet files that a run wrote") from None
    unknown = list(dict.fromkeys(row["problem_id"] for row in rows if row["problem_id"] not in problems))
    if unknown:
        known = len({row["problem_id"] for row in rows})
        found = f"{len(unknown)} of {known} problems are not in the source of stage `{stage}`, the first is `{unknown[0]}`"
        raise UserError(str(file), found, "give the recipe and seed that made the rollouts, or another --stage")
    groups: list[Rows] = []
    for row in rows:  # the same problem may come twice in an iteration
        last = groups[-1][-1] if groups else None
        if last is None or last["problem_id"] != row["problem_id"] or row["sample_index"] <= last["sample_index"]:
            groups.append([])
        groups[-1].append(row)
    return [(Group(problem=problems[of[0]["problem_id"]], trajectories=tuple(map(_trajectory, of))), of) for of in groups]


def _trajectory(row: Mapping[str, Any]) -> Trajectory:
    return Trajectory(
        problem_id=row["problem_id"],
        sample_index=row["sample_index"],
        token_ids=tuple(row["token_ids"]),
        logprobs=(),  # no reward sees them
        segments=(),
        finish_reason=row["finish_reason"],
        text=row["response"],
    )


def _thinned(iterations: Sequence[list[tuple[Group, Rows]]], limit: int) -> list[list[tuple[Group, Rows]]]:
    """About `limit` responses in whole groups, evenly spread over all iterations; at least one group."""
    everything = [(index, pair) for index, groups in enumerate(iterations) for pair in groups]
    size = max(1, sum(len(rows) for _, (_, rows) in everything) // max(1, len(everything)))
    count = max(1, min(len(everything), limit // size))
    kept = [everything[number * len(everything) // count] for number in range(count)] if everything else []
    return [groups for index in range(len(iterations)) if (groups := [pair for place, pair in kept if place == index])]
