"""Rejection sampling for short answers as a stage: sample, choose, write.

Owns the wiring and the rows. What is chosen is decided in `sft.long2short`, chunks are `recipes.sampling`'s.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from bregman.data.sources import row_columns
from bregman.data.writers import check_rows, write_rows
from bregman.errors import DataError
from bregman.types import Group
from recipes.context import Context, data_file
from recipes.data_stages import PARTS, model_engine, say
from recipes.sampling import ChunkedSampling
from recipes.schema import Recipe, RejectionStage, latest_model
from sft.long2short import preference_pairs, shortest_right


def run_rejection(context: Context, stage: RejectionStage, model: Path, output: Path) -> None:
    """Leave the chosen answers in `data_file(output)`, as conversations or as preference pairs; `report.json` says what became of
    every problem.

    Raises:
        DataError: the problems cannot be read, have images though pairs are wanted, or no row is left.
    """
    context.tracker.waiting_for("the problems")
    problems = context.problems(stage, stage.sampling.max_tokens)
    check_rows([row_columns(problem.messages, (), problem.id) for problem in problems], f"stage {stage.name}")
    shown = next((problem for problem in problems if problem.images), None)
    if stage.keep == "pairs" and shown is not None:
        raise DataError(f"problem {shown.id}", "has images; preference tuning takes text only", "use `keep: shortest`, or text problems")
    parts = _parts_to_share(context, stage) or output / PARTS
    sampling = ChunkedSampling(partial(model_engine, context, model), context.tracker, parts, context.recipe.seed)
    scorer = context.workers.rewards.scorer(stage.rewards, context.base)
    rows: list[dict[str, Any]] = []
    fates: Counter[str] = Counter()
    tokens: list[int] = []
    for groups in sampling.draw("samples", problems, stage.sampling, scorer, chunk=stage.chunk):
        for group in groups:
            chosen = _shortest_rows(group) if stage.keep == "shortest" else _pair_rows(group, stage)
            fates[_fate(group, chosen)] += 1
            rows += chosen
            tokens += [len(t.token_ids) for t in group.trajectories]
    report = {
        "problems": len(problems),
        "rows": len(rows),
        "fates": dict(fates),
        "mean_tokens_sampled": sum(tokens) / len(tokens),
        "mean_tokens_chosen": sum(row["num_tokens"] for row in rows) / len(rows) if rows else 0.0,
    }
    say(context, output, sampling.step, report, fates, "problems")
    write_rows(data_file(output), rows, f"stage {stage.name}")


def _parts_to_share(context: Context, stage: RejectionStage) -> Path | None:
    """The samples of a finished stage that asked the same of the same model: sampling again would make the same ones."""
    stages = context.recipe.stages
    asked = _question(context.recipe, stage)
    for index, earlier in enumerate(stages[: stages.index(stage)]):
        folder = context.folder.stage_folder(index, earlier.name)
        if isinstance(earlier, RejectionStage) and _question(context.recipe, earlier) == asked and data_file(folder).exists():
            context.tracker.note(f"takes the samples of stage {earlier.name}")
            return folder / PARTS
    return None


def _question(recipe: Recipe, stage: RejectionStage) -> tuple[Any, ...]:
    model = stage.start_from or latest_model(recipe, recipe.stages.index(stage))
    return model, stage.problems, stage.sampling, stage.rewards, stage.chunk


def _fate(group: Group, rows: list[dict[str, Any]]) -> str:
    if rows:
        return "kept"
    return "never_right" if shortest_right(group) is None else "nothing_to_reject"


def _shortest_rows(group: Group) -> list[dict[str, Any]]:
    sample = shortest_right(group)
    if sample is None or not sample.text.strip():
        return []
    problem, messages = group.problem, [*group.problem.messages, {"role": "assistant", "content": sample.text.strip()}]
    columns = row_columns(messages, problem.images, problem.id)
    return [{"id": problem.id, **columns, "source": problem.source, "num_tokens": len(sample.token_ids)}]


def _pair_rows(group: Group, stage: RejectionStage) -> list[dict[str, Any]]:
    pairs = sorted(preference_pairs(group, longer=stage.longer), key=lambda pair: -len(pair[1].token_ids))
    return [
        {
            "id": f"{group.problem.id}#{rejected.sample_index}",
            "prompt": [dict(message) for message in group.problem.messages],
            "chosen": chosen.text.strip(),
            "rejected": rejected.text.strip(),
            "source": group.problem.source,
            "rejected_is_right": (rejected.primary or 0.0) >= 1.0,
            "num_tokens": len(chosen.token_ids),
            "rejected_tokens": len(rejected.token_ids),
        }
        for chosen, rejected in pairs[: stage.max_pairs]
        if chosen.text.strip() and rejected.text.strip() and chosen.text.strip() != rejected.text.strip()
    ]
