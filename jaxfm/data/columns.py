"""What the columns of a table mean, and their cells as arrays.

Labels: whatever distinct values there are, sorted, are the classes, numbered from 0: text by name,
whole numbers by value. A column whose file names its classes (the Hugging Face hub does) keeps
these. Everything that cannot be is refused in one sentence that names file, row and column.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxfm.data.folders import is_image
from jaxfm.data.images import as_images, open_image, read_images, stack_images
from jaxfm.data.tables import Column, Table, names_of
from jaxfm.data.tags import holds_words, len_of

# How columns are called that need no option to be found.
_LABELS = ("label", "labels", "class", "target", "targets", "category", "y")
_TEXTS = ("text", "sentence", "content", "tokens", "words")
_TAGS = ("ner_tags", "tags", "labels")  # of lists, one for each word
_IMAGES = ("image", "images", "img", "image_path", "path", "file", "filename", "file_name", "x")
_CLIENTS = ("client", "client_id")
_NUMBERS = ("", "id", "index", "unnamed: 0")  # of rows: not features


class Roles(NamedTuple):
    """Which column is what; None or () where there is none.

    Attributes:
      label: the class.
      text: one or several, joined by a line break.
      image: paths, encoded images or arrays.
      features: numbers, put side by side.
      client: the owner.
      weight: how much a row counts.
    """

    label: str | None = None
    text: tuple[str, ...] = ()
    image: str | None = None
    features: tuple[str, ...] = ()
    client: str | None = None
    weight: str | None = None


def find_roles(table: Table, given: Roles) -> Roles:
    """Returns the roles that are given, and the others by columns' names and contents.

    Raises:
      ValueError: a given column does not exist; more than one column could be the input; none can.
    """
    _check_given(table, given)
    label = given.label or _tags(table) or _called(table, _LABELS)
    if label in given.text:
        raise ValueError(f"{table.origin}: {label!r} cannot be the text and the label; name both.")
    client = given.client or _called(table, _CLIENTS)
    roles = given._replace(label=label, client=client)
    if roles.text or roles.image or roles.features:
        return roles
    taken = {label, client, roles.weight}
    left = {name: column for name, column in table.columns.items() if name not in taken}
    images = [name for name, column in left.items() if _holds_images(column)]
    holds_text = lambda name, column: holds_words(column) or _holds_text(column, name)
    texts = [n for n, column in left.items() if n not in images and holds_text(n, column)]
    if image := _one(images, _IMAGES):
        return roles._replace(image=image)
    others = images + texts
    features = tuple(n for n in left if n.lower() not in _NUMBERS and n not in others)
    if text := _one(texts, _TEXTS, alone=not features):
        return roles._replace(text=(text,))
    if others:
        raise ValueError(
            f"{table.origin}: any of {names_of((*others, *features))} could be the input; choose "
            "with text, image or features."
        )
    if not features:
        raise ValueError(f"{table.origin} has no column to learn from: {names_of(table.columns)}.")
    return roles._replace(features=features)


def _check_given(table: Table, given: Roles) -> None:
    for role, names in given._asdict().items():
        for name in (names,) if isinstance(names, str) else names or ():
            if name not in table.columns:
                raise ValueError(
                    f"{table.origin}: {role}={name!r} is not a column; it has "
                    f"{names_of(table.columns)}."
                )


def _called(table: Table, known: Sequence[str]) -> str | None:
    """Returns the column that has one of the known names; the first known one where several do."""
    found = {name.lower(): name for name in table.columns}
    return next((found[name] for name in known if name in found), None)


def _tags(table: Table) -> str | None:
    """Returns the known column of tags, if another column holds words."""
    name = _called(table, _TAGS)
    if name is None or isinstance(table.columns[name], np.ndarray):
        return None
    words = any(holds_words(column) for own, column in table.columns.items() if own != name)
    return name if words and any(map(len_of, table.columns[name])) else None


def _one(names: Sequence[str], known: Sequence[str], alone: bool = True) -> str | None:
    """Returns the name that is known, or the only one if it stands alone; None otherwise."""
    found = {name.lower(): name for name in names}
    named = [found[name] for name in known if name in found]
    if named:
        return named[0]
    return names[0] if alone and len(names) == 1 else None


def _holds_images(column: Column) -> bool:
    if isinstance(column, np.ndarray):
        return column.ndim > 2
    cell = next((cell for cell in column if cell is not None), None)
    if isinstance(cell, str | Path):
        return is_image(Path(cell)) and not str(cell).strip().count("\n")
    return (
        hasattr(cell, "convert")
        or (isinstance(cell, dict) and "bytes" in cell)
        or (isinstance(cell, list | np.ndarray) and np.ndim(cell) > 1)
    )


def _holds_text(column: Column, name: str) -> bool:
    if isinstance(column, np.ndarray):
        return column.dtype.kind in "US"
    present = [cell for cell in column if isinstance(cell, list | dict) or not _is_missing(cell)]
    text = [cell for cell in present if isinstance(cell, str) and not _is_number(cell)]
    if name.lower() in _TEXTS and any(isinstance(cell, str) for cell in column):
        return True
    return 2 * len(text) > len(present)  # a few may be "n/a" among numbers


def _is_number(cell: Any) -> bool:
    try:
        float(cell)
    except (TypeError, ValueError):
        return False
    return True


def _is_missing(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip()) or cell != cell


def labels(
    table: Table, name: str, known: Sequence[str] = ()
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns the classes i32[N] of a column, and their names.

    Args:
      table, name: where they are.
      known: the names, in order, where others have given them; () for those that are found.
    Raises:
      ValueError: missing, fractions, outside the names that the file or `known` gives, or no
        classes: fewer than two, or hardly any row with that of another.
    """
    cells = table.columns[name]
    shape = np.shape(cells) if isinstance(cells, np.ndarray) else np.shape(cells[0])
    if isinstance(cells, np.ndarray) and (cells.ndim > 2 or cells.shape[1:] not in ((), (1,))):
        raise ValueError(
            f"{table.origin}: column {name!r} has shape {shape}; give one label a row."
        )
    flat = [cell[0] if np.shape(cell) == (1,) else cell for cell in _plain(cells)]
    for row, cell in enumerate(flat):
        if _is_missing(cell):
            raise table.fault(name, row, "the label is missing.")
        if isinstance(cell, list | dict | bytes):
            raise table.fault(name, row, f"{cell!r:.40} is not a label.")
    if known:
        return _among(table, name, flat, known), tuple(known)
    if name in table.classes:
        return _numbered(table, name, flat), table.classes[name]
    if all(map(_is_number, flat)):
        flat = _whole(table, name, flat)
    elif any(not isinstance(cell, str) for cell in flat):
        flat = [str(cell) for cell in flat]
    found, numbers = np.unique(np.array(flat), return_inverse=True)
    if len(found) < 2:
        raise ValueError(
            f"{table.origin}: column {name!r} has only the label {found[0]!s}; there must be two."
        )
    if len(flat) >= 20 and len(found) > len(flat) / 2:
        raise ValueError(
            f"{table.origin}: column {name!r} has {len(found)} different values in {len(flat)} "
            "rows; these are no classes."
        )
    return numbers.astype(np.int32), tuple(map(str, found))


def _plain(cells: Column) -> list:
    return cells.tolist() if isinstance(cells, np.ndarray) else list(cells)


def _whole(table: Table, name: str, cells: Sequence) -> list[int]:
    numbers = [float(cell) for cell in cells]
    for row, number in enumerate(numbers):
        if not number.is_integer():
            raise table.fault(name, row, f"the label {cells[row]} is not a whole number.")
    return [int(number) for number in numbers]


def _among(table: Table, name: str, cells: Sequence, known: Sequence[str]) -> np.ndarray:
    """Returns the places of labels among known names; a column that has names goes by these."""
    places = {text: place for place, text in enumerate(known)}
    own = table.classes.get(name)
    numbers = _numbered(table, name, cells) if own else None
    found = np.empty(len(cells), np.int32)
    for row, cell in enumerate(cells):
        texts = [str(cell)] if own is None or numbers is None else [own[numbers[row]]]
        if own is None and _is_number(cell) and float(cell).is_integer():
            texts.append(str(int(float(cell))))
        place = next((places[text] for text in texts if text in places), None)
        if place is None:
            raise table.fault(
                name,
                row,
                f"the label {texts[0]!r} is none of {names_of(known)}.",
            )
        found[row] = place
    return found


def _numbered(table: Table, name: str, cells: Sequence) -> np.ndarray:
    """Returns labels, numbers or names, of a column whose classes are known."""
    known = table.classes[name]
    places = {text: place for place, text in enumerate(known)}
    for row, cell in enumerate(cells):
        if cell not in places and not (_is_number(cell) and float(cell) in range(len(known))):
            raise table.fault(
                name, row, f"the label {cell!r} is not one of 0..{len(known) - 1}, its classes."
            )
    return np.array([places[c] if c in places else int(float(c)) for c in cells], np.int32)


def features(table: Table, names: Sequence[str]) -> np.ndarray:
    """Returns columns of numbers, or of equally long lists of numbers, as one f32[N, D].

    Raises:
      ValueError: a cell that is no number, NaN or infinite.
    """
    parts = [numbers(table, name) for name in names]
    joined = np.concatenate([part.reshape(table.size, -1) for part in parts], axis=1)
    if not joined.size:
        raise ValueError(f"{table.origin}: the columns {names_of(names)} hold no numbers.")
    return joined


def numbers(table: Table, name: str) -> np.ndarray:
    """Returns a column as f32 [N, ...]; raises as `features`."""
    cells = table.columns[name]
    if isinstance(cells, np.ndarray) and cells.dtype.kind not in "biufU":
        raise ValueError(f"{table.origin}: column {name!r} holds {cells.dtype}, not numbers.")
    try:
        with np.errstate(over="ignore"):
            values = np.array(cells, np.float64).astype(np.float32)
    except (TypeError, ValueError, OverflowError):
        row = _first_bad(cells)
        raise table.fault(name, row, f"{cells[row]!r:.40} is not a number.") from None
    finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        what = "a number is missing" if cells[row] is None else f"{cells[row]!s:.40} is not finite"
        raise table.fault(name, row, f"{what}.")
    return values


def _first_bad(cells: Sequence | np.ndarray) -> int:
    """Returns the first row that is no number, or is shaped unlike the first row."""
    for row, cell in enumerate(cells):
        try:
            if np.array(cell, np.float64).shape != np.array(cells[0], np.float64).shape:
                return row
        except (TypeError, ValueError, OverflowError):
            return row
    return 0


def weights(table: Table, name: str) -> np.ndarray:
    """Returns the weights f32[N] of rows, 0 or more and not all 0.

    Raises:
      ValueError: another shape, negative, NaN or infinite.
    """
    values = numbers(table, name)
    values = values[:, 0] if values.shape[1:] == (1,) else values
    if values.ndim != 1:
        raise ValueError(f"{table.origin}: column {name!r} must hold one weight a row.")
    if (values < 0).any():
        row = int(np.argmax(values < 0))
        raise table.fault(name, row, f"the weight {values[row]} is negative.")
    if not values.any():
        raise ValueError(f"{table.origin}: column {name!r} gives every row the weight 0.")
    return values


def texts(table: Table, names: Sequence[str]) -> list[str]:
    """Returns the texts of rows; several columns are joined by line breaks."""
    for name in names:
        for row, cell in enumerate(table.columns[name]):
            if not isinstance(cell, str):
                raise table.fault(name, row, f"{cell!r:.40} is not text.")
    return ["\n".join(cells) for cells in zip(*(table.columns[name] for name in names))]


def images(table: Table, name: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """Returns a column of images as u8 or f32 [N, H, W, C]; see `jaxfm.data.images`.

    Paths count from the folder of the file that names them.
    """
    cells = table.columns[name]
    where = f"{table.origin}, column {name!r}"
    if isinstance(cells, np.ndarray):
        if size is not None:
            raise ValueError(f"{where}: arrays cannot be scaled to {size}; give image files.")
        return as_images(cells, where)
    if all(isinstance(cell, str | Path) for cell in cells):
        paths = [_base(table, row) / cell for row, cell in enumerate(cells)]
        return as_images(read_images(paths, size), where)
    opened = [_decoded(table, name, row) for row in range(len(cells))]
    rows = [f"{where}, row {row + 1}" for row in range(len(cells))]
    return as_images(stack_images(opened, rows, size), where)


def _base(table: Table, row: int) -> Path:
    return Path(table.piece_of(row)[0].origin).parent


def _decoded(table: Table, name: str, row: int) -> Any:
    """Returns an image of a row: opened by Pillow, or an array."""
    cell = table.columns[name][row]
    if isinstance(cell, dict):  # as `datasets` stores images
        content, path = cell.get("bytes"), cell.get("path")
        if not isinstance(content, bytes) and not isinstance(path, str):
            raise table.fault(name, row, f"{cell!r:.40} is not an image.")
        source = io.BytesIO(content) if content else path
        return open_image(source, f"{table.origin}, row {row + 1}, column {name!r}")
    if hasattr(cell, "convert"):
        return cell
    try:
        return np.array(cell, np.float64) if np.ndim(cell) > 1 else _no_image(cell)
    except ValueError:
        raise table.fault(name, row, f"{cell!r:.40} is not an image.") from None


def _no_image(cell: Any) -> np.ndarray:
    raise ValueError(cell)
