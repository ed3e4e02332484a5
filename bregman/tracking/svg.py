"""Charts as SVG text: lines, points and stacked bars over a numeric or a named x axis.

Owns geometry and marks; knows nothing about runs. Colours come from CSS variables of the page, or of the figure when it stands alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import groupby
from typing import Literal

NUM_COLORS = 7
WIDTH, HEIGHT = 460, 250
_MOST_POINTS = 240
"""More points than this are thinned to the extremes of each bucket: a spike must stay visible."""

STYLE = """
.bg{fill:var(--paper)} .frame{stroke:var(--rule);fill:none} .grid{stroke:var(--rule);stroke-width:.6}
.tick,.label,.legend{font:11px system-ui,sans-serif;fill:var(--faint)} .legend{fill:var(--ink)}
.title{font:600 13px system-ui,sans-serif;fill:var(--ink)}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round} .dashed{stroke-dasharray:5 4;stroke-width:1.4} .hover{fill:transparent}
.raw{opacity:.3;stroke-width:1}
"""
LIGHT = (
    "--paper:#fff;--ink:#1f2328;--faint:#656d76;--rule:#d8dee4;--soft:#f6f8fa;--c0:#2563eb;--c1:#d97706;--c2:#059669;--c3:#db2777;"
    "--c4:#7c3aed;--c5:#64748b;--c6:#dc2626"
)
DARK = (
    "--paper:#15181d;--ink:#e6e8eb;--faint:#98a1ab;--rule:#30363d;--soft:#1c2027;--c0:#6ea8fe;--c1:#f5a524;--c2:#34d399;--c3:#f472b6;"
    "--c4:#a78bfa;--c5:#94a3b8;--c6:#f87171"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One curve.

    Attributes:
        name: its legend entry; empty for none.
        x, y: equally many numbers; None or a non-finite y is a gap.
        style: how it is drawn; `raw` is meant for raw values behind a smoothed curve, `dashed` for reference levels.
        color: index into the palette; None takes the series' place in the figure.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    style: Literal["line", "raw", "points", "dashed", "bars"] = "line"
    color: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Axes:
    """What surrounds the curves. `x_names` names the places 0, 1, ... of the x axis; `y_range` fixes the scale; `log_y` needs y > 0."""

    title: str
    x_label: str = ""
    x_names: Sequence[str] = ()
    y_range: tuple[float, float] | None = None
    log_y: bool = False


@dataclass(frozen=True, slots=True)
class _Frame:
    """The plot area in pixels and the data range it shows; y values are log10 on a log axis."""

    left: float
    top: float
    right: float
    bottom: float
    x0: float
    x1: float
    y0: float
    y1: float
    log_y: bool

    def x(self, value: float) -> float:
        return self.left + (value - self.x0) / (self.x1 - self.x0) * (self.right - self.left)

    def y(self, value: float) -> float:
        here = math.log10(value) if self.log_y else value
        return self.bottom - (here - self.y0) / (self.y1 - self.y0) * (self.bottom - self.top)


def svg_figure(series: Sequence[Series], axes: Axes, *, width: int = WIDTH, height: int = HEIGHT) -> str:
    """An `<svg>` element for a page that has `STYLE` and the colour variables. Series of style `bars` are stacked in their order."""
    colored = [replace(one, color=index % NUM_COLORS) if one.color is None else one for index, one in enumerate(series)]
    curves = [curve for one in colored if (curve := _drawable(one, axes.log_y)).x]
    legend = _legend(curves, width)
    if curves:
        frame = _frame(curves, axes, width, height, legend_rows=legend.count("<!--row-->"))
        drawn = [_grid(frame, axes), _bars([one for one in curves if one.style == "bars"], frame)]
        drawn += [_curve(one, frame) for one in curves if one.style != "bars"]
        body = "".join(drawn) + legend
    else:
        body = f'<text class="label" x="{width / 2}" y="{height / 2}" text-anchor="middle">no data yet</text>'
    title = f'<text class="title" x="12" y="18">{escape(axes.title)}</text>'
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(axes.title)}">{title}{body}</svg>'


def svg_file(figures: Sequence[str], *, width: int = WIDTH, height: int = HEIGHT) -> str:
    """A standalone SVG file: figures of `svg_figure` of that size side by side, light or dark as the reader's system is."""
    total = width * len(figures)
    sized = (
        figure.replace("<svg ", f'<svg x="{place * width}" width="{width}" height="{height}" ', 1) for place, figure in enumerate(figures)
    )
    style = f"<style>svg{{{LIGHT}}}@media(prefers-color-scheme:dark){{svg{{{DARK}}}}}{STYLE}</style>"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{height}" viewBox="0 0 {total} {height}">'
    return f'{head}{style}<rect class="bg" width="{total}" height="{height}"/>{"".join(sized)}</svg>\n'


def _drawable(series: Series, log_y: bool) -> Series:
    """The series with every y that cannot be shown as None, thinned; empty if nothing is left."""
    ys = [None if y is None or not math.isfinite(y) or (log_y and y <= 0) else float(y) for y in series.y]
    xs = list(series.x)
    if all(y is None for y in ys):
        return replace(series, x=(), y=())
    if len(xs) > _MOST_POINTS:
        bucket = math.ceil(2 * len(xs) / _MOST_POINTS)
        keep = list(range(0, len(xs), bucket)) if series.style == "bars" else _extremes(ys, bucket)  # stacked bars share their places
        xs, ys = [xs[i] for i in keep], [ys[i] for i in keep]
    return replace(series, x=xs, y=ys)


def _extremes(ys: Sequence[float | None], bucket: int) -> list[int]:
    """Indices of the lowest and the highest value of each `bucket` values, and of the last one."""
    keep = {len(ys) - 1}
    for start in range(0, len(ys), bucket):
        present = [i for i in range(start, min(start + bucket, len(ys))) if ys[i] is not None]
        if present:
            keep |= {min(present, key=lambda i: ys[i]), max(present, key=lambda i: ys[i])}  # type: ignore[arg-type, return-value]
    return sorted(keep)


def _frame(curves: Sequence[Series], axes: Axes, width: int, height: int, *, legend_rows: int) -> _Frame:
    xs = [x for one in curves for x in one.x]
    x0, x1 = (-0.5, len(axes.x_names) - 0.5) if axes.x_names else (min(xs), max(xs))
    if any(one.style == "bars" for one in curves):
        x0, x1 = x0 - 0.5, x1 + 0.5
    if x0 == x1:
        x0, x1 = x0 - 0.5, x1 + 0.5
    y0, y1 = axes.y_range or _y_range(curves, axes.log_y)
    bottom = height - (38 if axes.x_label else 24)
    return _Frame(52, 30 + 16 * legend_rows, width - 14, bottom, x0, x1, y0, y1, axes.log_y)


def _y_range(curves: Sequence[Series], log_y: bool) -> tuple[float, float]:
    ys = [y for one in curves if one.style != "bars" for y in one.y if y is not None]
    bars = [one for one in curves if one.style == "bars"]
    if bars:
        ys += [0.0, *(sum(y or 0.0 for y in stack) for stack in zip(*(one.y for one in bars), strict=True))]
    if log_y:
        first, last = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
        return (first, last) if last > first else (first - 1, last + 1)
    low, high = min(ys), max(ys)
    if low == high:
        low, high = low - (abs(low) or 1.0) * 0.1, high + (abs(high) or 1.0) * 0.1
    if 0 <= low < 0.4 * high:
        low = 0.0  # a scale from zero where that costs little room
    return low, high + 0.04 * (high - low)


def _ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers within [low, high]."""
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _powers(frame: _Frame) -> list[float]:
    """Ticks of a log axis, as powers of ten."""
    powers = [float(power) for power in range(round(frame.y0), round(frame.y1) + 1)]
    return powers[:: max(1, len(powers) // 5)]


def _grid(frame: _Frame, axes: Axes) -> str:
    marks = []
    for tick in _powers(frame) if frame.log_y else _ticks(frame.y0, frame.y1):
        value = 10**tick if frame.log_y else tick
        y = f"{frame.y(value):.1f}"
        text = f"1e{tick:.0f}" if frame.log_y else short(tick)
        marks.append(f'<path class="grid" d="M{frame.left} {y}H{frame.right}"/>')
        marks.append(f'<text class="tick" x="{frame.left - 6}" y="{y}" dy=".33em" text-anchor="end">{text}</text>')
    if axes.x_names:
        named = list(enumerate(axes.x_names))
    else:
        most = 6 if frame.x1 - frame.x0 > 6 else max(1, int(frame.x1 - frame.x0))
        named = [(tick, short(tick)) for tick in _ticks(frame.x0, frame.x1, most)]  # type: ignore[misc]
    for place, name in named:
        marks.append(f'<text class="tick" x="{frame.x(place):.1f}" y="{frame.bottom + 15}" text-anchor="middle">{escape(name)}</text>')
    middle = (frame.left + frame.right) / 2
    marks.append(f'<text class="label" x="{middle}" y="{frame.bottom + 31}" text-anchor="middle">{escape(axes.x_label)}</text>')
    marks.append(f'<path class="frame" d="M{frame.left} {frame.bottom}H{frame.right}"/>')
    return "".join(marks)


def _curve(series: Series, frame: _Frame) -> str:
    points = [None if y is None else (frame.x(x), frame.y(y), x, y) for x, y in zip(series.x, series.y, strict=True)]
    runs = [list(run) for present, run in groupby(points, key=lambda point: point is not None) if present]
    color = f"var(--c{series.color})"
    drawn = []
    if series.style != "points":
        kind = "line dashed" if series.style == "dashed" else "line raw" if series.style == "raw" else "line"
        path = " ".join("M" + "L".join(f"{p[0]:.1f} {p[1]:.1f}" for p in run) for run in runs)  # type: ignore[index]
        drawn.append(f'<path class="{kind}" stroke="{color}" d="{path}"/>')
    if series.style == "raw":
        return "".join(drawn)
    lone = {run[0] for run in runs if len(run) == 1}
    for point in (point for run in runs for point in run):
        x, y, at, value = point  # type: ignore[misc]
        seen = series.style == "points" or point in lone
        look = f'r="3.5" fill="{color}"' if seen else 'r="6" class="hover"'
        hint = escape(f"{series.name or 'value'} {short(value)} at {short(at)}")
        drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" {look}><title>{hint}</title></circle>')
    return "".join(drawn)


def _bars(bars: Sequence[Series], frame: _Frame) -> str:
    if not bars:
        return ""
    drawn = []
    width = max(0.6, (frame.right - frame.left) / (frame.x1 - frame.x0) * 0.86)
    base = [0.0] * len(bars[0].x)
    for one in bars:
        for index, (x, y) in enumerate(zip(one.x, one.y, strict=True)):
            if not y:
                continue
            top, bottom = frame.y(base[index] + y), frame.y(base[index])
            box = f'x="{frame.x(x) - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" height="{bottom - top:.1f}"'
            hint = escape(f"{one.name} {short(y)} at {short(x)}")
            drawn.append(f'<rect {box} fill="var(--c{one.color})"><title>{hint}</title></rect>')
            base[index] += y
    return "".join(drawn)


def _legend(curves: Sequence[Series], width: int) -> str:
    """Named curves in as many rows as they need; each row is marked so that the frame can make room."""
    named = [one for one in curves if one.name]
    if not named:
        return ""
    drawn, left, row = [], 12.0, 0
    for one in named:
        needed = 26 + 6.2 * len(one.name)
        if left + needed > width and left > 12:
            left, row = 12.0, row + 1
        if left == 12.0:
            drawn.append("<!--row-->")
        y = 33 + 16 * row
        key = f'<rect x="{left}" y="{y - 6}" width="12" height="{8 if one.style == "bars" else 3}" rx="1" fill="var(--c{one.color})"/>'
        drawn.append(f'{key}<text class="legend" x="{left + 17}" y="{y}">{escape(one.name)}</text>')
        left += needed
    return "".join(drawn)


def short(value: float) -> str:
    """A number in few characters: `0.05`, `1,200`, `3e-05`."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:,.4f}".rstrip("0").rstrip(".") if abs(value) < 100 else f"{value:,.0f}"
