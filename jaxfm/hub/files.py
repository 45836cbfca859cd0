"""Where the tensors of a pretrained model lie: safetensors folders, the hub's cache, llama2.c.

Whatever the file, its tensors are a dict of `StoredTensor` by their Hugging Face names.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_INDEX = "model.safetensors.index.json"


class StoredTensor(NamedTuple):
    """A tensor of a file: its shape, its dtype's name, and how to read it."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def find_folder(path_or_name: str | os.PathLike) -> pathlib.Path:
    """Returns the local folder of a path or hub name."""
    path = pathlib.Path(path_or_name)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise FileNotFoundError(f"{path} has no config.json; it is no Hugging Face model.")
        return path
    name = os.fspath(path_or_name)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise FileNotFoundError(f"There is no folder {name}.")
    import huggingface_hub

    files = ["*config.json", "model*.safetensors", _INDEX]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except Exception as error:  # a dozen kinds, from the network up to the licence
        raise FileNotFoundError(
            f"No model {name!r}: there is no such folder, the local cache of the Hugging Face hub "
            f"does not hold it, and it could not be fetched ({str(error).strip().splitlines()[0]})."
        ) from error


def open_safetensors(folder: pathlib.Path) -> dict[str, StoredTensor]:
    """Returns every tensor of a folder's safetensors files."""
    if (folder / "model.safetensors").exists():
        files = ["model.safetensors"]
    elif (folder / _INDEX).exists():
        files = _indexed(folder / _INDEX)
    else:
        raise FileNotFoundError(
            f"{folder} has neither model.safetensors nor {_INDEX}; weights in another form have to "
            "be saved as safetensors first."
        )
    stored: dict[str, StoredTensor] = {}
    for file in files:
        if not (folder / file).exists():
            raise FileNotFoundError(f"{folder} lacks {file}, which its index names.")
        stored |= open_file(folder / file)
    return stored


def open_file(path: pathlib.Path) -> dict[str, StoredTensor]:
    """Returns every tensor of one safetensors file.

    Raises:
      ValueError: it cannot be read as one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        handle = safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors; it may be cut short ({error})."
        ) from None
    stored = {}
    for name in handle.keys():  # noqa: SIM118 (not a mapping)
        part = handle.get_slice(name)
        kind = part.get_dtype()
        read = functools.partial(handle.get_tensor, name)
        stored[name] = StoredTensor(tuple(part.get_shape()), DTYPES.get(kind, kind), read)
    return stored


def _indexed(path: pathlib.Path) -> list[str]:
    """The files that an index of tensors names."""
    try:
        files = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        return [pathlib.PurePath(file).name for file in files]  # beside the index, and nowhere else
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is no index of safetensors files ({type(error).__name__}: {error})."
        ) from None


def open_llama2c(path: pathlib.Path) -> tuple[list[int], dict[str, StoredTensor]]:
    """Returns the header (dim, hidden, layers, heads, kv heads, vocab, length) and the tensors.

    The vocabulary is negative where the output layer has weights of its own.
    """
    header = np.fromfile(path, "<i4", 7).tolist()
    if len(header) < 7 or min(header[:5]) < 1:
        raise ValueError(f"{path} is not a llama2.c checkpoint; its header reads {header}.")
    dim, hidden, depth, heads, kv_heads, vocab, max_len = header
    half, kv_dim = dim // heads // 2, dim // heads * kv_heads
    # Names of the Llama format and shapes, in the order of the file; {} for stacked layers.
    sections = [
        ("model.embed_tokens.weight", (abs(vocab), dim)),
        ("model.layers.{}.input_layernorm.weight", (depth, dim)),
        ("model.layers.{}.self_attn.q_proj.weight", (depth, dim, dim)),
        ("model.layers.{}.self_attn.k_proj.weight", (depth, kv_dim, dim)),
        ("model.layers.{}.self_attn.v_proj.weight", (depth, kv_dim, dim)),
        ("model.layers.{}.self_attn.o_proj.weight", (depth, dim, dim)),
        ("model.layers.{}.post_attention_layernorm.weight", (depth, dim)),
        ("model.layers.{}.mlp.gate_proj.weight", (depth, hidden, dim)),
        ("model.layers.{}.mlp.down_proj.weight", (depth, dim, hidden)),
        ("model.layers.{}.mlp.up_proj.weight", (depth, hidden, dim)),
        ("model.norm.weight", (dim,)),
        ("rotary tables", (2, max_len, half)),
        *([] if vocab > 0 else [("lm_head.weight", (abs(vocab), dim))]),
    ]
    values = np.fromfile(path, "<f4", offset=28)
    expected = sum(math.prod(shape) for _, shape in sections)
    if values.size != expected:
        raise ValueError(
            f"{path} holds {values.size} numbers, but its header {header} asks for {expected}."
        )
    tensors: dict[str, np.ndarray] = {}
    at = 0
    for name, shape in sections:
        tensor = values[at : at + math.prod(shape)].reshape(shape)
        at += tensor.size
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # Rotary pairs are neighbours there, and half a head apart here.
            tensor = tensor.reshape(depth, -1, half, 2, dim).swapaxes(2, 3).reshape(shape)
        rows = {name.format(i): tensor[i] for i in range(depth)} if "{}" in name else {name: tensor}
        tensors |= rows
    del tensors["rotary tables"]
    reader = lambda tensor: functools.partial(np.asarray, tensor)
    return header, {
        name: StoredTensor(tensor.shape, "float32", reader(tensor))
        for name, tensor in tensors.items()
    }


def write_safetensors(
    folder: pathlib.Path,
    shapes: Mapping[str, tuple[tuple[int, ...], int]],
    tensor: Callable[[str], np.ndarray],
    max_shard_bytes: int,
) -> None:
    """Writes `tensor(name)` of every name, in one file or in several with an index.

    Args:
      folder: an existing folder.
      shapes: shape and bytes a number, by name.
      tensor: gives the values when their file is written.
      max_shard_bytes: of one file.
    """
    from safetensors.numpy import save_file

    bytes_of = {name: math.prod(shape) * size for name, (shape, size) in shapes.items()}
    shards = list(_shards(bytes_of, max_shard_bytes))
    files = ["model.safetensors"]
    if len(shards) > 1:
        count = len(shards)
        files = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        homes = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(bytes_of.values())}, "weight_map": homes}
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for file, shard in zip(files, shards, strict=True):
        tensors = {name: np.asarray(tensor(name), order="C") for name in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})


def _shards(bytes_of: Mapping[str, int], max_bytes: int) -> Iterator[list[str]]:
    """Yields lists of names of at most `max_bytes` together, or of one tensor."""
    shard: list[str] = []
    used = 0
    for name, size in bytes_of.items():
        if shard and used + size > max_bytes:
            yield shard
            shard, used = [], 0
        shard.append(name)
        used += size
    yield shard


# What a model's folder may hold of the model before.
_OF_A_MODEL = ("model*.safetensors", _INDEX, "generation_config.json", "preprocessor_config.json")


@contextlib.contextmanager
def new_folder(
    path: str | os.PathLike, stale: Sequence[str] = _OF_A_MODEL
) -> Iterator[pathlib.Path]:
    """Gives a folder to fill, which then takes its place at `path`.

    A new folder appears whole; in one that exists each file is replaced whole.

    Args:
      path: the folder.
      stale: patterns of files that are removed from a folder that exists, unless written anew.
    """
    path = pathlib.Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as work:
        new = pathlib.Path(work, path.name)
        new.mkdir()
        yield new
        _publish(new, path, stale)


def _publish(new: pathlib.Path, path: pathlib.Path, stale: Sequence[str]) -> None:
    """Moves a finished folder to its place."""
    if not path.exists():
        new.rename(path)
        return
    names = {file.name for file in new.iterdir()}
    for file in new.iterdir():
        file.replace(path / file.name)
    for old in [file for pattern in stale for file in path.glob(pattern)]:
        if old.name not in names:
            old.unlink(missing_ok=True)
