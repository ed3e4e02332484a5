"""The tiny Kimi-VL over several seeds (model, SFT data, problem order and sampling vary): accuracy on the same held-out problems.

Prints one Markdown row per seed. A run that is finished already is only read.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "tiny_kimi_vl" / "recipe.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/tiny_kimi_vl_seeds"))
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="passed on to `bregman run`")
    options = parser.parse_args()
    print("| seed | images | of these searches | of these scans | text | gave up on images | tokens on images | SFT / RL / all seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for seed in options.seeds:
        print(_row(seed, _run(seed, options.output_dir / str(seed), options.overrides)), flush=True)


def _run(seed: int, folder: Path, overrides: list[str]) -> dict[str, dict]:
    """summary.json of the seed's run, by stage name."""
    sets = [part for override in (f"seed={seed}", f"output_dir={folder}", *overrides) for part in ("--set", override)]
    subprocess.run([sys.executable, "-m", "recipes.cli", "run", str(RECIPE), *sets], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return {row["name"]: row for row in json.loads((ROOT / folder / "summary.json").read_text())}


def _row(seed: int, stages: dict[str, dict]) -> str:
    """Every figure before -> after RL."""

    def change(part: str, metric: str, digits: int = 3) -> str:
        before, after = (stages[f"{part}_{when}_rl"] for when in ("before", "after"))
        return " -> ".join(f"{row.get(metric, row['metrics'].get(metric, 0.0)):.{digits}f}" for row in (before, after))

    sft = sum(stages[name]["seconds"] for name in ("reading", "joint_sft", "long_cot_sft"))
    total = sum(row["seconds"] for row in stages.values())
    cells = (
        f"**{change('images', 'accuracy')}**",
        change("images", "right_search"),
        change("images", "right_scan"),
        change("text", "accuracy"),
        change("images", "gave_up", 2),
        change("images", "mean_tokens", 0),
        f"{sft:.0f} / {stages['rl']['seconds']:.0f} / {total:.0f}",
    )
    return f"| {seed} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
