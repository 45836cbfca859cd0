"""CIFAR-10 and CIFAR-100, in the two forms they are published in.

Binary: records of one label byte (CIFAR-100: two, coarse and fine) and 3072 bytes of pixels.
Python: pickled dicts of "data" u8[n, 3072] and "labels" ("fine_labels"). Pixels are stored channel
by channel, 32 x 32 each.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from jaxfm.data.source import Source, checked
from jaxfm.data.tables import read_arrays

CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
PIXELS = 3 * 32 * 32

# All that pickled NumPy arrays name; anything else in a pickle could run code.
SAFE_GLOBALS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
}


def cifar10(folder: str | Path) -> dict[str, Source]:
    """Returns CIFAR-10: {"train", "test"} of "image" u8[N, 32, 32, 3] and "label" i32[N].

    Args:
      folder: holds data_batch_1 ... data_batch_5 and test_batch, all with or all without ".bin"; or
        is an .npz file of train_images, train_labels, test_images and test_labels.
    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, or holds anything but such a data set.
    """
    if str(folder).endswith(".npz"):
        return _npz(Path(folder))
    train = [f"data_batch_{number}" for number in range(1, 6)]
    return _load(Path(folder), {"train": train, "test": ["test_batch"]}, 1, CIFAR10_CLASSES)


def cifar100(folder: str | Path) -> dict[str, Source]:
    """Returns CIFAR-100 with its 100 fine labels, otherwise as `cifar10`; files train and test."""
    names = tuple(f"class {number}" for number in range(100))
    return _load(Path(folder), {"train": ["train"], "test": ["test"]}, 2, names)


def _npz(path: Path) -> dict[str, Source]:
    file = read_arrays(path)
    names = [f"{split}_{part}" for split in ("train", "test") for part in ("images", "labels")]
    if not isinstance(file, dict) or not set(names) <= set(file):
        held = sorted(file) if isinstance(file, dict) else "a single array"
        raise ValueError(f"{path} should hold {names}; found {held}.")
    for name in names[1::2]:
        if file[name].dtype.kind not in "iu":
            raise ValueError(f"{path}: {name} should be whole numbers; found {file[name].dtype}.")
    images = {split: file[f"{split}_images"] for split in ("train", "test")}
    labels = {split: file[f"{split}_labels"].astype(np.int32) for split in ("train", "test")}
    sources = {
        split: Source({"image": images[split], "label": labels[split]}, classes=CIFAR10_CLASSES)
        for split in images
    }
    return {split: checked(source, path) for split, source in sources.items()}


def _load(
    folder: Path, files: dict[str, list[str]], label_bytes: int, classes: tuple[str, ...]
) -> dict[str, Source]:
    splits = {}
    for split, names in files.items():
        parts = []
        for name in names:
            binary = folder / f"{name}.bin"
            if binary.is_file():
                parts.append(read_binary(binary, label_bytes))
            elif (folder / name).is_file():
                parts.append(read_python(folder / name))
            else:
                raise FileNotFoundError(f"Neither {folder / name} nor {binary.name} exists.")
        pixels = np.concatenate([pixels for pixels, _ in parts])
        labels = np.concatenate([labels for _, labels in parts])
        images = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        source = Source({"image": images, "label": labels}, classes=classes)
        splits[split] = checked(source, folder / names[0])
    return splits


def read_binary(path: Path, label_bytes: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Returns pixels u8[n, 3072] and labels i32[n], the last label byte, of one binary file."""
    record = label_bytes + PIXELS
    data = np.fromfile(path, np.uint8)
    if data.size == 0 or data.size % record:
        raise ValueError(
            f"{path} should have a multiple of {record} bytes (one record); {data.size} found."
        )
    data = data.reshape(-1, record)
    return data[:, label_bytes:], data[:, label_bytes - 1].astype(np.int32)


def read_python(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns pixels u8[n, 3072] and labels i32[n] of a pickled file; runs no code from it."""
    try:
        with path.open("rb") as file:
            batch = _ArrayUnpickler(file, encoding="bytes").load()
    except Exception as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes found) cannot be read as a pickled batch: "
            f"{str(error).rstrip('.')}."
        ) from error
    if not isinstance(batch, dict):
        raise ValueError(f"{path} should hold a dict; found {type(batch).__name__}.")
    batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
    labels = batch.get("fine_labels", batch.get("labels"))
    pixels = batch.get("data")
    if labels is None or not isinstance(pixels, np.ndarray):
        raise ValueError(
            f"{path} should hold 'data' and 'labels'; found {sorted(map(str, batch))}."
        )
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), PIXELS):
        raise ValueError(
            f"{path} should hold uint8 data of shape {(len(labels), PIXELS)}; "
            f"found {pixels.dtype} {pixels.shape}."
        )
    return pixels, np.asarray(labels, np.int32)


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")  # its name before NumPy 2
        if (module, name) not in SAFE_GLOBALS:
            raise pickle.UnpicklingError(f"It asks for {module}.{name}, which is not an array.")
        return super().find_class(module, name)
