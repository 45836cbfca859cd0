"""Pretrained models: Hugging Face folders and hub names in and out, and llama2.c files in.

>>> import jax, tempfile
>>> from jaxfm.testing import tiny_decoder
>>> model = tiny_decoder()
>>> with tempfile.TemporaryDirectory() as folder:
...     save(model, model.init(jax.random.key(0)), f"{folder}/model")
...     loaded, variables = load(f"{folder}/model")
>>> loaded.config == model.config
True

The names and layouts of tensors are in `jaxfm.hub.names`, the words of configs in
`jaxfm.hub.config`. Each leaf is allocated once, in its stacked form and its final dtype, filled
layer by layer from the files and put on its devices before the next one is read.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxfm.data.scaling import Scale
from jaxfm.errors import naming
from jaxfm.frozen import thaw
from jaxfm.hub import clip as hub_clip
from jaxfm.hub import config as hub_config
from jaxfm.hub import files as hub_files
from jaxfm.hub import metadata as hub_metadata
from jaxfm.hub import names as hub_names
from jaxfm.hub import own_format
from jaxfm.hub.files import DTYPES, StoredTensor
from jaxfm.hub.names import Placement
from jaxfm.model import Model, Variables, is_stacked, layers_of, with_layers
from jaxfm.models import ClipConfig, DecoderConfig, EncoderConfig, VitConfig, build
from jaxfm.models.families.decoder import resized
from jaxfm.subnet import axis_sizes
from jaxfm.tokenizer import save_tokenizer

TensorMap = dict[str, tuple[Placement, ...]]


def load(
    path_or_name: str | os.PathLike,
    *,
    dtype: str | None = None,
    shardings: jax.sharding.Sharding | Callable[[Model], Variables] | None = None,
) -> tuple[Model, Variables]:
    """Loads a model's folder: config.json and *.safetensors, in one file or several.

    It may have Hugging Face's format, or the one that `save` has for our other networks.

    Args:
      path_or_name: a folder, or a name on the Hugging Face hub (downloaded once, then cached).
      dtype: "float32", "bfloat16" or "float16"; None means the one that most numbers are stored in.
      shardings: where leaves go: one sharding for all, or a function from the Model to a tree of
        shardings like the Variables. None means the default device.
    Returns:
      The model and its variables. What the folder says beside the function (special tokens, names
      of labels, generation_config.json) is in `model.config.metadata`, and `save` writes it again.
    Raises:
      FileNotFoundError: no such folder, no such files in it, or a name that cannot be fetched.
      ValueError: a file that cannot be read, an architecture or feature that is not supported; a
        missing, unknown, misshapen or unequally tied tensor. The message has the name.
    """
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES.values())}, got {dtype!r}.")
    folder = hub_files.find_folder(path_or_name)
    with naming(folder):
        raw = hub_metadata.read_json(folder / "config.json")
        if raw.get("model_type") == own_format.MODEL_TYPE:
            model, variables = own_format.load(folder, raw, dtype)
            where = shardings(model) if callable(shardings) else shardings
            return model, variables if where is None else jax.device_put(variables, where)
        config = read_config(folder)
        stored = hub_files.open_safetensors(folder)
        has_pooler = any(name.endswith("pooler.dense.weight") for name in stored)
        if isinstance(config, EncoderConfig | VitConfig) and config.head == "pooler":
            config = config if has_pooler else dataclasses.replace(config, head="none")
        return fill(config, stored, dtype, shardings)


def has_format(model: Model) -> bool:
    """Returns whether Hugging Face has a format: of decoders, encoders, ViTs and CLIPs."""
    return isinstance(model.config, DecoderConfig | EncoderConfig | VitConfig | ClipConfig)


def save(
    model: Model,
    variables: Variables,
    path: str | os.PathLike,
    tokenizer: Any = None,
    *,
    max_shard_bytes: int = 5 * 10**9,
    classes: Sequence[str] = (),
    scale: Scale | None = None,
) -> None:
    """Writes a folder that `load` opens, and `transformers` where it knows the model.

    Decoders, encoders and vision transformers are written in Hugging Face's format, our other
    networks (mlp, cnn, resnet, vgg, mobilenet, shufflenet) in one of our own. A subnet that
    `jaxfm.subnet.extract` cut from `model` is saved at its own size. A new folder appears whole; in
    one that exists each file is replaced whole.

    Args:
      model: of one of our families (`jaxfm.models`).
      variables: its arrays, or those of a subnet of it.
      path: the folder.
      tokenizer: written beside the model, by `jaxfm.tokenizer.save_tokenizer`.
      max_shard_bytes: tensors are spread over files of at most this size.
      classes: names of the classes, in the order of a classifier's logits.
      scale: of the columns of numbers that one of our networks was trained on.
    Raises:
      TypeError: the model is of none of our families.
      ValueError: the format cannot express this model: an adapter, masked channels, layers of
        unequal width, or a switch that its family lacks.
    """
    if model.adapter is not None:
        raise ValueError(
            "This model has an adapter: save what `jaxfm.adapters.merge` makes of it, or the "
            "adapter alone by `jaxfm.hub.save_adapter`."
        )
    if own_format.has_own_format(model.config):
        own_format.save(model, variables, path, classes, scale)
        return
    config, params = _to_save(model, variables)
    has_classes = bool(classes) and not isinstance(config, ClipConfig)
    metadata = hub_metadata.named(config.metadata, classes) if has_classes else config.metadata
    fields = hub_config.to_hf(config)
    leaves = {name: np.asarray(leaf) for name, leaf in flatten_dict(params, sep=".").items()}
    # The file's reader scales scores by head_dim**-0.5; what differs from it goes into q.
    scaled = ("layers.attention.q.kernel", "layers.attention.q.bias")
    for name in () if isinstance(config, ClipConfig) else scaled:
        of_scores = (config.attention_scale or config.head_dim**-0.5) * config.head_dim**0.5
        if name in leaves and not np.isclose(of_scores, 1.0, rtol=1e-6):
            own = leaves[name].astype(np.float32) * np.float32(of_scores)
            leaves[name] = own.astype(leaves[name].dtype)
    tensors = tensor_map(config, leaves)

    tensor = lambda name: in_file(tensors[name], leaves)
    shapes = {
        name: (hub_names.tensor_shape(some), leaves[some[0].path].itemsize)
        for name, some in tensors.items()
    }
    with hub_files.new_folder(path) as new:
        hub_files.write_safetensors(new, shapes, tensor, max_shard_bytes)
        if tokenizer is not None:
            save_tokenizer(tokenizer, new)
        hub_metadata.write(new, fields, metadata, tokenizer)


def in_file(some: tuple[Placement, ...], leaves: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the tensor of a file that these placements of our leaves, by dotted path, make up."""
    rows = [leaves[p.path] if p.layer is None else leaves[p.path][p.layer] for p in some]
    own = [hub_names.to_file(p, row) for p, row in zip(some, rows, strict=True)]
    return np.concatenate(own, axis=-1) if len(own) > 1 else own[0]


def load_llama2c(path: str | os.PathLike) -> tuple[Model, Variables]:
    """Loads a float32 checkpoint of llama2.c (its version 0: seven int32, then the weights).

    Raises:
      FileNotFoundError: no such file.
      ValueError: its length does not follow from its header.
    """
    header, stored = hub_files.open_llama2c(pathlib.Path(path))
    dim, hidden, depth, heads, kv_heads, vocab, max_len = header
    config = DecoderConfig(
        vocab_size=abs(vocab), embed_dim=dim, num_layers=depth, num_heads=heads,
        num_kv_heads=kv_heads, mlp_dim=hidden, max_len=max_len, norm_eps=1e-5, tied=vocab > 0,
    )  # fmt: skip
    return fill(config, stored, None, None)


def read_config(folder: pathlib.Path, head: str | None = None) -> hub_config.Config:
    """Returns our config; fields that config.json omits have the defaults of transformers.

    Args:
      folder: with a config.json.
      head: that the model is to have; None: the one that the file names.
    Raises:
      ValueError: an architecture that is not one of ours, or has no such head.
    """
    raw = hub_metadata.read_json(folder / "config.json")
    kind = raw.get("model_type", "unknown")
    if head is None:
        first = {kind: name for name, (kind, _) in reversed(hub_config.ARCHITECTURES.items())}
        architectures = raw.get("architectures") or [first.get(kind, kind)]
        if not isinstance(architectures, list):
            raise ValueError(f"architectures={architectures!r} should be a list of one name.")
        architecture = architectures[0]
        hub_config.require_known(architecture)
    else:
        architecture = hub_config.architecture_of(kind, head)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # of many kinds, by the version of transformers
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(
            f"{folder / 'config.json'} is no config of a {kind}: {reason.rstrip('.')}."
        ) from error
    fields = {**raw, **config.to_dict(), "num_labels": config.num_labels}
    try:
        own = hub_config.from_hf(fields, architecture)
    except (TypeError, KeyError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{folder / 'config.json'} is no config of a {kind} ({reason})."
        ) from error
    return dataclasses.replace(own, metadata=hub_metadata.read(folder, raw))


def fill(
    config: hub_config.Config, stored: Mapping[str, StoredTensor], dtype: str | None, shardings: Any
) -> tuple[Model, Variables]:
    """Returns the model of `config` in the dtype of a file, and its Variables filled from it."""
    amounts: collections.Counter[str] = collections.Counter()
    for name, tensor in stored.items():
        if not hub_names.is_buffer(short_name(name)):
            _require_float(name, tensor)
            amounts[tensor.dtype] += math.prod(tensor.shape)
    if not amounts:
        raise ValueError("The file has no tensor; it is no model's.")
    model = build(dataclasses.replace(config, dtype=dtype or amounts.most_common(1)[0][0]))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    leaves = flatten_dict(shapes.params, sep=".")
    tensors = tensor_map(model.config, leaves)
    stored = _matched(tensors, stored, model.config)
    where = shardings(model) if callable(shardings) else None
    place = lambda part, path: shardings if where is None else flatten_dict(part, sep=".")[path]
    homes: dict[str, list[tuple[str, Placement]]] = {}
    for name, some in tensors.items():
        for placement in some:
            homes.setdefault(placement.path, []).append((name, placement))
    params, live = {}, {}
    for path, leaf in leaves.items():
        value = np.empty(leaf.shape, leaf.dtype)
        for name, placement in homes[path]:
            own = hub_names.from_file(placement, tensors[name], stored[name].read())
            value[... if placement.layer is None else placement.layer] = own
        params[path] = jax.device_put(value, place(where and where.params, path))
    for path, leaf in flatten_dict(shapes.live, sep=".").items():
        ones = np.ones(leaf.shape, leaf.dtype)
        live[path] = jax.device_put(ones, place(where and where.live, path))
    return model, Variables(unflatten_dict(params, sep="."), {}, unflatten_dict(live, sep="."))


def tensor_map(config: hub_config.Config, leaves: Mapping[str, Any]) -> TensorMap:
    """Returns the tensors of this model's file."""
    if isinstance(config, ClipConfig):
        return hub_clip.tensor_map({name: leaf.shape for name, leaf in leaves.items()})
    rows = hub_names.GPT2 if getattr(config, "family", "") == "gpt2" else hub_names.LLAMA
    if isinstance(config, EncoderConfig):
        rows = {"bert": hub_names.BERT, "roberta": hub_names.ROBERTA}[config.family][config.head]
    if isinstance(config, VitConfig):
        rows = hub_names.VIT
    tensors = hub_names.placements(rows, {name: leaf.shape for name, leaf in leaves.items()})
    if not isinstance(config, DecoderConfig) and config.head in ("none", "pooler"):
        return {
            short_name(name): some for name, some in tensors.items()
        }  # a bare model has no prefix
    return tensors


def short_name(name: str) -> str:
    """Returns a tensor's name without its optional prefix and with current norm names."""
    name = re.sub(r"^(model|transformer|bert|roberta|vit)\.", "", name)
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
    return name.replace("LayerNorm.beta", "LayerNorm.bias")


def _matched(
    tensors: TensorMap, stored: Mapping[str, StoredTensor], config: hub_config.Config
) -> dict[str, StoredTensor]:
    """Returns `stored` by the names in `tensors`; raises where the two do not fit."""
    found = {short_name(name): (name, tensor) for name, tensor in stored.items()}
    matched = {}
    for name, some in tensors.items():
        shape = hub_names.tensor_shape(some)
        ours = f"{some[0].path} {some[0].leaf_shape}"
        if short_name(name) not in found:
            raise ValueError(f"The file lacks the tensor {name} of shape {shape}, for {ours}.")
        theirs, tensor = found.pop(short_name(name))
        if tensor.shape != shape:
            raise ValueError(
                f"The tensor {theirs} has shape {tensor.shape} in the file; the config asks for "
                f"{shape}, for {ours}."
            )
        matched[name] = tensor
    unused = []
    for short, (name, tensor) in found.items():
        if hub_names.is_buffer(short):
            continue
        origins = hub_names.COPIES.get(short, ())
        home = next((own for own in matched if short_name(own) in origins), None)
        if home is not None:
            _require_copy(name, tensor, home, matched[home])
        elif hub_names.is_unused(short):
            unused.append(name)
        else:
            raise ValueError(
                f"The file has a tensor {name} of shape {tensor.shape}, for which this "
                f"{type(config).__name__} has no place."
            )
    if unused:
        warnings.warn(
            f"These tensors of the file are passed over, for this {type(config).__name__} has no "
            f"use for them: {', '.join(unused)}.",
            stacklevel=4,
        )
    return matched


def _require_float(name: str, tensor: StoredTensor) -> None:
    """Raises where a tensor is of a dtype that no model here has."""
    if tensor.dtype not in DTYPES.values():
        raise ValueError(
            f"The tensor {name} is stored as {tensor.dtype}; quantised weights are not "
            f"supported, only {', '.join(DTYPES.values())}."
        )


def _require_copy(name: str, tensor: StoredTensor, home: str, original: StoredTensor) -> None:
    """Raises where a tensor is no copy of the one that the config ties it to."""
    if tensor.shape == original.shape and np.array_equal(tensor.read(), original.read()):
        return
    raise ValueError(
        f"The config ties {name} to {home}, but the file holds other numbers for the two. For a "
        "decoder set tie_word_embeddings to false in config.json to use both; otherwise remove the "
        "one that is not meant."
    )


def _to_save(model: Model, variables: Variables) -> tuple[Any, Any]:
    """Returns the config and the parameters, layers stacked, of a model or of a subnet of it."""
    if not has_format(model):
        raise TypeError(
            f"A model of {type(model.config).__name__} has no format of a folder; only those of "
            "jaxfm.models have one."
        )
    structure = (variables.live, variables.masks)
    if any(not np.asarray(leaf).all() for leaf in jax.tree.leaves(structure)):
        raise ValueError("Some channels are masked; save the result of jaxfm.subnet.extract.")
    variables = thaw(variables)
    layers = layers_of(variables)
    if not is_stacked(layers):
        if len({str(jax.tree.map(jnp.shape, row)) for row in layers.params.values()}) > 1:
            raise ValueError(
                "The layers have unequal widths; a Hugging Face file holds equal layers only."
            )
        stack = lambda part: jax.tree.map(lambda *rows: jnp.stack(rows), *part.values())
        stacked = Variables(*(stack(part) if part else {} for part in layers))
        variables = with_layers(variables, stacked)
    given = flatten_dict(variables.params, sep=".")
    sized = model.config  # a CLIP is saved whole
    if not isinstance(sized, ClipConfig):
        sized = resized(sized, axis_sizes(variables.params, thaw(model.axes).params))
    config = dataclasses.replace(sized, dtype=next(iter(given.values())).dtype.name)
    expected = jax.eval_shape(build(config).init, jax.random.key(0)).params
    for name, leaf in flatten_dict(expected, sep=".").items():
        if name not in given or given[name].shape != leaf.shape:
            shape = given[name].shape if name in given else None
            raise ValueError(
                f"The parameter {name} has shape {shape}; a {type(config).__name__} of these "
                f"widths has {leaf.shape}."
            )
    return config, variables.params
