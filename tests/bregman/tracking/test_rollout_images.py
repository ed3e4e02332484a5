"""Images of rollouts: stored once per content, named in Parquet, shown small in the report."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pyarrow.parquet
import pytest
from fake_run import make_trajectory
from PIL import Image

from bregman.errors import DataError
from bregman.tracking.report import _sample
from bregman.tracking.rollouts import LONGEST_SIDE, images_folder, read_rollouts, write_rollouts
from bregman.types import Group, Problem

MESSAGES = ({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many?"}, {"type": "image"}]},)


def png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def group(*images: object) -> Group:
    problem = Problem(id="p0", messages=MESSAGES, prompt_ids=(1,), images=images)
    return Group(problem=problem, trajectories=(make_trajectory(0), make_trajectory(1)))


def test_images_are_stored_once_and_named_by_their_content(tmp_path: Path) -> None:
    red, large = Image.new("RGB", (40, 30), "red"), Image.new("CMYK", (2 * LONGEST_SIDE, 100), (0, 255, 0, 0))
    (tmp_path / "blue.png").write_bytes(png(Image.new("RGB", (5, 4), "blue")))
    folder = tmp_path / "rollouts" / "rl"
    write_rollouts(folder / "train_000000.parquet", 0, [group(red, png(large.convert("RGB"))), group(str(tmp_path / "blue.png"), red)])
    stored = images_folder(folder)
    written = {path: path.stat().st_mtime_ns for path in stored.iterdir()}
    write_rollouts(folder / "train_000001.parquet", 1, [group(red.copy())])
    assert {path: path.stat().st_mtime_ns for path in stored.iterdir()} == written and len(written) == 3
    rows = read_rollouts(folder / "train_000000.parquet") + read_rollouts(folder / "train_000001.parquet")
    names = [row["images"] for row in rows]
    assert names[0] == names[1] and names[2] == names[3] and names[0][0] == names[2][1] == names[4][0]  # both responses, all of red
    assert [Image.open(stored / name).size for name in [*names[0], *names[2]]] == [(40, 30), (LONGEST_SIDE, 50), (5, 4), (40, 30)]
    assert rows[0]["prompt"] == "<image>how many?<image>"
    assert set(pyarrow.parquet.read_schema(folder / "train_000000.parquet").names) >= {"images", "prompt"}


def test_an_image_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="problem p0, image 1 of 1: cannot be read as an image"):
        write_rollouts(tmp_path / "rl" / "train_000000.parquet", 0, [group(str(tmp_path / "gone.png"))])


def test_the_report_shows_a_few_images_small(tmp_path: Path) -> None:
    Image.new("RGB", (1000, 500), "red").save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"hello")
    folder = tmp_path / "rollouts" / "rl"
    write_rollouts(folder / "train_000000.parquet", 0, [group(Image.new("RGB", (4, 4)))])
    row = read_rollouts(folder / "train_000000.parquet")[0]
    html = _sample({**row, "images": ["a.png", "broken.png", "../x/missing.png", "a.png", "a.png", "a.png"]}, tmp_path)
    shown = re.findall(r'<img alt="" src="data:image/png;base64,([^"]+)">', html)
    assert [Image.open(io.BytesIO(base64.b64decode(content))).size for content in shown] == [(320, 160)] * 2
    assert "broken.png cannot be read" in html and "missing.png cannot be read" in html and "and 2 more" in html
    assert "<figure>" not in _sample({**row, "images": []}, tmp_path)
