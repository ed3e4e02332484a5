"""Data sets that stages write are read back as they were: columns, messages, images; what Parquet has not is an error first."""

import io

import pytest
from PIL import Image

from bregman.data.config import ParquetSource
from bregman.data.images import open_image
from bregman.data.sources import read_conversations, read_rows, row_columns
from bregman.data.writers import check_rows, write_rows
from bregman.errors import DataError


def back(path):
    return list(read_rows(ParquetSource(path=str(path)), path.parent, seed=0))


def test_rows_come_back(tmp_path):
    rows = [
        {"id": "a", "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "tags": ["m", "n"], "n": 1},
        {"id": "b", "messages": [{"role": "user", "content": "z"}, {"role": "assistant", "content": "w"}], "n": 2.5, "more": {"k": "v"}},
    ]
    write_rows(tmp_path / "data.parquet", rows, "set")
    first, second = back(tmp_path / "data.parquet")
    assert first == {**rows[0], "n": 1.0, "more": None}
    assert second == {**rows[1], "tags": None}


def test_images_of_every_kind_come_back(tmp_path):
    picture = Image.new("RGB", (4, 4), "blue")
    file = io.BytesIO()
    picture.save(file, format="PNG")
    picture.save(tmp_path / "p.png")
    payloads = [picture, file.getvalue(), str(tmp_path / "p.png")]
    shown = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
    rows = [row_columns([shown, {"role": "assistant", "content": "blue"}], [payload], "row") for payload in payloads]
    rows.append(row_columns([{"role": "user", "content": "no image"}, {"role": "assistant", "content": "ok"}], [], "row"))
    write_rows(tmp_path / "data.parquet", rows, "set")
    conversations = read_conversations(ParquetSource(path=str(tmp_path / "data.parquet")), tmp_path, seed=0)
    assert [open_image(c.images[0], "row").getpixel((1, 1)) for c in conversations[:3]] == [(0, 0, 255)] * 3
    assert conversations[0].messages == (shown, {"role": "assistant", "content": "blue"})
    assert conversations[3].messages[0]["content"] == "no image"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"a": 1}, {"a": "x"}], "column `a` cannot be written"),
        ([{"a": {}}], "set: cannot be written as Parquet"),
        ([{"a": object()}], "column `a` cannot be written"),
        ([], "no row is left"),
    ],
)
def test_what_parquet_has_not_is_said_before_the_work(rows, message):
    with pytest.raises(DataError, match=message):
        check_rows(rows, "set")
