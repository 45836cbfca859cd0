"""CIFAR-10 for the parts, from whatever form it comes in, and networks trained on it."""

from __future__ import annotations

import io
import itertools
import pathlib
from collections.abc import Mapping

import jax
import numpy as np
from search_cifar import load_network

from jaxfm.data.cifar import cifar10
from jaxfm.model import Model, Variables
from jaxfm.tasks import Task

SPLITS = ("train", "test")


def decoded(path: str, cache: pathlib.Path) -> pathlib.Path:
    """An npz file of train_images, train_labels, test_images and test_labels.

    Args:
      path: such a file; an npz file of JPEG streams (`*_bytes` u8[n], `*_offsets` i64[N + 1] and
        `*_labels` for train and test); or a folder that `jaxfm.data.cifar.cifar10` reads.
      cache: a folder for the decoded file, where `path` is not one already.
    """
    source, target = pathlib.Path(path), cache / "cifar10_decoded.npz"
    if source.suffix == ".npz":
        with np.load(source) as file:
            if "train_images" in file.files:
                return source
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        arrays = _streams(source) if source.suffix == ".npz" else _folder(source)
        scratch = target.with_name("decoding.npz")
        np.savez(scratch, **arrays)
        scratch.replace(target)
    return target


def _folder(path: pathlib.Path) -> dict[str, np.ndarray]:
    data = cifar10(path)
    named = {"images": "image", "labels": "label"}
    return {f"{s}_{n}": data[s].examples[leaf] for s in SPLITS for n, leaf in named.items()}


def _streams(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Every JPEG stream of the file, decoded."""
    from PIL import Image  # of this form only

    arrays: dict[str, np.ndarray] = {}
    with np.load(path) as file:
        for split in SPLITS:
            data, ends = file[f"{split}_bytes"].tobytes(), file[f"{split}_offsets"]
            streams = (data[a:b] for a, b in itertools.pairwise(ends))
            images = [np.asarray(Image.open(io.BytesIO(s)).convert("RGB")) for s in streams]
            arrays[f"{split}_images"] = np.stack(images)
            arrays[f"{split}_labels"] = file[f"{split}_labels"].astype(np.int32)
    return arrays


def cifar_rows(path: pathlib.Path, split: str) -> Mapping[str, np.ndarray]:
    """One split in an order drawn once: "image" u8[N, 32, 32, 3] and "label" i32[N]."""
    examples = cifar10(path)[split].examples
    order = np.random.default_rng(0).permutation(len(examples["label"]))
    return {name: leaf[order] for name, leaf in examples.items()}


def residual_network(weights: pathlib.Path) -> tuple[Model, Variables, Task]:
    """A trained ResNet, its weights on the device, and its task, which scales images for it."""
    model, variables, task = load_network(str(weights))
    return model, jax.tree.map(jax.numpy.asarray, variables), task
