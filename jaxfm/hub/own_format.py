"""Folders of models that Hugging Face has no format for: the networks of the federated papers.

config.json says which family and of what shape; model.safetensors holds every array by its
collection and path, "params.conv1.kernel". A subnet is stored at its own size.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxfm import config as configs
from jaxfm.data.scaling import Scale, save_scale
from jaxfm.frozen import thaw
from jaxfm.hub import files as hub_files
from jaxfm.model import Model, Variables
from jaxfm.models import (
    CnnConfig,
    CodeEncoderConfig,
    MlpConfig,
    MobileNetConfig,
    ResNetConfig,
    ShuffleNetConfig,
    VggConfig,
    build,
)

MODEL_TYPE = "jaxfm"
_FAMILIES: dict[str, type[Any]] = {
    "mlp": MlpConfig, "cnn": CnnConfig, "resnet": ResNetConfig, "vgg": VggConfig,
    "mobilenet": MobileNetConfig, "shufflenet": ShuffleNetConfig,
    "code_encoder": CodeEncoderConfig,
}  # fmt: skip
_STORED = ("params", "stats", "live")


def has_own_format(config: Any) -> bool:
    """Returns whether `save` here takes models of this config."""
    return type(config) in _FAMILIES.values()


def save(
    model: Model, variables: Variables, path: str | os.PathLike, classes: Sequence[str] = (),
    scale: Scale | None = None,
) -> None:  # fmt: skip
    """Writes a folder that `jaxfm.hub.load` opens; see `jaxfm.hub.save`."""
    if any(not np.asarray(leaf).all() for leaf in jax.tree.leaves(variables.masks)):
        raise ValueError("Some channels are masked; save the result of jaxfm.subnet.extract.")
    variables = thaw(variables)
    parts = {name: getattr(variables, name) for name in _STORED}
    tensors = {name: np.asarray(leaf) for name, leaf in flatten_dict(parts, sep=".").items()}
    dtype = next(iter(flatten_dict(parts["params"], sep=".").values())).dtype.name
    config = model.config
    fields = configs.to_dict(config) | ({"dtype": dtype} if hasattr(config, "dtype") else {})
    family = next(name for name, kind in _FAMILIES.items() if kind is type(config))
    text = {"model_type": MODEL_TYPE, "family": family, "fields": fields, "classes": list(classes)}
    shapes = {name: (x.shape, x.itemsize) for name, x in tensors.items()}
    with hub_files.new_folder(path) as folder:
        hub_files.write_safetensors(folder, shapes, tensors.__getitem__, 5 * 10**9)
        (folder / "config.json").write_text(json.dumps(text, indent=2) + "\n")
        if scale is not None:
            save_scale(scale, folder)


def load(
    folder: pathlib.Path, raw: Mapping[str, Any], dtype: str | None
) -> tuple[Model, Variables]:
    """Opens a folder of `save` whose config.json says `raw`; see `jaxfm.hub.load`."""
    where = folder / "config.json"
    if raw.get("family") not in _FAMILIES:
        raise ValueError(
            f"{where} says family={raw.get('family')!r}; it must be one of {', '.join(_FAMILIES)}."
        )
    try:
        config: Any = configs.from_dict(_FAMILIES[raw["family"]], raw.get("fields", {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} is no config of a {raw['family']}: {error}") from None
    if dtype is not None and hasattr(config, "dtype"):
        config = dataclasses.replace(config, dtype=dtype)
    model = build(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    wanted = {name: getattr(shapes, name) for name in _STORED}
    stored = hub_files.open_safetensors(folder)
    leaves = {}
    for name, leaf in flatten_dict(wanted, sep=".").items():
        if name not in stored:
            raise ValueError(f"{folder} lacks the tensor {name} of shape {leaf.shape}.")
        tensor = stored.pop(name)
        if len(tensor.shape) != len(leaf.shape) or any(
            own > most for own, most in zip(tensor.shape, leaf.shape, strict=True)
        ):
            raise ValueError(
                f"The tensor {name} has shape {tensor.shape} in the file; the config asks for "
                f"{leaf.shape}, or a part of it."
            )
        leaves[name] = jnp.asarray(tensor.read(), leaf.dtype)
    if stored:
        raise ValueError(
            f"{folder} has a tensor {min(stored)}, for which this {raw['family']} has no place."
        )
    parts = {name: {} for name in _STORED} | unflatten_dict(leaves, sep=".")
    return model, Variables(**parts)
