"""Convolutional networks from PyTorch and back: weights by the names of their state dict.

The names are those of torchvision (ResNet, VGG, MobileNet v2, ShuffleNet v2), and for ResNets with
the "cifar" stem those of the ResNet-20 to 110 that are commonly trained on CIFAR-10 ("linear" for
the classifier). Files are .safetensors, .npz or a checkpoint of PyTorch, which needs PyTorch.

>>> from jaxfm.testing import random_variables, tiny_resnet
>>> model = tiny_resnet()
>>> tensors = to_torch(model, random_variables(model))
>>> tensors["layer1.0.conv1.weight"].shape
(4, 4, 3, 3)
>>> _, variables = load_torch(model.config, tensors)
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxfm.frozen import thaw
from jaxfm.model import Model, Variables
from jaxfm.models import (
    MobileNetConfig,
    ResNetConfig,
    ShuffleNetConfig,
    VggConfig,
    VisionConfig,
    build,
)

# Our leaf and theirs. A norm's "bias" is a convolution's, too.
_LEAVES = {
    "kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean",
    "var": "running_var",
}  # fmt: skip
_Names = Iterator[tuple[str, str]]  # our module and theirs, each a dotted path


def load_torch(
    config: VisionConfig, source: str | os.PathLike | Mapping[str, Any]
) -> tuple[Model, Variables]:
    """Returns the model of `config` with the weights of a PyTorch state dict.

    Args:
      config: of the network that was trained, for example `jaxfm.models.resnet_config(20)`.
      source: a state dict (name to array), or a file: .safetensors, .npz, .pth, .pt or .th. A
        prefix "module." is dropped, and "state_dict" opened.
    Raises:
      FileNotFoundError: no such file.
      ImportError: a checkpoint of PyTorch where PyTorch is not installed.
      TypeError: the config's family has no names here.
      ValueError: another ending; a missing, unknown or misshapen tensor, by name.
    """
    tensors = dict(source) if isinstance(source, Mapping) else _read(pathlib.Path(source))
    tensors = {
        name.removeprefix("module."): np.asarray(tensor)
        for name, tensor in tensors.items()
        if not name.endswith("num_batches_tracked")
    }
    names = _module_names(config)
    model = build(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))

    def fill(path: str, leaf) -> jax.Array:
        name = _tensor_name(names, path)
        if name not in tensors:
            raise ValueError(f"The file lacks the tensor {name}, for {path} {leaf.shape}.")
        value = _from_torch(path, tensors.pop(name), leaf.shape, name)
        return jnp.asarray(value, leaf.dtype)

    def part(tree) -> Any:
        flat = {path: fill(path, leaf) for path, leaf in flatten_dict(tree, sep=".").items()}
        return unflatten_dict(flat, sep=".")

    params, stats = part(shapes.params), part(shapes.stats)
    live = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes.live)
    if tensors:
        raise ValueError(
            f"The file has tensors for which this {type(config).__name__} has no place: "
            f"{', '.join(sorted(tensors)[:5])}{', ...' if len(tensors) > 5 else ''}."
        )
    return model, Variables(params, stats, live)


def to_torch(model: Model, variables: Variables) -> dict[str, np.ndarray]:
    """Returns the state dict of a model or of a subnet of it, by PyTorch's names.

    Raises:
      TypeError: the model's family has no names here.
    """
    names = _module_names(model.config)
    params = thaw(variables).params
    leaves = flatten_dict(params, sep=".") | flatten_dict(variables.stats, sep=".")
    return {
        _tensor_name(names, path): _to_torch(path, np.asarray(leaf))
        for path, leaf in leaves.items()
    }


def save_torch(model: Model, variables: Variables, path: str | os.PathLike) -> None:
    """Writes `to_torch(model, variables)` to a .safetensors or .npz file.

    Raises:
      TypeError: the model's family has no names here.
      ValueError: another ending.
    """
    path = pathlib.Path(path)
    tensors = {k: np.ascontiguousarray(v) for k, v in to_torch(model, variables).items()}
    if path.suffix == ".safetensors":
        from safetensors.numpy import save_file

        save_file(tensors, path, metadata={"format": "pt"})
    elif path.suffix == ".npz":
        np.savez(path, **tensors)  # type: ignore[arg-type]
    else:
        raise ValueError(f"{path.name} must end in .safetensors or .npz.")


def _read(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.suffix not in (".safetensors", ".npz", ".pth", ".pt", ".th"):
        raise ValueError(f"{path.name} must end in .safetensors, .npz, .pth, .pt or .th.")
    try:
        return _tensors_in(path)
    except ImportError:
        raise
    except Exception as error:  # of many kinds, by the format
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        raise ValueError(f"{path} cannot be read as a state dict ({reason}).") from error


def _tensors_in(path: pathlib.Path) -> dict[str, Any]:
    if path.suffix == ".npz":
        with path.open("rb") as opened, np.load(opened) as file:
            return dict(file)
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        return load_file(path)
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path.name} is a checkpoint of PyTorch, which is not installed; install torch, or "
            "save the state dict as .safetensors or .npz."
        ) from error
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    return {name: tensor.float().numpy() for name, tensor in state.items()}


def _tensor_name(names: Mapping[str, str], path: str) -> str:
    module, leaf = path.rsplit(".", 1)
    return f"{names[module]}.{_LEAVES[leaf]}"


def _to_torch(path: str, leaf: np.ndarray) -> np.ndarray:
    """Turns kernels HWIO to OIHW and matrices [..., I, O] to [O, I ...], channels first."""
    if not path.endswith("kernel"):
        return leaf
    turned = leaf if leaf.ndim == 2 else leaf.transpose(2, 0, 1, 3)
    turned = np.moveaxis(turned, -1, 0)
    return turned if path.endswith("conv.kernel") else turned.reshape(len(turned), -1)


def _from_torch(path: str, tensor: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Inverts `_to_torch`."""
    expected = _to_torch(path, np.empty(shape, np.bool_)).shape
    if tensor.shape != expected:
        raise ValueError(
            f"The tensor {name} has shape {tensor.shape} in the file; the config asks for "
            f"{expected}, for {path} {shape}."
        )
    if not path.endswith("kernel"):
        return tensor
    if len(shape) == 2:
        return tensor.T
    height, width, inputs, outputs = shape
    return tensor.reshape(outputs, inputs, height, width).transpose(2, 3, 1, 0)


def _module_names(config: Any) -> dict[str, str]:
    for kind, names in _FAMILIES.items():
        if isinstance(config, kind):
            return dict(names(config))
    raise TypeError(f"A model of {type(config).__name__} has no PyTorch names here.")


def _pair(ours: str, conv: str, norm: str) -> _Names:
    yield f"{ours}.conv", conv
    yield f"{ours}.norm", norm


def _resnet(config: ResNetConfig) -> _Names:
    cifar = config.stem == "cifar"
    shortcut = "shortcut" if cifar else "downsample"
    yield from _pair("stem", "conv1", "bn1")
    for i, depth in enumerate(config.depths, 1):
        for j in range(depth):
            ours, theirs = f"stage{i}.{j}", f"layer{i}.{j}"
            for k in (1, 2, 3):
                yield from _pair(f"{ours}.conv{k}", f"{theirs}.conv{k}", f"{theirs}.bn{k}")
            yield from _pair(f"{ours}.shortcut", f"{theirs}.{shortcut}.0", f"{theirs}.{shortcut}.1")
    yield "classifier", "linear" if cifar else "fc"


def _vgg(config: VggConfig) -> _Names:
    at = 0
    for i, counts in enumerate(config.stages, 1):
        for j in range(len(counts)):
            yield from _pair(f"stage{i}.{j}", f"features.{at}", f"features.{at + 1}")
            at += 3 if config.batch_norm else 2  # the activation has a number, too
        at += 1  # and so has the pooling
    dense = len(config.dense_dims)
    for i in range(dense):
        yield f"dense{i + 1}", f"classifier.{3 * i}"  # then an activation and dropout
    yield "classifier", f"classifier.{3 * dense}" if dense else "classifier"


def _mobilenet(config: MobileNetConfig) -> _Names:
    if config.version == 1:
        raise TypeError("MobileNet v1 has no PyTorch names here; torchvision has version 2 only.")
    yield from _pair("stem", "features.0.0", "features.0.1")
    at = 1
    for i, (expansion, _, depth, _) in enumerate(config.rows, 1):
        for j in range(depth):
            ours, theirs = f"stage{i}.{j}", f"features.{at}.conv"
            parts = ("expand", "depth") if expansion > 1 else ("depth",)
            for k, part in enumerate(parts):
                yield from _pair(f"{ours}.{part}", f"{theirs}.{k}.0", f"{theirs}.{k}.1")
            k = len(parts)
            yield from _pair(f"{ours}.project", f"{theirs}.{k}", f"{theirs}.{k + 1}")
            at += 1
    yield from _pair("last", f"features.{at}.0", f"features.{at}.1")
    yield "classifier", "classifier.1"


def _shufflenet(config: ShuffleNetConfig) -> _Names:
    if config.version == 1:
        raise TypeError("ShuffleNet v1 has no PyTorch names here; torchvision has version 2 only.")
    yield from _pair("stem", "conv1.0", "conv1.1")
    for i, depth in enumerate(config.depths, 1):
        for j in range(depth):
            ours, theirs = f"stage{i}.{j}", f"stage{i + 1}.{j}"
            places = {"left_depth": (1, 0), "left_point": (1, 2)}
            places |= {"expand": (2, 0), "depth": (2, 3), "project": (2, 5)}
            for part, (branch, k) in places.items():
                base = f"{theirs}.branch{branch}"
                yield from _pair(f"{ours}.{part}", f"{base}.{k}", f"{base}.{k + 1}")
    yield from _pair("last", "conv5.0", "conv5.1")
    yield "classifier", "fc"


_FAMILIES: dict[type, Callable[[Any], _Names]] = {
    ResNetConfig: _resnet,
    VggConfig: _vgg,
    MobileNetConfig: _mobilenet,
    ShuffleNetConfig: _shufflenet,
}
