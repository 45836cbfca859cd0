"""Data sets from the Hugging Face hub, by name, with the `datasets` library (extra "data")."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxfm.data.images import as_images
from jaxfm.data.source import Source, checked, with_clients
from jaxfm.data.splits import split_in
from jaxfm.data.tables import Table, from_datasets, join
from jaxfm.data.text import Document


def huggingface(
    name: str,
    split: str = "train",
    *,
    columns: Mapping[str, str],
    config: str | None = None,
    client: str | None = None,
    **options: Any,
) -> Source:
    """Returns columns of one split as examples.

    Args:
      name: on the hub, or a local folder, or a format such as "json" with `data_files=...`.
      split: as `datasets.load_dataset` reads it ("train", "test[:1000]").
      columns: leaf -> column, such as {"image": "img", "label": "label"}. The leaf "image"
        gets the layout and the scale of `jaxfm.data.images`; whole numbers become i32, other
        numbers f32; all rows must have one shape.
      config: the data set's configuration, where it has several.
      client: the column that says whose a row is.
      options: passed on to `datasets.load_dataset`.
    Raises:
      ImportError: the `datasets` library is not installed.
      ValueError: no such data set here or on the hub, no such column, rows of unequal shape.
    """
    data = _load(name, split, config, [*columns.values(), *([client] if client else [])], options)
    examples = {leaf: _stack(name, column, data[column]) for leaf, column in columns.items()}
    if "image" in examples:
        examples["image"] = as_images(examples["image"], name)
    label = columns.get("label")
    classes = tuple(getattr(data.features.get(label), "names", None) or ()) if label else ()
    source = Source(examples, classes=classes)
    if client is not None:
        source = with_clients(source, np.asarray(data[client]))
    return checked(source, name)


def huggingface_documents(
    name: str,
    split: str = "train",
    *,
    text: str = "text",
    config: str | None = None,
    client: str | None = None,
    **options: Any,
) -> list[Document]:
    """Returns one text column as documents for `jaxfm.data.corpus`; arguments as of `huggingface`.

    Rows are named by their number; without a `client` column each row is its own owner.
    """
    data = _load(name, split, config, [text, *([client] if client else [])], options)
    names = [f"{name}/{split}/{number}" for number in range(len(data))]
    owners = [str(owner) for owner in data[client]] if client else names
    return [Document(*row) for row in zip(names, owners, data[text], strict=True)]


def open_hub(name: str) -> Table:
    """Returns all splits of a data set on the hub as one table.

    Args:
      name: "name", or "name:config" where it has several configurations.
    Raises:
      ImportError, ValueError: as `huggingface`.
    """
    name, _, config = name.partition(":")
    data = _fetch(name, None, config or None, {})
    parts = [from_datasets(part, f"{name} ({n})", split_in(n)[0]) for n, part in data.items()]
    return join(parts)


def _load(name: str, split: str, config: str | None, columns: list[str], options: dict) -> Any:
    data = _fetch(name, split, config, options)
    if missing := [column for column in columns if column not in data.column_names]:
        raise ValueError(f"{name} has no column {missing}; it has {data.column_names}.")
    return data


def _fetch(name: str, split: str | None, config: str | None, options: dict) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"There is no file or folder {name!r}; data sets of the Hugging Face hub need the "
            "`datasets` library: pip install 'jaxfm[data]'."
        ) from error
    try:
        return datasets.load_dataset(name, config, split=split, **options)
    except Exception as error:
        raise ValueError(
            f"Cannot load data set {name!r} (split {split!r}, config {config!r}): it is neither "
            f"here nor in the local cache, or the hub cannot be reached: {str(error).rstrip('.')}."
        ) from error


def _stack(name: str, column: str, values: Any) -> np.ndarray:
    arrays = [np.asarray(value) for value in values]
    shapes = {array.shape for array in arrays}
    if len(shapes) != 1:
        raise ValueError(f"{name}: rows of {column!r} differ in shape: {sorted(shapes)[:4]} ...")
    stacked = np.stack(arrays)
    if stacked.dtype.kind not in "biuf":
        raise ValueError(f"{name}: column {column!r} holds {stacked.dtype}, not numbers or images.")
    if stacked.dtype == np.uint8:
        return stacked if stacked.ndim == 4 else stacked[..., None]
    return stacked.astype(np.float32 if stacked.dtype.kind == "f" else np.int32)
