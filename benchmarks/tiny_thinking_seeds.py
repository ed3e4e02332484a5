"""The demo over several seeds (model, SFT data, problem order and sampling all vary): accuracy on the same 256 held-out problems.

Prints one Markdown row per seed. A run that is finished already is only read.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "tiny_thinking" / "recipe.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="passed on to `bregman run`")
    options = parser.parse_args()
    print("| seed | joint SFT | long-CoT SFT | OPMD | gave up before -> after RL | tokens before -> after RL | SFT / RL seconds |")
    print("|---|---|---|---|---|---|---|")
    for seed in options.seeds:
        print(_row(seed, _run(seed, options.output_dir / str(seed), options.overrides)), flush=True)


def _run(seed: int, folder: Path, overrides: list[str]) -> dict[str, dict]:
    """summary.json of the seed's run, by stage name."""
    sets = [part for override in (f"seed={seed}", f"output_dir={folder}", *overrides) for part in ("--set", override)]
    subprocess.run([sys.executable, "-m", "recipes.cli", "run", str(RECIPE), *sets], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return {row["name"]: row for row in json.loads((ROOT / folder / "summary.json").read_text())}


def _row(seed: int, stages: dict[str, dict]) -> str:
    joint, before, after = (stages[name] for name in ("after_joint_sft", "after_long_cot_sft", "after_rl"))
    sft = stages["joint_sft"]["seconds"] + stages["long_cot_sft"]["seconds"]
    return (
        f"| {seed} | {joint['accuracy']:.3f} | {before['accuracy']:.3f} | **{after['accuracy']:.3f}** "
        f"| {before['metrics']['gave_up']:.2f} -> {after['metrics']['gave_up']:.2f} "
        f"| {before['mean_tokens']:.0f} -> {after['mean_tokens']:.0f} | {sft:.0f} / {stages['rl']['seconds']:.0f} |"
    )


if __name__ == "__main__":
    main()
