"""The report of a run: one HTML page that needs no network and no script.

Owns the page. What it shows comes from `run_data` and `charts`; written anew after every stage, so it also reads unfinished runs.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from bregman.tracking.charts import is_rl, learning_curve, stage_charts, watch_charts
from bregman.tracking.console import duration
from bregman.tracking.disk import write_text
from bregman.tracking.rollouts import images_folder
from bregman.tracking.run_data import RunData, StageData, primary_reward, read_run, sample_rollouts
from bregman.tracking.run_folder import RunFolder
from bregman.tracking.svg import DARK, LIGHT, STYLE

_LONGEST_TEXT = 6000
"""Characters of a prompt or response shown; the middle of longer ones is left out."""
_MOST_IMAGES, _LONGEST_SIDE = 4, 320
"""Images shown of a problem, and pixels of their longer side."""
_MOST_WARNINGS = 200
_WATCH = "reward hacking watch: "
"""With this the warnings of `rl.hacking_watch` begin."""

_CSS = (
    f":root{{color-scheme:light dark;{LIGHT}}}@media(prefers-color-scheme:dark){{:root{{{DARK}}}}}{STYLE}"
    + """
*{box-sizing:border-box} body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 24px 60px} h1{font-size:26px;margin:0} h2{font-size:19px;margin:38px 0 12px}
h3{font-size:15px;margin:18px 0 8px} .faint{color:var(--faint)} p{margin:4px 0 14px}
.table{overflow-x:auto} table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:6px 12px;border-bottom:1px solid var(--rule)} th{font-weight:600;color:var(--faint);font-size:13px}
th:first-child,td:first-child,th:nth-child(2),td:nth-child(2){text-align:left} td small{color:var(--faint)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(340px,1fr));gap:14px}
.charts.wide{grid-template-columns:repeat(auto-fit,minmax(420px,1fr))}
.charts>div,.sample{border:1px solid var(--rule);border-radius:8px;padding:8px;background:var(--paper)} svg{display:block;width:100%}
.samples{display:grid;grid-template-columns:repeat(auto-fit,minmax(380px,1fr));gap:14px} .sample{padding:12px;min-width:0}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--soft);border-radius:6px;padding:10px;margin:6px 0 10px;max-height:420px;
overflow:auto;font:12.5px/1.45 ui-monospace,monospace} .mark{font-weight:600} .right{color:var(--c2)} .wrong{color:var(--c6)}
details{margin:10px 0} summary{cursor:pointer;font-weight:600} .warnings{border-left:3px solid var(--c1);max-height:300px}
figure{margin:6px 0;display:flex;flex-wrap:wrap;gap:8px;align-items:flex-end;font-size:13px} figure img{max-width:100%}
dl{display:grid;grid-template-columns:auto 1fr;gap:0 12px;margin:0;font-size:13px} dt{color:var(--faint)} dd{margin:0}
"""
)


def write_report(run_folder: Path) -> Path:
    """Write `report.html` of the run at `run_folder`, finished or not, and return its path.

    Raises:
        UserError: it cannot be written, or the recipe in the folder is damaged.
    """
    folder = RunFolder(run_folder)
    run = read_run(folder)
    sections = [_head(run), _stage_table(run), _section("Learning curve", _charts(learning_curve(run), wide=True))]
    sections += [_stage(folder, stage) for stage in run.stages if stage.curves]
    sections += [_watch(run), _warnings(run), _recipe(run)]
    title = escape(run.name)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title><style>{_CSS}</style>'
    write_text(
        folder.report_file, f'<!doctype html><html lang="en"><head>{head}</head><body><main>{"".join(sections)}</main></body></html>\n'
    )
    return folder.report_file


def _head(run: RunData) -> str:
    finished = sum(stage.summary is not None for stage in run.stages)
    state = f"{finished} of {len(run.stages)} stages finished in {duration(run.seconds)}"
    if run.updated is not None:
        state += f", last step at {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(run.updated))}"
    return f'<h1>{escape(run.name)}</h1><p class="faint">{state}</p>'


def _stage_table(run: RunData) -> str:
    header = "".join(
        f"<th>{name}</th>" for name in ("stage", "kind", "time", "accuracy", "pass@k", "mean response tokens", "cut", "problems")
    )
    return f'<div class="table"><table><tr>{header}</tr>{"".join(_stage_row(stage) for stage in run.stages)}</table></div>'


def _stage_row(stage: StageData) -> str:
    row = stage.summary or {}
    problems = f"{row['num_problems']} <small>x {row['samples_per_problem']}</small>" if "num_problems" in row else ""
    cells = (
        escape(stage.name),
        escape(stage.kind),
        duration(row["seconds"]) if row else _progress(stage),
        f"{'' if stage.kind == 'eval' else '<small>gate</small> '}<b>{row['accuracy']:.3f}</b>" if "accuracy" in row else "",
        f"{row['pass_at_k']:.3f}" if "pass_at_k" in row else "",
        f"{row['mean_tokens']:.1f}" if "mean_tokens" in row else "",
        f"{row['truncated']:.1%}" if "truncated" in row else "",
        problems,
    )
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _progress(stage: StageData) -> str:
    done = max((curve.steps[-1] + 1 for curve in stage.curves.values()), default=0)
    if not done:
        return '<span class="faint">not begun</span>'
    return f'<span class="faint">{done}{f" of {stage.planned_steps}" if stage.planned_steps else ""} steps</span>'


def _stage(folder: RunFolder, stage: StageData) -> str:
    charts, samples = stage_charts(stage), sample_rollouts(folder, stage.name)
    parts = [_charts(charts)] if charts else []
    if samples:
        parts.append("<h3>Sample responses</h3>")
        label = "iteration {}" if is_rl(stage) else "evaluation at step {}"
        images = images_folder(folder.rollouts_folder(stage.name))
        parts += [_samples(label.format(step), rows, images, opened=step == samples[-1][0]) for step, rows in samples]
    return _section(f"Stage {escape(stage.name)}", "".join(parts)) if parts else ""


def _samples(label: str, rows: list[dict[str, Any]], images: Path, opened: bool) -> str:
    shown = "".join(_sample(row, images) for row in rows)
    return f'<details{" open" if opened else ""}><summary>{label}</summary><div class="samples">{shown}</div></details>'


def _sample(row: Mapping[str, Any], images: Path) -> str:
    right = (primary_reward(row) or 0.0) >= 1.0
    mark = f'<span class="mark {"right" if right else "wrong"}">{"right" if right else "wrong"}</span>'
    facts = {
        "reward": _number(row["reward"]),
        **{f"reward: {name}": _number(value) for name, value in row["reward_parts"].items()},
        "advantage": _number(row["advantage"]),
        "finish": row["finish_reason"],
        "fate": row["fate"],
        "gold answer": row["answer"],
        "reward error": row["reward_error"],
    }
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items() if value not in (None, ""))
    where = f"problem {escape(row['problem_id'])}, sample {row['sample_index']}, {row['num_tokens']} tokens"
    texts = f"{_images(row['images'], images)}<pre>{_text(row['prompt'])}</pre><pre>{_text(row['response'])}</pre>"
    return f'<div class="sample">{mark} <span class="faint">{where}</span>{texts}<dl>{listed}</dl></div>'


def _images(names: list[str], folder: Path) -> str:
    """The problem's images, small and within the page."""
    if not names:
        return ""
    left_out = len(names) - _MOST_IMAGES
    more = f'<span class="faint">and {left_out} more</span>' if left_out > 0 else ""
    return f"<figure>{''.join(_image(folder / Path(name).name) for name in names[:_MOST_IMAGES])}{more}</figure>"


def _image(path: Path) -> str:
    from PIL import Image

    small = io.BytesIO()
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
            image.save(small, "PNG")
    except (OSError, ValueError, SyntaxError):
        return f'<span class="faint">{escape(path.name)} cannot be read</span>'
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(small.getvalue()).decode()}">'


def _watch(run: RunData) -> str:
    """Signs of reward hacking: the charts of every stage that was watched, and what was warned about."""
    body = "".join(f"<h3>{escape(stage.name)}</h3>{_charts(charts)}" for stage in run.stages if (charts := watch_charts(stage)))
    if not body:
        return ""
    warned = [line for line in run.warnings if _WATCH in line][-_MOST_WARNINGS:]
    said = f'<pre class="warnings">{escape(chr(10).join(warned))}</pre>' if warned else '<p class="faint">nothing was warned about</p>'
    return _section("Reward hacking watch", said + body)


def _warnings(run: RunData) -> str:
    if not run.warnings:
        return ""
    shown = run.warnings[-_MOST_WARNINGS:]
    left_out = f"<p class='faint'>the last {len(shown)} of {len(run.warnings)}</p>" if len(shown) < len(run.warnings) else ""
    return _section("Warnings", f'{left_out}<pre class="warnings">{escape(chr(10).join(shown))}</pre>')


def _recipe(run: RunData) -> str:
    if not run.recipe:
        return ""
    return _section("Recipe", f"<details><summary>resolved, with all defaults</summary><pre>{escape(run.recipe)}</pre></details>")


def _charts(figures: list[str], wide: bool = False) -> str:
    return f'<div class="charts{" wide" if wide else ""}">{"".join(f"<div>{figure}</div>" for figure in figures)}</div>'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def _text(text: str) -> str:
    if len(text) > _LONGEST_TEXT:
        half = _LONGEST_TEXT // 2
        text = f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"
    return escape(text)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
