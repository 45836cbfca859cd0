"""Tables: named columns of a file, as they were read, whatever its format.

CSV, TSV and JSON are read by the standard library, NumPy's files by NumPy, Parquet by pyarrow and
data sets of the Hugging Face hub by `datasets` (both in the extra "data"). What the columns mean is
decided by `jaxfm.data.columns`.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxfm.data.splits import split_in

Column = list | np.ndarray


class Piece(NamedTuple):
    """Rows of a table that come from one file.

    Attributes:
      origin: the file's path, or the data set's name.
      split: "train", "validation" or "test"; "" where neither file nor folder says.
      size: number of rows.
    """

    origin: str
    split: str
    size: int


class Table(NamedTuple):
    """Columns of equal length.

    Attributes:
      columns: by name: lists of cells (text, numbers, lists, images, None) or arrays [N, ...].
      pieces: where the rows come from, in order.
      classes: the names of a column's numbers, where the file has them.
    """

    columns: dict[str, Column]
    pieces: tuple[Piece, ...]
    classes: Mapping[str, tuple[str, ...]] = {}

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)

    @property
    def origin(self) -> str:
        """The first file; errors about a whole column name it."""
        return self.pieces[0].origin

    def piece_of(self, row: int) -> tuple[Piece, int]:
        """Returns the piece that holds a row, and the row's number in it, from 0."""
        for piece in self.pieces:
            if row < piece.size:
                return piece, row
            row -= piece.size
        raise IndexError(row)

    def fault(self, column: str, row: int, message: str) -> ValueError:
        """Returns the error about one cell; rows count from 1, without a header."""
        piece, place = self.piece_of(row)
        return ValueError(f"{piece.origin}, row {place + 1}, column {column!r}: {message}")


def make_table(
    columns: Mapping[str, Column], origin: str | Path, split: str = "", **more: Any
) -> Table:
    """Returns a table of one piece after checking that it has rows, and as many in each column."""
    sizes = {name: len(column) for name, column in columns.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{origin}: columns must be equally long; found {sizes}.")
    if not sizes or not max(sizes.values()):
        raise ValueError(f"{origin} has no rows.")
    return Table(dict(columns), (Piece(str(origin), split, max(sizes.values())),), **more)


def join(tables: Sequence[Table]) -> Table:
    """Returns the rows of all tables, one after another; they must have the same columns."""
    first = tables[0]
    for table in tables[1:]:
        if differ := sorted(set(table.columns) ^ set(first.columns)):
            raise ValueError(
                f"{table.origin} and {first.origin} have different columns: only one has {differ}."
            )
        if table.classes != first.classes:
            raise ValueError(f"{table.origin} and {first.origin} name their classes differently.")
    columns = {name: _joined([table.columns[name] for table in tables]) for name in first.columns}
    pieces = tuple(piece for table in tables for piece in table.pieces)
    return Table(columns, pieces, first.classes)


def _joined(parts: Sequence[Column]) -> Column:
    if len(parts) == 1:
        return parts[0]
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    if len(arrays) == len(parts) and len({array.shape[1:] for array in arrays}) == 1:
        return np.concatenate(arrays)
    return [cell for part in parts for cell in part]


def read_table(path: Path, *, columns: Sequence[str] = (), encoding: str = "utf-8-sig") -> Table:
    """Returns the table in a file; its suffix, in `READERS`, says how it is read.

    Args:
      path: of the file.
      columns: names for the columns of a CSV or TSV file that has no header.
      encoding: of CSV, TSV and JSON files.
    Raises:
      ValueError: damaged, empty, or rows of unequal length; the message names file and row.
      ImportError: Parquet without pyarrow.
    """
    kind = path.suffix.lower()
    if columns and kind not in (".csv", ".tsv"):
        raise ValueError(f"{path}: columns={list(columns)} names those of a CSV or TSV file only.")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty.")
    try:
        if kind in (".csv", ".tsv"):
            return _csv(path, columns, encoding)
        return READERS[kind](path, encoding)
    except LookupError:
        raise ValueError(f"encoding={encoding!r} is unknown; give one such as latin-1.") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be a table.") from None
    except UnicodeError as error:
        place = f" at byte {error.start}" if isinstance(error, UnicodeDecodeError) else ""
        raise ValueError(
            f"{path} is not {getattr(error, 'encoding', encoding)} text{place}; give its encoding, "
            "such as latin-1."
        ) from error


def _csv(path: Path, columns: Sequence[str], encoding: str) -> Table:
    with path.open(encoding=encoding, newline="") as file:
        line = file.readline()
        file.seek(0)
        mark = "\t" if path.suffix.lower() == ".tsv" else ","
        if mark == "," and "," not in line and ";" in line:
            mark = ";"
        limit = csv.field_size_limit(sys.maxsize)  # texts may be long
        try:
            rows = [row for row in csv.reader(file, delimiter=mark) if row]
        except csv.Error as error:
            raise ValueError(f"{path} cannot be read as CSV: {error}.") from error
        finally:
            csv.field_size_limit(limit)
    if not rows:
        raise ValueError(f"{path} has no rows.")
    header = not columns and _is_header(rows)
    names = list(columns) or (rows[0] if header else [str(n) for n in range(len(rows[0]))])
    names = [name.strip() for name in names]
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}: several columns are called {double}; each needs its own name.")
    rows = rows[header:]
    for number, row in enumerate(rows):
        if len(row) != len(names):
            raise ValueError(
                f"{path}, row {number + 1}: {len(row)} cells found, {len(names)} expected."
            )
    return make_table({name: [row[i] for row in rows] for i, name in enumerate(names)}, path)


def _is_header(rows: Sequence[Sequence[str]]) -> bool:
    """Whether the first row names columns: text stands over a number, or nothing is a number."""
    if len(rows) == 1 or not any(map(_is_number, rows[0])):
        return True
    pairs = zip(rows[0], rows[1], strict=False)
    return any(above and not _is_number(above) and _is_number(below) for above, below in pairs)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _json(path: Path, encoding: str) -> Table:
    """A list of objects, an object of columns, or one object a line."""
    text = path.read_text(encoding=encoding)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if "\n" not in text.strip():
            raise ValueError(f"{path} is not JSON: {error}.") from error
        return _json_lines(path, encoding)
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        return make_table(value, path)
    return _rows(path, [value] if isinstance(value, dict) else value)


def _json_lines(path: Path, encoding: str) -> Table:
    rows = []
    for number, line in enumerate(path.read_text(encoding=encoding).split("\n")):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number + 1} is not JSON: {error}.") from error
    return _rows(path, rows)


def _rows(path: Path, rows: Any) -> Table:
    if not isinstance(rows, list):
        raise ValueError(f"{path} should hold a list of objects; found {type(rows).__name__}.")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, row {number + 1} should be an object; found {type(row).__name__}."
            )
    names = dict.fromkeys(name for row in rows for name in row)
    return make_table({name: [row.get(name) for row in rows] for name in names}, path)


def _parquet(path: Path, encoding: str) -> Table:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            f"{path}: Parquet files need pyarrow: pip install 'jaxfm[data]'."
        ) from error
    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {_first(error)}.") from error
    columns = {name: _arrow(table.column(name)) for name in table.column_names}
    return make_table(columns, path, classes=_class_names(table.schema.metadata or {}))


def _arrow(column: Any) -> Column:
    from pyarrow import types

    simple = types.is_integer(column.type) or types.is_floating(column.type)
    return column.to_numpy() if simple and not column.null_count else column.to_pylist()


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """Returns the label names that the Hugging Face hub writes into a file's metadata."""
    info = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {})
    features = info.get("features", {})
    own = {name: _element(feature, dict.get) for name, feature in features.items()}
    names = {name: feature.get("names") for name, feature in own.items() if feature}
    return {name: tuple(known) for name, known in names.items() if known}


def _element(feature: Any, get: Callable[[Any, str], Any]) -> Any:
    """The feature of a list's elements, as of the tags of words; of no list the feature itself."""
    return get(feature, "feature") or feature


def _conll(path: Path, encoding: str) -> Table:
    """A word a line with its tag as the last of the columns, an empty line after each sentence."""
    rows: list[list[list[str]]] = [[]]
    for number, line in enumerate(path.read_text(encoding=encoding).splitlines()):
        cells = line.split()
        if len(cells) == 1:
            raise ValueError(f"{path}, line {number + 1}: {cells[0]!r} has no tag.")
        if not cells or cells[0] == "-DOCSTART-":
            rows += [[]] if rows[-1] else []
        else:
            rows[-1].append(cells)
    rows = [row for row in rows if row]
    part = lambda at: [[cells[at] for cells in row] for row in rows]
    return make_table({"tokens": part(0), "tags": part(-1)}, path)


def _numpy(path: Path, encoding: str) -> Table:
    """The arrays of an npz file, the fields of a structured array, or the columns of a matrix.

    Arrays named after a split (x_train, test_labels) are rows of it.
    """
    arrays = read_arrays(path)
    if isinstance(arrays, dict):
        return split_arrays(arrays, path)
    if arrays.dtype.names:
        return make_table({name: arrays[name] for name in arrays.dtype.names}, path)
    if arrays.ndim != 2:
        raise ValueError(
            f"{path} holds one array of shape {arrays.shape} and no labels; put it into a folder "
            "with labels.npy, or both into one npz file."
        )
    return make_table({str(number): arrays[:, number] for number in range(arrays.shape[1])}, path)


def read_arrays(path: Path) -> np.ndarray | dict[str, np.ndarray]:
    """Returns what a NumPy file holds: one array, or those of an npz by name.

    Raises:
      FileNotFoundError, ValueError: no such file; damaged, or pickled.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        # Given the path, numpy would keep an npz open.
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            return {key: found[key] for key in found.files} if hasattr(found, "files") else found
    except Exception as error:  # whatever a damaged header makes Python's own parser raise
        reason = _first(error)
        if "pickle" in reason:
            reason = "it is none, or holds Python objects, which could run code"
        raise ValueError(f"{path} cannot be read as a NumPy file: {reason}.") from error


def split_arrays(arrays: Mapping[str, np.ndarray], origin: str | Path) -> Table:
    """Returns arrays by name as one table; names may say the split: x_train, test_labels."""
    if not arrays:
        raise ValueError(f"{origin} holds no arrays.")
    parts: dict[str, dict[str, np.ndarray]] = {}
    for key, array in arrays.items():
        split, name = split_in(key)
        if not array.ndim:
            raise ValueError(f"{origin}: {key!r} is a single number; each array has one row each.")
        parts.setdefault(split, {})[name or "image"] = array
    return join([make_table(part, origin, split) for split, part in sorted(parts.items())])


def from_datasets(data: Any, origin: str, split: str) -> Table:
    """Returns a `datasets.Dataset` as a table."""
    features = getattr(data, "features", None) or {}
    get = lambda feature, name: getattr(feature, name, None)
    names = {name: get(_element(features.get(name), get), "names") for name in data.column_names}
    classes = {name: tuple(known) for name, known in names.items() if known}
    columns = {name: list(data[name]) for name in data.column_names}
    return make_table(columns, origin, split, classes=classes)


def _first(error: Exception) -> str:
    """Returns the first line of an error's message, without a full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


READERS: dict[str, Callable[[Path, str], Table]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
    ".conll": _conll,
    ".npz": _numpy,
    ".npy": _numpy,
}
TABLE_SUFFIXES = (".csv", ".tsv", *READERS)


def is_table(path: Path) -> bool:
    """Whether the file's suffix is that of a table."""
    return path.suffix.lower() in TABLE_SUFFIXES


def names_of(columns: Iterable[str]) -> str:
    """Returns column names as an error shows them."""
    return ", ".join(repr(name) for name in columns)
