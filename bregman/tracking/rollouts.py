"""Rollouts as Parquet: every response of an iteration, with its rewards and its fate, one row each.

Owns the table's columns, writing and reading it. The images of problems lie beside the stages' folders, each content once, as
`images/<hash>.png`; rows hold their names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bregman.data.images import content_hash, named, open_image
from bregman.tracking.disk import written_aside
from bregman.types import Group, Message, Problem, Trajectory

if TYPE_CHECKING:
    import pyarrow

LONGEST_SIDE = 1024
"""Pixels; larger images are kept in this size: they are for looking at."""


def write_rollouts(path: Path, iteration: int, groups: Sequence[Group]) -> None:
    """Write every trajectory of `groups` to the Parquet file `path`, at once, and images that are not there yet beside its folder.

    Raises:
        UserError: no space, or not writable; or an image can no longer be read.
    """
    import pyarrow
    import pyarrow.parquet

    names = [_store_images(group.problem, images_folder(path.parent)) for group in groups]
    rows = [
        _row(iteration, group.problem, trajectory, images)
        for group, images in zip(groups, names, strict=True)
        for trajectory in group.trajectories
    ]
    table = pyarrow.Table.from_pylist(rows, schema=_schema())
    with written_aside(path) as aside:
        pyarrow.parquet.write_table(table, aside, compression="zstd")


def read_rollouts(path: Path, *, token_ids: bool = False) -> list[dict[str, Any]]:
    """Rows of a rollout file without log-probabilities, and without token ids unless asked for; `reward_parts` as a dict."""
    import pyarrow.parquet

    left_out = ("logprobs",) if token_ids else ("logprobs", "token_ids")
    columns = [name for name in _schema().names if name not in left_out]
    rows = pyarrow.parquet.read_table(path, columns=columns).to_pylist()
    return [{**row, "reward_parts": dict(row["reward_parts"])} for row in rows]


def images_folder(stage_folder: Path) -> Path:
    """Where the images lie that the rollouts in `stage_folder` name."""
    return stage_folder.parent / "images"


def prompt_text(messages: Sequence[Message]) -> str:
    """The user's text where a single user turn asks; several turns as JSON. Images appear as `<image>`."""
    turns = [{"role": message["role"], "content": _content_text(message["content"])} for message in messages]
    asked = [turn for turn in turns if turn["role"] != "system"]
    return asked[0]["content"] if len(asked) == 1 else json.dumps(turns, ensure_ascii=False)


def _content_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(_part_text(part) for part in content)


def _part_text(part: Mapping[str, Any]) -> str:
    return str(part["text"]) if part.get("type") == "text" else f"<{part.get('type', 'part')}>"


def _store_images(problem: Problem, folder: Path) -> list[str]:
    """Names of the problem's images, written to `folder` unless they are there."""
    names = []
    for index, payload in enumerate(problem.images):
        where = named(f"problem {problem.id}", index, len(problem.images))
        path = folder / f"{content_hash(payload, where)}.png"
        if not path.exists():
            image = open_image(payload, where)
            if max(image.size) > LONGEST_SIDE:
                image = image.copy()
                image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            with written_aside(path) as aside:
                image.save(aside, "PNG")
        names.append(path.name)
    return names


def _row(iteration: int, problem: Problem, trajectory: Trajectory, images: list[str]) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "problem_id": problem.id,
        "sample_index": trajectory.sample_index,
        "source": problem.source,
        "difficulty": problem.difficulty,
        "prompt": prompt_text(problem.messages),
        "images": images,
        "answer": problem.answer,
        "response": trajectory.text,
        "num_tokens": len(trajectory.token_ids),
        "token_ids": trajectory.token_ids,
        "logprobs": trajectory.logprobs,
        "segments": [{"policy_version": segment.policy_version, "length": segment.length} for segment in trajectory.segments],
        "finish_reason": trajectory.finish_reason,
        "reward": trajectory.reward,
        "reward_parts": list(trajectory.reward_parts.items()),
        "reward_error": trajectory.reward_error,
        "advantage": trajectory.advantage,
        "fate": None if trajectory.fate is None else str(trajectory.fate),
    }


def _schema() -> pyarrow.Schema:
    import pyarrow as pa

    return pa.schema(
        {
            "iteration": pa.int32(),
            "problem_id": pa.string(),
            "sample_index": pa.int32(),
            "source": pa.string(),
            "difficulty": pa.float64(),
            "prompt": pa.string(),
            "images": pa.list_(pa.string()),
            "answer": pa.string(),
            "response": pa.string(),
            "num_tokens": pa.int32(),
            "token_ids": pa.list_(pa.int32()),
            "logprobs": pa.list_(pa.float32()),
            "segments": pa.list_(pa.struct({"policy_version": pa.int32(), "length": pa.int32()})),
            "finish_reason": pa.string(),
            "reward": pa.float64(),
            "reward_parts": pa.map_(pa.string(), pa.float64()),
            "reward_error": pa.string(),
            "advantage": pa.float64(),
            "fate": pa.string(),
        }
    )
