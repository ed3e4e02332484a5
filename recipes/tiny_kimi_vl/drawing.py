"""Pictures of text, of grids of shapes and of bar charts, drawn with PIL.

Owns pixels only: what pictures show is chosen in `task.py` and `scans.py`. Everything is drawn in cells of 28 x 28 pixels, which a
model with patches of 14 that are merged 2 x 2 sees as one token each; size, place, font size and colours vary with `rng`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

CELL = 28
"""Pixels of a cell's side."""

COLOURS = {"red": (215, 45, 40), "green": (40, 160, 60), "blue": (45, 80, 215)}
SHAPES = ("circle", "square", "triangle")

BOARD = (110, 145)
"""Range of a background's colour values, around the grey that is zero to a model: on light paper, whose brightness outweighs what is
drawn on it, characters are learned several times later, or at a high learning rate not at all."""

BAR_CELLS, BAR_UNIT = 3, 9
"""Width of a bar chart in cells, and pixels per unit of a bar's length: nine units fill it."""

Cell = tuple[str, str]
"""A colour and a shape."""


def draw_text(lines: Sequence[str], rng: random.Random) -> Image.Image:
    """`lines` with one character per cell, in chalk of a random shade on a board, each character a little out of place."""
    width, height = max(map(len, lines)), len(lines)
    picture = Image.new("RGB", (CELL * width, CELL * height), _shade(rng, *BOARD))
    pen, chalk, font = ImageDraw.Draw(picture), _shade(rng, 225, 255), _font(rng.randint(20, 24))
    for row, line in enumerate(lines):
        for column, character in enumerate(line):
            pen.text(_centre(row, column, rng), character, fill=chalk, font=font, anchor="mm")
    return picture


def draw_shapes(grid: Sequence[Sequence[Cell]], rng: random.Random) -> Image.Image:
    """A grid of coloured shapes of varying size on a board."""
    picture = Image.new("RGB", (CELL * len(grid[0]), CELL * len(grid)), _shade(rng, *BOARD))
    pen = ImageDraw.Draw(picture)
    for row, cells in enumerate(grid):
        for column, (colour, shape) in enumerate(cells):
            (x, y), size = _centre(row, column, rng), rng.randint(8, 11)
            fill = tuple(min(255, max(0, value + rng.randint(-25, 25))) for value in COLOURS[colour])
            box = (x - size, y - size, x + size, y + size)
            if shape == "circle":
                pen.ellipse(box, fill=fill)
            elif shape == "square":
                pen.rectangle(box, fill=fill)
            else:
                pen.polygon([(x, y - size), (x - size, y + size), (x + size, y + size)], fill=fill)
    return picture


def draw_bars(lengths: Sequence[int], rng: random.Random) -> Image.Image:
    """A bar chart: one horizontal bar per row, `lengths` from 1 to 9, on a board with a line at every third unit."""
    width, height = CELL * BAR_CELLS, CELL * len(lengths)
    picture = Image.new("RGB", (width, height), _shade(rng, *BOARD))
    pen = ImageDraw.Draw(picture)
    for unit in (3, 6, 9):
        pen.line((unit * BAR_UNIT, 0, unit * BAR_UNIT, height), fill=(190, 190, 190))
    for row, length in enumerate(lengths):
        middle, half = row * CELL + CELL // 2 + rng.randint(-2, 2), rng.randint(6, 10)
        fill = rng.choice(list(COLOURS.values()))
        pen.rectangle((0, middle - half, length * BAR_UNIT, middle + half), fill=fill)
    return picture


def _centre(row: int, column: int, rng: random.Random) -> tuple[int, int]:
    """(x, y) near the middle of a cell."""
    return column * CELL + CELL // 2 + rng.randint(-1, 1), row * CELL + CELL // 2 + rng.randint(-1, 1)


def _shade(rng: random.Random, low: int, high: int) -> tuple[int, int, int]:
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)


@lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # the font that PIL brings along
