"""Rows -> a Parquet file that `bregman.data.sources` reads back: data sets that stages make.

Owns the file and what cannot be in it. Messages and images come as `bregman.data.sources.row_columns` gives them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bregman.errors import DataError
from bregman.tracking.disk import written_aside

if TYPE_CHECKING:
    import pyarrow


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """Write `rows` to the Parquet file `path`, at once. A column that a row lacks is null there; one that is null in every row is left out.

    Raises:
        DataError: as `check_rows`.
        UserError: no space, or not writable.
    """
    import pyarrow.parquet

    table = _table(rows, name)
    with written_aside(path) as aside:
        pyarrow.parquet.write_table(table, aside, compression="zstd")


def check_rows(rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """Assert that `rows` of the data set `name` can be written, before hours go into what is written beside them.

    Raises:
        DataError: there are none, or a column holds values of different types, or of a type that Parquet has not.
    """
    import pyarrow
    import pyarrow.parquet

    table = _table(rows, name)
    try:
        pyarrow.parquet.write_table(table.slice(0, 1), pyarrow.BufferOutputStream())
    except pyarrow.ArrowException as error:
        raise DataError(name, f"cannot be written as Parquet ({str(error).splitlines()[0]})", "drop or convert the column") from None


def _table(rows: Sequence[Mapping[str, Any]], name: str) -> pyarrow.Table:
    import pyarrow

    if not rows:
        raise DataError(name, "no row is left", "see its report.json for what was dropped and why")
    columns = {}
    for key in dict.fromkeys(key for row in rows for key, value in row.items() if value is not None):
        try:
            columns[key] = pyarrow.array([row.get(key) for row in rows])
        except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as error:
            found = f"column `{key}` cannot be written as Parquet ({str(error).splitlines()[0]})"
            raise DataError(name, found, "give its values one type, or drop the column") from None
    return pyarrow.table(columns)
