"""Which charts a run gets: the learning curve over all stages, and a set per RL and per SFT stage.

Owns the choice of curves and their scales; drawing is `svg`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bregman.tracking.disk import write_text
from bregman.tracking.run_data import Curve, RunData, StageData, read_run
from bregman.tracking.run_folder import RunFolder
from bregman.tracking.svg import Axes, Series, svg_figure, svg_file
from bregman.types import Fate

_SMOOTH_FROM = 60
"""Curves of at least this many points are shown smoothed over their raw values."""
_FATE_COLORS = {fate: color for fate, color in zip(Fate, (2, 5, 1, 6, 4, 3, 0), strict=True)}


def write_learning_curve(run_folder: Path, path: Path) -> Path:
    """Write the learning curve of the run at `run_folder` as a standalone SVG file and return its path."""
    write_text(path, svg_file(learning_curve(read_run(RunFolder(run_folder)))))
    return path


def learning_curve(run: RunData) -> list[str]:
    """Two figures: accuracy and mean response length over RL iterations, with the levels that earlier stages left as dashed lines.

    Accuracy of an iteration is that of the policy it started with; the evaluation after RL stands behind the last iteration.
    """
    rl_stages = [stage for stage in run.stages if is_rl(stage)]
    if not rl_stages:
        return [_across_stages(run, "accuracy"), _across_stages(run, "mean_tokens")]
    return [_curve_with_levels(run, rl_stages, key) for key in ("accuracy", "mean_tokens")]


def stage_charts(stage: StageData) -> list[str]:
    """The charts of one stage, as many as it has curves for."""
    if is_rl(stage):
        return _rl_charts(stage)
    return _sft_charts(stage) if "loss" in stage.curves else _sampling_charts(stage)


def watch_charts(stage: StageData) -> list[str]:
    """The charts of the reward hacking watch of an RL stage: shares, and changes against the running means."""
    watched = {name.removeprefix("watch/").replace("_", " "): name for name in stage.curves if name.startswith("watch/")}
    jumps = {label: name for label, name in watched.items() if name.endswith("_jump")}
    shares = {label.replace("agreement/", "agreement with "): name for label, name in watched.items() if label not in jumps}
    figures = [
        _lines(stage, shares, Axes(title="Share of right answers / of responses", y_range=(0.0, 1.02))),
        _lines(stage, jumps, Axes(title="Change against the running mean (length: relative)")),
    ]
    return [figure for figure in figures if figure]


def is_rl(stage: StageData) -> bool:
    """Whether it is an RL stage that has begun."""
    return stage.kind == "rl" and "response_tokens/mean" in stage.curves


def _across_stages(run: RunData, key: str) -> str:
    rows = [stage.summary for stage in run.stages if stage.kind == "eval" and stage.summary]
    series = Series(name="", x=range(len(rows)), y=[row[key] for row in rows])
    points = Series(name="", x=range(len(rows)), y=[row[key] for row in rows], style="points", color=0)
    title = "Accuracy after each stage" if key == "accuracy" else "Mean response tokens after each stage"
    axes = Axes(title=title, x_names=[str(row["name"]) for row in rows], y_range=(0.0, 1.02) if key == "accuracy" else None)
    return svg_figure([series, points], axes)


def _curve_with_levels(run: RunData, rl_stages: Sequence[StageData], key: str) -> str:
    train, held_out = ("accuracy", "eval/accuracy") if key == "accuracy" else ("response_tokens/mean", "eval/mean_tokens")
    sampled_x: list[float] = []
    sampled_y: list[float | None] = []
    held_x: list[float] = []
    held_y: list[float | None] = []
    offset = 0
    for stage in rl_stages:
        curve, evaluations = stage.curves[train], stage.curves.get(held_out, Curve(steps=(), values=()))
        sampled_x += [offset + step for step in curve.steps]
        sampled_y += curve.values
        held_x += [offset + step for step in evaluations.steps]
        held_y += evaluations.values
        offset += curve.steps[-1] + 1
        after = _evaluation_after(run, stage, key)
        if after is not None:
            held_x.append(offset)
            held_y.append(after)
    series = [
        Series(name="training problems", x=sampled_x, y=sampled_y),
        Series(name="held-out problems", x=held_x, y=held_y, color=1),
        Series(name="", x=held_x, y=held_y, style="points", color=1),
    ]
    before = run.stages[: run.stages.index(rl_stages[0])]  # eval stages only: a gate may ask other questions
    levels = [stage.summary for stage in before if stage.kind == "eval" and stage.summary]
    series += [
        Series(
            name=f"after {row['name'].removeprefix('after_')}", x=(0, offset), y=(row[key], row[key]), style="dashed", color=2 + index % 5
        )
        for index, row in enumerate(levels)
    ]
    title = "Accuracy" if key == "accuracy" else "Mean response length, tokens"
    return svg_figure(series, Axes(title=title, x_label="RL iteration", y_range=(0.0, 1.02) if key == "accuracy" else None))


def _evaluation_after(run: RunData, stage: StageData, key: str) -> float | None:
    """What the evaluation of the model that `stage` left says: its own, or that of the eval stage that follows."""
    index = run.stages.index(stage)
    for candidate in run.stages[index : index + 2]:
        if candidate.summary and key in candidate.summary and (candidate is stage or candidate.kind == "eval"):
            return float(candidate.summary[key])
    return None


def _rl_charts(stage: StageData) -> list[str]:
    rewards = [name for name in stage.curves if name.startswith("reward/") and name != "reward/mean"]
    lengths = {"mean": "response_tokens/mean", "longest": "response_tokens/max"}
    rates = {"groups with signal": "groups_with_signal", "cut at the limit": "truncated"}
    parity = {"largest": "parity/logprob_diff_max", "mean": "parity/logprob_diff_mean"}
    phases = [name for name in stage.curves if name.startswith("time/")]
    policy = {
        "|log-ratio|": "policy/log_ratio_abs",
        "KL to the start of the iteration": "policy/kl",
        "KL to the fixed model": "policy/kl_fixed",
    }
    held_out = {"held-out": "eval/accuracy", "held-out pass@k": "eval/pass_at_k"}
    sampler = [name for name in stage.curves if name.startswith("sampler/")]
    figures = [
        _lines(stage, {"training": "accuracy", **held_out}, Axes(title="Accuracy (pass rate)", y_range=(0.0, 1.02))),
        _lines(stage, {"total": "reward/mean", **{name.removeprefix("reward/"): name for name in rewards}}, Axes(title="Reward")),
        _lines(stage, lengths, Axes(title="Response length, tokens")),
        _lines(stage, rates, Axes(title="Share of groups / of responses", y_range=(0.0, 1.02))),
        _ledger(stage),
        _lines(stage, {"": "loss"}, Axes(title="Loss")),
        _lines(stage, {"": "grad_norm"}, Axes(title="Gradient norm")),
        _lines(stage, policy, Axes(title="Distance from the iteration's start policy, nats")),
        _lines(stage, parity, Axes(title="Learner against rollout engine, |log-prob difference|, nats", log_y=True)),
        _stack(stage, {name.removeprefix("time/"): name for name in phases}, "Seconds of an iteration by phase"),
        _lines(stage, {"": "rollout_tokens_per_second"}, Axes(title="Rollout tokens per second")),
        _lines(stage, {name.removeprefix("sampler/"): name for name in sampler}, Axes(title="Problem sampler")),
    ]
    return [figure for figure in figures if figure]


def _sft_charts(stage: StageData) -> list[str]:
    gate = {"accuracy": "eval/accuracy"}
    preferences = {"chosen": "dpo/chosen", "rejected": "dpo/rejected", "margin": "dpo/margins"}
    figures = [
        _lines(stage, {"": "loss"}, Axes(title="Loss of a pair, nats" if stage.kind == "dpo" else "Loss per trained token, nats")),
        _lines(stage, {"": "grad_norm"}, Axes(title="Gradient norm")),
        _lines(stage, {"": "learning_rate"}, Axes(title="Learning rate")),
        _lines(stage, {"": "tokens_per_second"}, Axes(title="Training tokens per second")),
        _lines(stage, gate, Axes(title="Evaluations of the gate", y_range=(0.0, 1.02))),
        _lines(stage, preferences, Axes(title="Implicit reward of an answer: beta x log-ratio, nats")),
        _lines(stage, {"": "dpo/accuracies"}, Axes(title="Share of pairs in their order", y_range=(0.0, 1.02))),
    ]
    return [figure for figure in figures if figure]


def _sampling_charts(stage: StageData) -> list[str]:
    """Of a stage that samples without training; none of any other."""
    if "response_tokens/mean" not in stage.curves:
        return []
    shares = {"right": "accuracy", "cut at the limit": "truncated"}
    figures = [
        _lines(stage, shares, Axes(title="Share of samples, by chunk", y_range=(0.0, 1.02))),
        _lines(stage, {"": "response_tokens/mean"}, Axes(title="Mean response length, tokens")),
        _lines(stage, {"": "rollout_tokens_per_second"}, Axes(title="Rollout tokens per second")),
    ]
    return [figure for figure in figures if figure]


def _lines(stage: StageData, names: dict[str, str], axes: Axes) -> str:
    """A line chart of the metrics that the stage has, by label; empty text if it has none."""
    series: list[Series] = []
    for color, (label, metric) in enumerate(names.items()):
        curve = stage.curves.get(metric)
        if curve is None or all(value is None for value in curve.values):
            continue
        if len(curve.steps) >= _SMOOTH_FROM and metric != "learning_rate":
            series.append(Series(name="", x=curve.steps, y=curve.values, style="raw", color=color))
            series.append(Series(name=label, x=curve.steps, y=_smooth(curve.values), color=color))
        else:
            series.append(Series(name=label, x=curve.steps, y=curve.values, color=color))
    return svg_figure(series, _with_x_label(axes, stage)) if series else ""


def _ledger(stage: StageData) -> str:
    fates = [fate for fate in Fate if any(stage.curves.get(f"ledger/{fate}", Curve(steps=(), values=())).values)]
    names = {fate.replace("_", " "): f"ledger/{fate}" for fate in fates}
    return _stack(stage, names, "Sample ledger: where responses ended", [_FATE_COLORS[fate] for fate in fates])


def _stack(stage: StageData, names: dict[str, str], title: str, colors: Sequence[int] | None = None) -> str:
    steps = sorted({step for metric in names.values() for step in stage.curves[metric].steps})
    series = []
    for index, (label, metric) in enumerate(names.items()):
        values = dict(zip(stage.curves[metric].steps, stage.curves[metric].values, strict=True))
        color = colors[index] if colors else None
        series.append(Series(name=label, x=steps, y=[values.get(step) or 0.0 for step in steps], style="bars", color=color))
    return svg_figure(series, _with_x_label(Axes(title=title), stage)) if steps else ""


def _with_x_label(axes: Axes, stage: StageData) -> Axes:
    return Axes(title=axes.title, x_label="iteration" if is_rl(stage) else "step", y_range=axes.y_range, log_y=axes.log_y)


def _smooth(values: Sequence[float | None]) -> list[float | None]:
    """Exponential moving average over about a fortieth of the curve, without the bias of its start."""
    keep = 1.0 - 40.0 / max(len(values), 60)
    total = weight = 0.0
    smoothed: list[float | None] = []
    for value in values:
        if value is not None:
            total, weight = keep * total + value, keep * weight + 1.0
        smoothed.append(total / weight if weight else None)
    return smoothed
