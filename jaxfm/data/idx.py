"""IDX files, the format of MNIST: a typed, shaped header and then the numbers.

Header: two zero bytes, a type code, the number of axes, then each axis as a big-endian i32.
"""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from jaxfm.data.source import Source, checked, with_clients

TYPES: dict[int, np.dtype] = {
    0x08: np.dtype("u1"),
    0x09: np.dtype("i1"),
    0x0B: np.dtype(">i2"),
    0x0C: np.dtype(">i4"),
    0x0D: np.dtype(">f4"),
    0x0E: np.dtype(">f8"),
}


def read_idx(path: str | Path) -> np.ndarray:
    """Returns the array in an IDX file, gzipped or not, in native byte order.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not an IDX file, damaged, or of another size than its header says.
    """
    data = _read_bytes(Path(path))
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in TYPES or data[3] == 0:
        raise ValueError(
            f"{path} is not an IDX file: it starts with the bytes {data[:4].hex(' ')!r}."
        )
    dtype, num_axes = TYPES[data[2]], data[3]
    start = 4 + 4 * num_axes
    if len(data) < start:
        raise ValueError(
            f"{path} is cut off: a header of {start} bytes expected, {len(data)} found."
        )
    shape = struct.unpack(f">{num_axes}I", data[4:start])
    expected = start + dtype.itemsize * int(np.prod(shape, dtype=object))
    if len(data) != expected:
        raise ValueError(
            f"{path} should have {expected} bytes for shape {shape} of {dtype.name}; "
            f"{len(data)} found."
        )
    return np.frombuffer(data, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def mnist(folder: str | Path, *, writers: str | Path | None = None) -> dict[str, Source]:
    """Returns MNIST, or a data set in the same four files (Fashion-MNIST, KMNIST), as two splits.

    "image" u8[N, 28, 28, 1], "label" i32[N].

    Args:
      folder: holds {train,t10k}-{images-idx3,labels-idx1}-ubyte, with or without ".gz".
      writers: a folder with QMNIST's extended labels, qmnist-{train,test}-labels-idx2-int, gzipped
        or not; then each row has its writer as client, the natural federated split. The writers of
        the two splits are different people, numbered apart.
    Raises:
      FileNotFoundError, ValueError: as `read_idx`, and files that do not belong together.
    """
    folder = Path(folder)
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        image_path = _either(folder / f"{prefix}-images-idx3-ubyte")
        label_path = _either(folder / f"{prefix}-labels-idx1-ubyte")
        images, labels = read_idx(image_path), read_idx(label_path).astype(np.int32)
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise ValueError(
                f"{image_path} {images.shape} and {label_path} {labels.shape} do not fit "
                "each other."
            )
        source = Source({"image": images[..., None], "label": labels})
        if writers is not None:
            source = with_clients(source, _writers(Path(writers), split, labels))
        splits[split] = checked(source, image_path)
    return splits


def _writers(folder: Path, split: str, labels: np.ndarray) -> np.ndarray:
    """Returns each row's writer (column 2). QMNIST's test part goes on where MNIST's ends."""
    path = _either(folder / f"qmnist-{split}-labels-idx2-int")
    table = read_idx(path)
    if table.ndim != 2 or table.shape[1] < 3 or len(table) < len(labels):
        raise ValueError(
            f"{path} should hold {len(labels)} rows or more of 8; found {table.shape}."
        )
    table = table[: len(labels)]
    if (table[:, 0] != labels).any():
        row = int(np.argmax(table[:, 0] != labels))
        raise ValueError(
            f"{path} labels row {row} as {table[row, 0]}, the images' labels say {labels[row]}: "
            f"not the writers of this data set."
        )
    return table[:, 2]


def _either(path: Path) -> Path:
    zipped = path.with_name(path.name + ".gz")
    found = [candidate for candidate in (path, zipped) if candidate.is_file()]
    if not found:
        raise FileNotFoundError(f"Neither {path} nor {zipped.name} exists.")
    return found[0]


def _read_bytes(path: Path) -> bytes:
    data = path.read_bytes()
    if not data.startswith(b"\x1f\x8b"):
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged ({len(data)} bytes found): {error}.") from error
