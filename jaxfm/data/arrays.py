"""Data sets that are arrays already: npz files, and scikit-learn's digits."""

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxfm.data.images import as_images
from jaxfm.data.source import Source, checked, with_clients


def npz(path: str | Path, leaves: Mapping[str, str] | None = None) -> Source:
    """Returns the arrays of an npz file as one split.

    Args:
      path: the file. Object arrays (pickles) are refused.
      leaves: leaf name -> key in the file, such as {"image": "train_images"}; by default every key
        under its own name. A leaf "client" becomes the rows' owners. The leaf "image" gets the
        layout and the scale of `jaxfm.data.images`. Labels, and integers of more than 32 bits,
        become i32; f64 becomes f32.
    Raises:
      FileNotFoundError: no such file.
      ValueError: damaged; a key is missing; leading sizes differ; a number does not fit in i32.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            leaves = dict(leaves or {key: key for key in file.files})
            if missing := sorted(set(leaves.values()) - set(file.files)):
                raise ValueError(f"There is no {missing}; found {sorted(file.files)}.")
            examples = {name: _narrow(name, file[key]) for name, key in leaves.items()}
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, AttributeError) as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"{path} ({path.stat().st_size} bytes found): {reason}.") from error
    owners = examples.pop("client", None)
    source = Source(examples) if owners is None else with_clients(Source(examples), owners)
    return checked(source, path)


def digits(*, seed: int = 0) -> dict[str, Source]:
    """Returns scikit-learn's 1,797 handwritten digits, the default data set for vision.

    {"train": 1297, "validation": 250, "test": 250} rows of "image" f32[N, 8, 8, 1] in 0..1 and
    "label" i32[N], split at random by `seed`.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (data.images[..., None] / 16).astype(np.float32)
    labels = data.target.astype(np.int32)
    order = np.random.default_rng(seed).permutation(len(labels))
    parts = {"train": order[500:], "validation": order[:250], "test": order[250:500]}
    classes = tuple(map(str, range(10)))
    return {
        split: Source({"image": images[rows], "label": labels[rows]}, classes=classes)
        for split, rows in parts.items()
    }


def _narrow(name: str, array: np.ndarray) -> np.ndarray:
    if name == "image" and array.ndim > 2:
        return as_images(array, name)
    if name == "label" and array.dtype.itemsize < 4:
        return array.astype(np.int32)
    if array.dtype == np.float64:
        return array.astype(np.float32)
    if (
        array.dtype.kind in "iu"
        and array.dtype.itemsize * (2 if array.dtype.kind == "u" else 1) > 4
    ):
        limits = np.iinfo(np.int32)
        if array.size and not limits.min <= array.min() <= array.max() <= limits.max:
            raise ValueError(
                f"{name} holds {array.min()}..{array.max()}, which does not fit in i32."
            )
        return array.astype(np.int32)
    return array
