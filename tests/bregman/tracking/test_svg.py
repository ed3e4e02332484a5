"""Charts: numbers land where they should, and odd data does not break them."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

import pytest

from bregman.tracking.svg import Axes, Series, short, svg_figure, svg_file

ODD: dict[str, Sequence[Series]] = {
    "nothing": [],
    "no points": [Series(name="a", x=[], y=[])],
    "one point": [Series(name="a", x=[3], y=[0.5])],
    "a constant": [Series(name="a", x=[0, 1], y=[0.0, 0.0])],
    "gaps": [Series(name="a", x=range(5), y=[None, 1.0, math.nan, 2.0, math.inf])],
    "only gaps": [Series(name="a", x=range(2), y=[None, math.nan])],
    "negative": [Series(name="a", x=range(3), y=[-5.0, -1e-9, -3.0])],
    "huge and tiny": [Series(name="a", x=range(3), y=[1e-30, 1e30, 1.0])],
    "markup": [Series(name="<script>&\"'", x=range(2), y=[0.0, 1.0])],
    "bars": [Series(name=f"b{index}", x=range(400), y=[1.0] * 400, style="bars") for index in range(9)],
    "bars of nothing": [Series(name="b", x=range(3), y=[0.0, 0.0, 0.0], style="bars")],
}


def parsed(figure: str) -> ElementTree.Element:
    return ElementTree.fromstring(figure)


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize("name", ODD)
def test_odd_data_gives_a_well_formed_figure(name: str, log_y: bool) -> None:
    if log_y and "bars" in name:
        pytest.skip("bars are not drawn on a log axis")
    figure = svg_figure(ODD[name], Axes(title="t <&>", x_label="step", log_y=log_y))
    parsed(figure)
    assert "nan" not in figure and "inf" not in figure
    assert "<script>" not in figure


def test_points_land_at_their_place() -> None:
    series = Series(name="a", x=[0, 5, 10], y=[0.0, 0.25, 1.0], style="points")
    circles = parsed(svg_figure([series], Axes(title="t", x_label="step", y_range=(0.0, 1.0)), width=466, height=250)).iter("circle")
    places = [(float(circle.get("cx") or 0), float(circle.get("cy") or 0)) for circle in circles]
    assert places == [(52.0, 212.0), (252.0, 170.5), (452.0, 46.0)]  # the plot area spans x 52..452, y 46..212


def test_log_axis() -> None:
    series = Series(name="", x=[0, 1, 2, 3], y=[1e-6, 1e-5, 0.0, 1e-2], style="points")
    figure = svg_figure([series], Axes(title="t", log_y=True))
    heights = [float(circle.get("cy") or 0) for circle in parsed(figure).iter("circle")]
    assert len(heights) == 3
    assert heights[0] - heights[1] == pytest.approx((heights[0] - heights[2]) / 4, abs=0.1)
    assert "1e-6" in figure and "1e-2" in figure


def test_stacked_bars_stand_on_each_other() -> None:
    bars = [Series(name=name, x=[0, 1], y=[3.0, value], style="bars") for name, value in (("a", 1.0), ("b", 0.0))]
    figure = parsed(svg_figure(bars, Axes(title="t", y_range=(0.0, 6.0)), width=460, height=250))
    boxes = [(float(r.get("y") or 0), float(r.get("height") or 0)) for r in figure.iter("rect") if r.find("title") is not None]
    assert len(boxes) == 3  # no box for the zero
    assert boxes[0][0] == pytest.approx(boxes[2][0] + boxes[2][1], abs=0.1)
    assert boxes[0][1] == pytest.approx(boxes[2][1], abs=0.1) == pytest.approx(3 * boxes[1][1], abs=0.2)


def test_a_spike_survives_thinning() -> None:
    values = [1.0] * 10_000
    values[4321] = 9.0
    figure = svg_figure([Series(name="loss", x=range(10_000), y=values)], Axes(title="t"))
    assert "loss 9 at 4,321" in figure
    assert len(figure) < 60_000


def test_ticks_are_round_and_few() -> None:
    figure = svg_figure([Series(name="", x=[0, 37], y=[0.0, 0.93])], Axes(title="t", y_range=(0.0, 1.02)))
    ticks = re.findall(r'class="tick"[^>]*>([^<]*)<', figure)
    assert ticks == ["0", "0.25", "0.5", "0.75", "1", "0", "10", "20", "30"]


def test_standalone_file_brings_its_colours() -> None:
    figures = [svg_figure([Series(name="a", x=[0, 1], y=[0.0, 1.0])], Axes(title=title)) for title in ("left", "right")]
    file = svg_file(figures)
    root = parsed(file)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("width") == "920"
    assert {f"--c{index}:" in file for index in range(7)} == {True}
    assert "prefers-color-scheme:dark" in file


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (0.25, "0.25"),
        (1200, "1,200"),
        (3e-5, "3e-05"),
        (99.99999, "100"),
        (1e7, "1e+07"),
        (-0.5, "-0.5"),
        (10, "10"),
        (100.0, "100"),
    ],
)
def test_short_numbers(value: float, expected: str) -> None:
    assert short(value) == expected
