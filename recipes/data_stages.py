"""Stages that make data sets: problem curation and the long-CoT warm-up set.

Owns the wiring: who samples, what is read, what is written where. Fates are decided in `samplers.curation` and `sft.long_cot`,
chunks are `recipes.sampling`'s.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bregman.chat_client import Endpoint
from bregman.data.images import content_hash
from bregman.data.sources import read_problems, row_columns
from bregman.data.templates import asked_with
from bregman.data.writers import check_rows, write_rows
from bregman.engines.endpoint import EndpointEngine
from bregman.errors import RecipeError
from bregman.protocols import RolloutEngine
from bregman.tracking.run_folder import write_json
from bregman.types import Group, Problem
from recipes.context import Context, data_file
from recipes.sampling import ChunkedSampling
from recipes.schema import CurateStage, LongCoTStage, latest_model
from samplers.curation import Curation, row_of
from sft.long_cot import Fate, count_fates, judge_group, sft_row
from sft.long_cot_config import THINK_MARKS, EndpointGenerator

PARTS = "parts"
"""Folder of a data stage's sampled chunks, within the stage's folder."""


def run_curate(context: Context, stage: CurateStage, model: Path, output: Path) -> None:
    """Leave the problems that are fit for RL, with their difficulty, in `data_file(output)`; `report.json` and `fates.parquet` say
    what was dropped and why.

    Raises:
        DataError: a source cannot be read, or no problem is left.
    """
    tracker = context.tracker
    tracker.waiting_for("the problems")
    problems = context.problems(stage, stage.sampling.max_tokens)
    check_rows([row_of(problem) for problem in problems], f"stage {stage.name}")
    curation = Curation(problems, stage)
    curation.apply_rules()
    evaluation = [problem for source in stage.duplicates.evaluation_sets for problem in _held_out(context, source)]
    curation.drop_duplicates(evaluation, _image_hashes(problems) | _image_hashes(evaluation, "eval:"))
    tracker.note(f"{len(curation.left())} of {len(problems)} problems are left after the rules and duplicates")

    scorer = context.workers.rewards.scorer(stage.rewards, context.base)
    sampling = ChunkedSampling(partial(model_engine, context, model), tracker, output / PARTS, context.recipe.seed)
    if stage.hack is not None:
        left = curation.left()
        draws = sampling.draw(
            "hack",
            left,
            stage.hack.sampling,
            scorer,
            chunk=stage.chunk,
            ask=[asked_with(stage.hack.template, context.tokenizer, context.encoder)],
            prefills=[stage.hack.template.prefill],
            later_chunks=math.ceil(len(left) / stage.chunk),
        )
        for group in (group for groups in draws for group in groups):
            curation.observe_hack(group)
    for groups in sampling.draw("difficulty", curation.left(), stage.sampling, scorer, chunk=stage.chunk):
        for group in groups:
            curation.observe_difficulty(group)
    curation.balance()

    report = curation.report()
    write_rows(output / "fates.parquet", curation.fates(), f"stage {stage.name}")
    say(context, output, sampling.step, report, report["fates"], "problems")
    write_rows(data_file(output), curation.rows(), f"stage {stage.name}")


def run_long_cot(context: Context, stage: LongCoTStage, model: Path, output: Path) -> None:
    """Leave verified long-CoT answers as SFT rows in `data_file(output)`; `report.json` says what became of every sample.

    Raises:
        DataError: the problems cannot be read, or no sample is left.
        ClusterError: the endpoint does not answer.
    """
    tracker = context.tracker
    tracker.waiting_for("the problems")
    problems = context.problems(stage, stage.sampling.max_tokens)
    check_rows([row_columns(problem.messages, (), problem.id) for problem in problems], f"stage {stage.name}")
    templates = [stage.template(name) for name in stage.templates]
    sampling = ChunkedSampling(partial(_generator_engine, context, stage, model), tracker, output / PARTS, context.recipe.seed)
    draws = sampling.draw(
        "samples",
        problems,
        stage.sampling,
        context.workers.rewards.scorer(stage.rewards, context.base),
        chunk=stage.chunk,
        ask=[asked_with(template, context.tokenizer, context.encoder) for template in templates],
        prefills=[template.prefill for template in templates],
    )
    rows: list[dict[str, Any]] = []
    fates: Counter[str] = Counter()
    by_template: dict[str, Counter[str]] = {name: Counter() for name in stage.templates}
    kept_per_problem: Counter[int] = Counter()
    origin = {"generator": _generator_name(context, stage), "seed": context.recipe.seed}
    for groups in draws:
        for group in groups:
            judged = judge_group(group, stage.quality, right_at_least=stage.right_at_least, think_mark=stage.think_mark)
            fates.update(count_fates(judged))
            for one in judged:
                by_template[stage.templates[one.trajectory.sample_index // stage.sampling.num_samples]][str(one.fate)] += 1
            kept = [one for one in judged if one.fate is Fate.KEPT]
            kept_per_problem[len(kept)] += 1
            prompt_end = _prompt_end(context, group)
            row = partial(sft_row, group, prompt_opens=prompt_end, templates=stage.templates, per_template=stage.sampling.num_samples)
            rows += [row(one) | origin for one in kept]
    total = sum(fates.values())
    right = total - sum(fates[fate] for fate in (Fate.UNANSWERED, Fate.REWARD_FAILED, Fate.WRONG))
    tracker.note(f"{right:,} of {total:,} samples are right; {len(rows):,} of them are kept")
    report = {
        "problems": len(problems),
        "samples": total,
        "right": right,
        "fates": dict(fates),
        "templates": {name: {key: count for key, count in counts.items() if count} for name, counts in by_template.items()},
        "problems_by_answers_kept": {str(count): kept_per_problem[count] for count in sorted(kept_per_problem)},
        "mean_tokens_kept": sum(row["num_tokens"] for row in rows) / len(rows) if rows else 0.0,
        **origin,
    }
    say(context, output, sampling.step, report, dict(fates), "samples")
    write_rows(data_file(output), rows, f"stage {stage.name}")


def fate_table(fates: Mapping[str, int], what: str) -> str:
    """Counts as lines of text under their total; fates of none are left out."""
    total, shown = sum(fates.values()), {name: count for name, count in fates.items() if count}
    width = max(map(len, [*shown, what]))
    lines = [f"{name.ljust(width)}  {count:>8,}  {count / total:6.1%}" for name, count in shown.items()]
    return "\n".join([f"{what.ljust(width)}  {total:>8,}", *lines])


def endpoint_key(generator: EndpointGenerator) -> str:
    """The endpoint's key, empty where it needs none.

    Raises:
        RecipeError: the variable that should hold it is not set.
    """
    if not generator.api_key_env:
        return ""
    key = os.environ.get(generator.api_key_env, "")
    if not key:
        raise RecipeError("generator.api_key_env", f"the variable `{generator.api_key_env}` is not set", "export it, or leave the key out")
    return key


def say(context: Context, output: Path, step: int, report: Mapping[str, Any], fates: Mapping[str, int], what: str) -> None:
    """The report on disk and on the console, and its counts as metrics of the last step."""
    write_json(output / "report.json", report)
    for line in fate_table(fates, what).splitlines():
        context.tracker.note(line)
    total = sum(fates.values())
    counts = {f"fate/{name}": float(count) for name, count in fates.items()}
    context.tracker.log(step, {what: float(total), **counts, "yield": fates.get("kept", 0) / total})


def model_engine(context: Context, model: Path) -> RolloutEngine:
    engine = context.workers.engine
    context.tracker.waiting_for("the weights")
    engine.load_weights(model, version=0)
    return engine


def _generator_engine(context: Context, stage: LongCoTStage, model: Path) -> RolloutEngine:
    generator = stage.generator
    if not isinstance(generator, EndpointGenerator):
        return model_engine(context, model)
    endpoint = Endpoint(
        base_url=generator.base_url,
        api_key=endpoint_key(generator),
        timeout=generator.timeout,
        retries=generator.retries,
        backoff=generator.backoff,
        max_requests=generator.max_requests,
        max_tokens_total=generator.max_tokens_total,
    )
    return EndpointEngine(
        endpoint,
        generator.model,
        tokenize=lambda text: context.tokenizer(text, add_special_tokens=False)["input_ids"],
        think_marks=(stage.think_mark, THINK_MARKS[stage.think_mark]),
        concurrency=generator.concurrency,
        extra=generator.extra,
        warn=context.tracker.warn,
    )


def _generator_name(context: Context, stage: LongCoTStage) -> str:
    if isinstance(stage.generator, EndpointGenerator):
        return f"endpoint:{stage.generator.model}"
    index = [other.name for other in context.recipe.stages].index(stage.name)
    return f"model:{stage.start_from or latest_model(context.recipe, index)}"


def _held_out(context: Context, source: Any) -> Sequence[Problem]:
    room = context.recipe.engine.max_model_len
    return read_problems(
        context.source(source), context.base, context.tokenizer, context.recipe.seed, max_prompt_tokens=room, encoder=context.encoder
    )


def _image_hashes(problems: Sequence[Problem], prefix: str = "") -> dict[str, list[str]]:
    return {
        f"{prefix}{problem.id}": [content_hash(image, f"problem {problem.id}") for image in problem.images]
        for problem in problems
        if problem.images
    }


def _prompt_end(context: Context, group: Group) -> str:
    return str(context.tokenizer.decode(group.problem.prompt_ids[-16:], skip_special_tokens=False))
