"""Charts as SVG text: lines, points and stacked bars over a numeric or a named x axis.

Owns geometry and marks; knows nothing about runs. Colours come from CSS variables of the page, or of the figure when it stands alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Literal

NUM_COLORS = 7
_MOST_POINTS = 240
"""More points than this are thinned to the extremes of each bucket: a spike must stay visible."""

STYLE = """
.bg{fill:var(--paper)} .frame{stroke:var(--rule);fill:none} .grid{stroke:var(--rule);stroke-width:.6}
.tick,.label,.legend{font:11px system-ui,sans-serif;fill:var(--faint)} .legend{fill:var(--ink)}
.title{font:600 13px system-ui,sans-serif;fill:var(--ink)}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round} .dashed{stroke-dasharray:5 4;stroke-width:1.4} .hover{fill:transparent}
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
        style: how it is drawn; `dashed` is meant for reference levels.
        color: index into the palette; None takes the series' place in the figure.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    style: Literal["line", "points", "dashed", "bars"] = "line"
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
    """The plot area in pixels and the data range it shows."""

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
        low, high, here = (math.log10(v) for v in (self.y0, self.y1, value)) if self.log_y else (self.y0, self.y1, value)
        return self.bottom - (here - low) / (high - low) * (self.bottom - self.top)


def svg_figure(series: Sequence[Series], axes: Axes, *, width: int = 460, height: int = 250, standalone: bool = False) -> str:
    """An `<svg>` element; with `standalone` a file of its own, light or dark as the reader's system is.

    Series of style `bars` are stacked on each other in their order.
    """
    curves = [curve for one in series if (curve := _clean(one, axes.log_y)).x]
    body = _plot(curves, [one.color if one.color is not None else series.index(one) for one in series], series, axes, width, height)
    attributes = f'viewBox="0 0 {width} {height}" role="img" aria-label="{escape(axes.title)}"'
    if not standalone:
        return f"<svg {attributes}>{body}</svg>"
    return _file(body, attributes, width, height)


def side_by_side(figures: Sequence[str], *, width: int = 460, height: int = 250) -> str:
    """A standalone SVG file of figures made by `svg_figure(..., standalone=False)` at that width and height."""
    placed = "".join(f'<g transform="translate({index * width} 0)">{figure}</g>' for index, figure in enumerate(figures))
    sized = placed.replace("<svg ", f'<svg width="{width}" height="{height}" ')
    total = width * len(figures)
    return _file(sized, f'viewBox="0 0 {total} {height}" role="img"', total, height)


def _file(body: str, attributes: str, width: int, height: int) -> str:
    style = f"<style>svg{{{LIGHT}}}@media(prefers-color-scheme:dark){{svg{{{DARK}}}}}{STYLE}</style>"
    background = f'<rect class="bg" width="{width}" height="{height}"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" {attributes}>{style}{background}{body}</svg>\n'
