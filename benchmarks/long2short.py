"""The variants of a finished long2short run (recipes/tiny_long2short) side by side: held-out accuracy against response length.

Prints one Markdown row per eval stage and writes one plot, k1.5 Fig. 7 in small. Only reads the run folder.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bregman.tracking.disk import write_text
from bregman.tracking.svg import Axes, Series, svg_figure, svg_file

Row = Mapping[str, Any]
WIDTH, HEIGHT = 560, 330


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/tiny_long2short"), help="folder of the run")
    parser.add_argument("--long", default="long", help="the stage that every variant is compared with")
    parser.add_argument("--plot", type=Path, help="where the plot goes; by default long2short.svg in the run folder")
    options = parser.parse_args()
    rows = read_variants(options.run)
    if options.long not in [row["variant"] for row in rows]:
        parser.error(f"{options.run} holds no evaluation `after_{options.long}`: run the recipe to its end first")
    print("\n".join(table(rows, options.long)))
    path = options.plot or options.run / "long2short.svg"
    write_text(path, plot(rows, options.long))
    print(f"\nplot: {path}")


def read_variants(run: Path) -> list[dict[str, Any]]:
    """The evaluation of every `after_<stage>`, in the order of the recipe, as `variant`, with the `seconds` of that stage."""
    if not (run / "summary.json").is_file():
        raise SystemExit(f"{run} holds no run: bregman run recipes/tiny_long2short/recipe.yaml")
    summary = {row["name"]: row for row in json.loads((run / "summary.json").read_text())}
    stages = [stage["name"] for stage in yaml.safe_load((run / "recipe.resolved.yaml").read_text())["stages"]]
    names = [name for name in stages if name in summary and name.startswith("after_")]
    made = [name.removeprefix("after_") for name in names]
    return [{**summary[name], "variant": stage, "seconds": summary[stage]["seconds"]} for name, stage in zip(names, made, strict=True)]


def table(rows: Sequence[Row], long: str) -> list[str]:
    """Markdown. The error is the standard error of a share over the answers sampled."""
    base = next(row for row in rows if row["variant"] == long)
    lines = ["| model | accuracy | tokens | of long | cut | second looks | gave up | seconds |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        accuracy, metrics = row["accuracy"], row["metrics"]
        error = math.sqrt(accuracy * (1.0 - accuracy) / (row["num_problems"] * row["samples_per_problem"]))
        share = row["mean_tokens"] / base["mean_tokens"]
        lines.append(
            f"| {row['variant']} | {accuracy:.3f} +- {error:.3f} | {row['mean_tokens']:.1f} | {share:.2f} | {row['truncated']:.1%} "
            f"| {metrics['second_looks']:.2f} | {metrics['gave_up']:.2f} | {row['seconds']:.0f} |"
        )
    return lines


def plot(rows: Sequence[Row], long: str) -> str:
    """A standalone SVG: a named point per model, and the accuracy of `long` as a level."""
    points = [Series(name=row["variant"], x=[row["mean_tokens"]], y=[row["accuracy"]], style="points") for row in rows]
    place = [row["variant"] for row in rows].index(long)
    level = Series(
        name="", x=[0.0, 1.06 * max(row["mean_tokens"] for row in rows)], y=[rows[place]["accuracy"]] * 2, style="dashed", color=place
    )
    axes = Axes(title="Held-out accuracy against response length", x_label="mean response tokens", y_range=(0.0, 1.02))
    return svg_file([svg_figure([*points, level], axes, width=WIDTH, height=HEIGHT)], width=WIDTH, height=HEIGHT)


if __name__ == "__main__":
    main()
