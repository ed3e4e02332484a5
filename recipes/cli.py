"""The command `bregman`: run, check, show, eval, report, export, rewards.

Owns arguments and how errors are shown: a `UserError` as one line, anything else as a traceback. Heavy libraries are imported by the
commands that need them.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from bregman.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 interrupted, 2 user error."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: several worker processes share the cores
    signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        options.command(options)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bregman", description="Joint SFT, long-CoT SFT and OPMD from one recipe.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = _recipe_command(commands, "run", _run, "run a recipe; finished stages are skipped, an unfinished one is resumed")
    run.add_argument("--stage", help="run only this stage")
    run.add_argument("--fresh", action="store_true", help="move an existing run folder aside and start anew")

    _recipe_command(commands, "check", _check, "validate a recipe, look at its data and rewards, and say what a run would do")

    show = _recipe_command(commands, "show", _show, "print conversations of a supervised stage, trained tokens coloured")
    show.add_argument("--stage", help="which supervised stage; default: all")
    show.add_argument("--count", type=int, default=3, help="conversations per source")

    evaluate = _recipe_command(commands, "eval", _eval, "evaluate a model folder with an eval stage of a recipe")
    evaluate.add_argument("--stage", help="which eval stage; default: the last one")
    evaluate.add_argument("--model", type=Path, required=True, help="HF folder, e.g. runs/x/stages/02_rl/model")

    report = commands.add_parser("report", help="write report.html of a run anew and print its table")
    report.add_argument("run", type=Path, help="run folder")
    report.add_argument("--figure", type=Path, help="also write the learning curve as an SVG file")
    report.set_defaults(command=_report)

    export = commands.add_parser("export", help="copy the model that a stage left, in Hugging Face format")
    export.add_argument("run", type=Path, help="run folder")
    export.add_argument("--stage", help="which stage; default: the last finished one with a model")
    export.add_argument("--to", type=Path, required=True, help="folder to make")
    export.set_defaults(command=_export)

    from recipes.reward_commands import add_commands

    add_commands(commands)
    return parser


def _recipe_command(commands, name, function, help_text) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]
    command = commands.add_parser(name, help=help_text)
    command.add_argument("recipe", type=Path, help="recipe YAML")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override, e.g. seed=1")
    command.add_argument("--address", help="Ray cluster: local, auto or ray://host:port; short for --set cluster.address=")
    command.set_defaults(command=function)
    return command


def _load(options: argparse.Namespace):  # type: ignore[no-untyped-def]
    from recipes.schema import load_recipe

    address = [f"cluster.address={options.address}"] if options.address else []
    return load_recipe(options.recipe, [*options.overrides, *address])


def _run(options: argparse.Namespace) -> None:
    recipe = _load(options)
    from bregman.tracking.console import print_summary
    from recipes.runner import run

    report = run(recipe, options.recipe.resolve().parent, only=options.stage, fresh=options.fresh)
    print_summary(Path(recipe.output_dir))
    print(f"report: {report}")


def _check(options: argparse.Namespace) -> None:
    recipe = _load(options)
    from recipes.check import check

    check(recipe, options.recipe.resolve().parent)


def _show(options: argparse.Namespace) -> None:
    recipe = _load(options)
    from recipes.check import show

    show(recipe, options.recipe.resolve().parent, options.stage, options.count)


def _eval(options: argparse.Namespace) -> None:
    recipe = _load(options)
    from recipes.standalone import evaluate_model

    evaluate_model(recipe, options.recipe.resolve().parent, options.model, options.stage)


def _report(options: argparse.Namespace) -> None:
    from bregman.tracking.charts import write_learning_curve
    from bregman.tracking.console import print_summary
    from bregman.tracking.report import write_report

    if not (options.run / "recipe.resolved.yaml").exists():
        raise UserError(str(options.run), "not a run folder (no recipe.resolved.yaml)", "give the `output_dir` of a recipe")
    report = write_report(options.run)
    if options.figure:
        write_learning_curve(options.run, options.figure)
    print_summary(options.run)
    print(f"report: {report}")


def _export(options: argparse.Namespace) -> None:
    from recipes.standalone import export_model

    print(f"exported to {export_model(options.run, options.stage, options.to)}")


def _as_interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
