"""Rows out of Python generators, JSON Lines, Parquet files and hub data sets, with columns mapped to standard names.

Owns how each kind of source is opened and what can be wrong with it. What rows mean lives in `bregman.data.sources`.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import importlib.util
import inspect
import json
import sys
import traceback
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO

from bregman.data.benchmarks import ADAPTERS
from bregman.data.config import HubSource, JsonlSource, ParquetSource, PythonSource, SourceConfig, StageSource
from bregman.errors import DataError

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The rows of one source, a sequence of dicts.

    Attributes:
        name: of the source, in errors and tracking.
        items: rows as they were read: a list, the lines of files, or a `datasets.Dataset` on disk.
        columns: standard name -> column; a mapped row has the column under both names.
        numbers: what each row is called; empty if rows are counted from 0. JSON Lines rows are called by their line, from 1.
        paths: the files that hold the rows; empty for those of a generator or of the hub.
        format: `rows`, or whose columns they have (`bregman.data.benchmarks`).
    """

    name: str
    items: Sequence[Mapping[str, Any]] | _JsonLines | datasets.Dataset
    columns: Mapping[str, str] = field(default_factory=dict)
    numbers: Sequence[str] = ()
    paths: Sequence[Path] = ()
    format: str = "rows"

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.items[index]
        for standard, actual in self.columns.items():
            if actual not in row:
                raise DataError(self.where(index), f"no column `{actual}`, mapped to `{standard}`", unknown_name(actual, row))
        row = {**row, **{standard: row[actual] for standard, actual in self.columns.items()}}
        return row if self.format == "rows" else ADAPTERS[self.format](row, self.where(index))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def number(self, index: int) -> str:
        """What row `index` is called within its source."""
        return self.numbers[index] if self.numbers else str(index)

    def where(self, index: int) -> str:
        """What row `index` is called in an error."""
        return f"{self.name} row {self.number(index)}"

    def content_hash(self) -> str | None:
        """Of the bytes of the files, or of what the hub's data set was made from, and of the mapping; None for a generator's rows."""
        digest = hashlib.sha256(json.dumps([self.format, sorted(self.columns.items())]).encode())
        for path in self.paths:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        fingerprint = getattr(self.items, "_fingerprint", None)
        if not self.paths and fingerprint is None:
            return None
        digest.update(b"" if self.paths else str(fingerprint).encode())
        return digest.hexdigest()


def source_name(source: SourceConfig) -> str:
    """The name the recipe gives it; else its file name, `file.py:function`, or data set id."""
    if source.kind == "stage":
        return source.name or source.stage
    if source.name or source.kind == "hub":
        return source.name or source.path
    return Path(source.path).name


def read_rows(source: SourceConfig, base_folder: Path, seed: int) -> Rows:
    """Open `source`; relative paths start at `base_folder`, the recipe's.

    A Python source is called as `function(seed=seed, **args)`; a `seed` among its `args` wins, so that held-out problems can
    be the same in every run. Its rows stay plain Python objects; those of JSON Lines files are read from their place in the file
    when they are asked for (without `datasets`, whose JSON reader also turns text that looks like a date into one). Parquet and hub
    data are memory-mapped `datasets`.

    Raises:
        DataError: the source is missing, malformed or empty, its generator fails, or a mapped column does not exist.
    """
    match source:
        case PythonSource():
            rows = _read_python(source, base_folder, seed)
        case JsonlSource():
            rows = _read_jsonl(source, base_folder)
        case ParquetSource():
            rows = _read_parquet(source, base_folder)
        case HubSource():
            rows = _read_hub(source, base_folder)
        case StageSource():
            raise TypeError("a stage source is resolved to the file it stands for before it is read (recipes.context)")
    if not len(rows):
        raise DataError(rows.name, "has no rows", "check the path, the split, or the generator's arguments")
    return rows if source.format == "rows" else replace(rows, format=source.format)


def unknown_name(found: str, known: Iterable[str]) -> str:
    """A suggestion for a misspelt name, and what there is instead."""
    names = sorted(known)
    close = difflib.get_close_matches(found, names, n=1, cutoff=0.5)
    listed = ", ".join(names) or "nothing"
    return f"did you mean `{close[0]}`? (there is: {listed})" if close else f"there is: {listed}"


def _read_python(source: PythonSource, base_folder: Path, seed: int) -> Rows:
    file, _, function_name = source.path.rpartition(":")
    if not file or not function_name:
        raise DataError(source.path, "is not of the form `file.py:function`", "for example `task.py:problems`")
    path = _resolve(file, base_folder)
    if not path.is_file():
        raise DataError(str(path), "no such file", _nearby(path))
    module = _import(path)
    function = getattr(module, function_name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__]
        raise DataError(f"{path}", f"has no function `{function_name}`", unknown_name(function_name, own))
    arguments = {"seed": seed, **source.args}
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        fix = f"its arguments are {inspect.signature(function)}; it is always given a seed"
        raise DataError(f"{path}:{function_name}", f"cannot be called with {', '.join(arguments)}: {error}", fix) from None
    try:
        produced = list(function(**arguments))
    except (Exception, SystemExit) as error:
        raise _failed(path, error) from None
    for index, row in enumerate(produced):
        if not isinstance(row, Mapping):
            raise DataError(f"{source.path} row {index}", f"is a {type(row).__name__}", "yield a dict per row")
    return Rows(name=source_name(source), items=produced, columns=source.columns)


def _import(path: Path) -> ModuleType:
    """The module in `path`, imported once; its name depends on the path only, so that its classes pickle."""
    name = f"bregman_source_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise DataError(str(path), "is not a Python file", "give a file that ends in .py")
    if (folder := str(path.parent)) not in sys.path:
        sys.path.append(folder)  # a generator may import the files beside it, as rewards may
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _failed(path, error) from None
    return module


def _failed(path: Path, error: BaseException) -> DataError:
    """The error of a user's module with the last line of that module that was running."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == str(path):
            line = frame.lineno
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return DataError(f"{path}:{line}" if line else str(path), f"{type(error).__name__}: {message}", "mend the generator")


class _JsonLines:
    """The lines of JSON Lines files that are not blank, parsed when they are asked for; only their places are kept in memory."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._files: list[BinaryIO | None] = [None] * len(paths)
        self._offsets, self._numbers, self._ends = array("q"), array("q"), list[int]()
        for path in paths:
            try:
                with path.open("rb") as lines:
                    self._index(lines)
            except OSError as error:
                raise DataError(str(path), f"cannot be read ({error.strerror})", "check its permissions") from None
            self._ends.append(len(self._offsets))

    def _index(self, lines: BinaryIO) -> None:
        offset = 0
        for number, line in enumerate(lines, start=1):
            if line.strip(b" \t\r\n\xef\xbb\xbf"):
                self._offsets.append(offset)
                self._numbers.append(number)
            offset += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, number = self.place(index)
        which = bisect_right(self._ends, index)
        file = self._files[which] or path.open("rb")
        self._files[which] = file
        file.seek(self._offsets[index])
        try:
            line = file.readline().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            where = f"{path}:{number}"
            raise DataError(where, f"is not UTF-8 text ({error.reason} at byte {error.start} of the line)", "convert the file") from None
        return _json_row(line, f"{path}:{number}")

    def place(self, index: int) -> tuple[Path, int]:
        """The file and the line, from 1, of a row."""
        if not 0 <= index < len(self):
            raise IndexError(index)  # ends iteration
        return self._paths[bisect_right(self._ends, index)], self._numbers[index]


class _LineNames(Sequence[str]):
    """What the rows of JSON Lines files are called."""

    def __init__(self, lines: _JsonLines, *, with_file: bool) -> None:
        self._lines, self._with_file = lines, with_file

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: Any) -> Any:
        path, number = self._lines.place(index)
        return f"{path.name}:{number}" if self._with_file else str(number)


def _read_jsonl(source: JsonlSource, base_folder: Path) -> Rows:
    paths = _files(source.path, base_folder)
    lines = _JsonLines(paths)
    names = _LineNames(lines, with_file=len(paths) > 1)
    return Rows(name=source_name(source), items=lines, columns=source.columns, numbers=names, paths=paths)


def _json_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        detail = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
        raise DataError(where, f"is not valid JSON ({detail})", "each line must be one JSON object") from None
    except ValueError:  # Python refuses to read such an integer, for the time that takes
        found = f"has an integer of more than {sys.get_int_max_str_digits()} digits"
        raise DataError(where, found, "write it as a text, in quotation marks") from None
    if not isinstance(row, dict):
        raise DataError(where, f"is a JSON {type(row).__name__}, not an object", "each line must be one JSON object")
    return row


def _read_parquet(source: ParquetSource, base_folder: Path) -> Rows:
    import pyarrow

    paths = _files(source.path, base_folder)
    layouts = [_layout(path) for path in paths]
    import datasets

    datasets.disable_progress_bars()  # the run's own display says what is waited for

    name = source_name(source)
    broken = (datasets.exceptions.DatasetsError, pyarrow.ArrowException, OSError, ValueError, TypeError)
    tables = []
    for _, alike in groupby(zip(paths, layouts, strict=True), key=lambda pair: pair[1]):
        files = [str(path) for path, _ in alike]
        try:
            tables.append(_undecoded(datasets.Dataset.from_parquet(files)))
        except broken as error:
            where = files[0] if len(files) == 1 else name
            raise DataError(where, f"cannot be read ({_first_line(error.__cause__ or error)})", "check how it was written") from None
    try:
        table = datasets.concatenate_datasets(tables)  # a column that a file lacks is empty in its rows
    except broken:
        raise DataError(name, _difference(paths, layouts), "write them alike, or make them sources of their own") from None
    return Rows(name=name, items=table, columns=source.columns, paths=paths)


def _layout(path: Path) -> tuple[Any, Any]:
    """The columns of a Parquet file that has rows: their Arrow types, and what `datasets` noted about them."""
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(str(path), f"is not a Parquet file ({_first_line(error)})", "check how it was written") from None
    if not metadata.num_rows:
        raise DataError(str(path), "has no rows", "remove it from the source, or write it again")
    schema = metadata.schema.to_arrow_schema()
    return schema, (schema.metadata or {}).get(b"huggingface")


def _difference(paths: Sequence[Path], layouts: Sequence[tuple[Any, Any]]) -> str:
    """The first column that is of one type in one file and of another in another."""
    import pyarrow

    first: dict[str, tuple[Path, Any]] = {}
    for path, (schema, _) in zip(paths, layouts, strict=True):
        for column in schema:
            before, known = first.setdefault(column.name, (path, column.type))
            if known != column.type and pyarrow.types.is_null(known) == pyarrow.types.is_null(column.type):
                return f"its column `{column.name}` is {known} in {before.name} and {column.type} in {path.name}"
    return "its files have columns of different types"


def _undecoded(table: datasets.Dataset) -> datasets.Dataset:
    """`table` with its images as files: they are opened where a row is used, which can then be named if one is broken."""
    import datasets

    def raw(feature: Any) -> Any:
        if isinstance(feature, datasets.Image):
            return datasets.Image(decode=False)
        if isinstance(feature, datasets.List | datasets.LargeList):
            inner = raw(feature.feature)
            return datasets.LargeList(inner) if isinstance(feature, datasets.LargeList) else datasets.List(inner, feature.length)
        return {name: raw(part) for name, part in feature.items()} if isinstance(feature, dict) else feature

    # the stored bytes are the same, so that nothing is rewritten as `Dataset.cast` would
    table.info.features = datasets.Features({name: raw(feature) for name, feature in table.features.items()})
    return table


def _read_hub(source: HubSource, base_folder: Path) -> Rows:
    import datasets

    folder = _resolve(source.path, base_folder)
    path = str(folder) if folder.is_dir() else source.path
    try:
        table = datasets.load_dataset(path, source.subset, split=source.split, revision=source.revision)
    except Exception as error:  # it raises about anything: connection, missing id, unknown split, malformed files
        fix = "check the id, `subset`, `split` and `revision`, and that the hub can be reached or the data set is in the local cache"
        raise DataError(f"hub data set `{source.path}`", f"cannot be loaded ({_first_line(error)})", fix) from None
    return Rows(name=source_name(source), items=_undecoded(table), columns=source.columns)


def _files(pattern: str, base_folder: Path) -> list[Path]:
    """The file, or the sorted files that a pattern with `*` or `?` names."""
    path = _resolve(pattern, base_folder)
    if path.is_file():
        return [path]
    found = sorted(Path(match) for match in glob.glob(str(path)) if Path(match).is_file())
    if not found:
        raise DataError(str(path), "is a folder" if path.is_dir() else "no such file", _nearby(path))
    return found


def _resolve(path: str, base_folder: Path) -> Path:
    return (base_folder / Path(path).expanduser()).resolve()


def _nearby(path: Path) -> str:
    """What the folder of a missing file holds."""
    if path.is_dir():
        return f"name files in it, for example `{path.name}/*`"
    if not path.parent.is_dir():
        return f"its folder {path.parent} does not exist either; relative paths start at the recipe"
    names = [entry.name for entry in path.parent.iterdir() if entry.suffix == path.suffix]
    return unknown_name(path.name, names) if names else "relative paths start at the recipe"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
