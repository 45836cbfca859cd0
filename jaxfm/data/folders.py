"""Folders of tables, of images by class and of texts, as tables.

A folder is read as what lies in it: tables (as the Hugging Face hub lays them out, too), NumPy
arrays, images, or texts. Files or folders called train, validation or test are splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxfm.data.splits import split_in
from jaxfm.data.tables import (
    Table,
    from_datasets,
    is_table,
    join,
    make_table,
    read_arrays,
    read_table,
    split_arrays,
)
from jaxfm.data.text import top_level

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"),
    ".npy",
)
# Written beside data by the `datasets` library; not data themselves.
_META = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def is_image(path: Path) -> bool:
    """Whether the file's suffix is that of an image, or of an array that may be one."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def read_path(
    path: Path,
    *,
    columns: Sequence[str] = (),
    encoding: str = "utf-8-sig",
    label_folders: bool = False,
) -> Table:
    """Returns what lies at a path as one table.

    Args:
      path: a file or a folder.
      columns, encoding: as of `read_table`.
      label_folders: texts lie in one folder for each class; otherwise a sub-folder is a client.
    Raises:
      FileNotFoundError: nothing that can be read lies there.
      ValueError: as of `read_table`.
    """
    if label_folders and not path.is_dir():
        raise ValueError(f"{path} is a file: label=folder is for texts in one folder a class.")
    if path.is_dir():
        return _folder(path, columns, encoding, label_folders)
    if is_table(path):
        return read_table(path, columns=columns, encoding=encoding)
    if path.suffix.lower() == ".txt":
        return _blocks(path, encoding)
    raise ValueError(
        f"{path}: files called *{path.suffix} cannot be read; give a CSV, TSV, JSON, JSONL, "
        "Parquet, npz, npy or txt file, or a folder."
    )


def _text(path: Path, encoding: str) -> str:
    try:
        return path.read_text(encoding, errors="replace")
    except LookupError:
        raise ValueError(f"encoding={encoding!r} is unknown; give one such as latin-1.") from None


def _blocks(path: Path, encoding: str) -> Table:
    """Returns a text file as one row for each block between empty lines."""
    blocks = _text(path, encoding).replace("\r\n", "\n").split("\n\n")
    return make_table({"text": [block for block in blocks if block.strip()]}, path)


def _array(file: Path) -> np.ndarray:
    array = read_arrays(file)
    if isinstance(array, dict):
        raise ValueError(f"{file} holds several arrays; call it {file.stem}.npz.")
    return array


def _folder(path: Path, columns: Sequence[str], encoding: str, label_folders: bool) -> Table:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return read_saved(path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file, path))
    arrays = [file for file in files if file.suffix == ".npy" and file.parent == path]
    tables = [file for file in files if is_table(file) and file.suffix != ".npy"]
    if arrays:
        return split_arrays({file.stem: _array(file) for file in arrays}, path)
    if tables:
        read = [read_table(file, columns=columns, encoding=encoding) for file in tables]
        return join([_in_split(table, file, path) for table, file in zip(read, tables)])
    if images := [file for file in files if is_image(file)]:
        return _by_class(path, images, "image", images)
    texts = [file for file in files if file.suffix.lower() == ".txt"]
    if not texts:
        raise FileNotFoundError(
            f"{path} holds no data: no table (CSV, TSV, JSON, JSONL, Parquet, npz, npy), image or "
            "*.txt file."
        )
    if len(texts) == 1:
        return _blocks(texts[0], encoding)
    contents = [_text(file, encoding) for file in texts]
    if label_folders or _splits_of_classes(path, texts):
        return _by_class(path, texts, "text", contents)
    names = [file.relative_to(path) for file in texts]
    cells = {"text": contents, "client": list(map(top_level, names))}
    return make_table(cells | {"file": [name.as_posix() for name in names]}, path)


def read_saved(path: Path) -> Table:
    """Returns what `datasets` saved with `save_to_disk`."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{path} was saved by the `datasets` library, which reads it: pip install "
            "'jaxfm[data]'."
        ) from error
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:
        raise ValueError(f"{path} cannot be read by `datasets`: {error}.") from error
    if hasattr(data, "column_names") and not isinstance(data, dict):
        return from_datasets(data, str(path), "")
    return join([from_datasets(part, f"{path}/{n}", split_in(n)[0]) for n, part in data.items()])


def _hidden(file: Path, root: Path) -> bool:
    return file.name in _META or any(p.startswith(".") for p in file.relative_to(root).parts)


def _in_split(table: Table, file: Path, root: Path) -> Table:
    """Returns the table as part of the split that its path below the root names."""
    if any(piece.split for piece in table.pieces):  # said by the arrays of an npz file
        return table
    split = split_in(file.relative_to(root).with_suffix("").as_posix())[0]
    return table._replace(pieces=tuple(piece._replace(split=split) for piece in table.pieces))


def _by_class(root: Path, files: Sequence[Path], column: str, cells: Sequence) -> Table:
    """Returns files in class folders, which may lie in split folders, as rows with labels."""
    splits = _split_folders(root, files)
    rows: dict[str, list] = {}
    for file, cell in zip(files, cells):
        parts = file.relative_to(root).parts
        split = splits.get(parts[0], "")
        parts = parts[1:] if split else parts
        if len(parts) < 2:
            raise ValueError(
                f"{file} lies in no folder of a class; {root} should hold one folder for each "
                "class, or train and test with these."
            )
        rows.setdefault(split, []).append((cell, parts[0], file.relative_to(root).as_posix()))
    names = (column, "label", "file")
    return join(
        [
            make_table(dict(zip(names, map(list, zip(*part)))), root / split, split)
            for split, part in sorted(rows.items())
        ]
    )


def _split_folders(root: Path, files: Sequence[Path]) -> dict[str, str]:
    """Returns the split of each folder right below the root, if all of them are splits."""
    tops = {file.relative_to(root).parts[0] for file in files}
    found = {top: split for top in tops for split, rest in [split_in(top)] if split and not rest}
    return found if set(found) == tops else {}


def _splits_of_classes(root: Path, files: Sequence[Path]) -> bool:
    """Whether files lie two folders deep, in classes within splits: then folders are labels."""
    depth = min(len(file.relative_to(root).parts) for file in files)
    return depth > 2 and bool(_split_folders(root, files))
