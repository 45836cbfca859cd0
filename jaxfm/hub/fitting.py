"""Models of folders for the data at hand: with a head of the right kind and size.

    fitted = load_for(data, "path/to/bert")
    model, variables = fitted.model, fitted.variables

What a head lacks is drawn at random; everything else keeps the folder's numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from jaxfm.data.augment import image_transform
from jaxfm.data.dealing import Data
from jaxfm.data.loading import kind_of
from jaxfm.hub import config as hub_config
from jaxfm.hub import files as hub_files
from jaxfm.hub import metadata as hub_metadata
from jaxfm.hub import names as hub_names
from jaxfm.hub import own_format
from jaxfm.hub.files import StoredTensor
from jaxfm.hub.folders import fill, read_config, short_name, tensor_map
from jaxfm.model import Key, Model, Variables, is_axes
from jaxfm.models import ClipConfig, DecoderConfig, EncoderConfig, MlpConfig, VitConfig, build
from jaxfm.tokenizer import padding_id

Stored = Mapping[str, StoredTensor]

_KINDS: dict[str, tuple[str, tuple[type, ...], str]] = {  # head, configs, and what it is called
    "language": ("causal", (DecoderConfig,), "text to be continued"),
    "masked": ("masked_lm", (EncoderConfig,), "text with hidden tokens"),
    "text": ("classify", (EncoderConfig, DecoderConfig), "labelled text"),
    "tags": ("tag", (EncoderConfig,), "tagged words"),
    "images": ("classify", (VitConfig,), "images"),
    "captions": ("contrastive", (ClipConfig,), "captioned images"),
    "features": ("", (), "columns of numbers"),
}
# Tensors of a folder's own head, which are passed over where another one is wanted.
_OTHER_HEADS = {
    "causal": re.compile(r"^(score|classifier|qa_outputs)\b"),
    "classify": re.compile(r"^(lm_head|score|cls|classifier|pooler|qa_outputs)\b"),
}
_OTHER_HEADS["tag"] = _OTHER_HEADS["classify"]
_OTHER_HEADS["masked_lm"] = re.compile(r"^(score|classifier|pooler|qa_outputs)\b")
_DRAWN = ("head.score", "head.classifier", "head.pooler")


class Fitted(NamedTuple):
    """A folder's model for the data at hand.

    Attributes:
      model, variables: as of `jaxfm.hub.load`.
      drawn: names of the parts of the head that were drawn; none where the folder has them all.
      notes: sentences that a user should read: what was drawn, and which classes stand for which.
    """

    model: Model
    variables: Variables
    drawn: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def load_for(
    data: Data, path_or_name: str | os.PathLike, *, dtype: str | None = None, remat: bool = False,
    seed: int = 0,
) -> Fitted:  # fmt: skip
    """Loads a folder's model with the head that the data need.

    Labelled text is classified by encoders, from the first token, and by decoders, from the last;
    words are tagged by encoders; decoders continue text, encoders recover hidden tokens; images go
    to vision transformers and to our own networks. A classifier of the right size is kept, in the
    order of the data's classes where both name the same ones. One of another size is replaced by a
    new one. A vision transformer's images, in 0..1, are normalised as its preprocessor_config.json
    says.

    Args:
      data: whose classes, tokenizer and shapes the model must fit.
      path_or_name, dtype: as in `jaxfm.hub.load`.
      remat: recompute layers in the backward pass (of transformers).
      seed: of what is drawn.
    Raises:
      FileNotFoundError, ValueError: as of `jaxfm.hub.load`; a model that does not fit the data.
    """
    folder = hub_files.find_folder(path_or_name)
    raw = hub_metadata.read_json(folder / "config.json")
    key, kind = jax.random.key(seed), str(kind_of(data.validation))
    kind = "masked" if kind == "language" and data.task.draws else kind
    head, types, called = _KINDS[kind]
    if raw.get("model_type") == own_format.MODEL_TYPE:
        return _own(data, folder, raw, dtype, key)
    misfit = f"{folder} holds a {raw.get('model_type')}, which does not fit {called}."
    pairs = hub_config.ARCHITECTURES.values()
    known = raw.get("model_type") in {family for family, _ in pairs}
    if not head or (known and (raw["model_type"], head) not in pairs):
        raise ValueError(misfit)
    config = dataclasses.replace(read_config(folder, head), remat=remat)
    if not isinstance(config, types):
        raise ValueError(misfit)
    _check_inputs(config, data, folder)
    stored: Stored = hub_files.open_safetensors(folder)
    if isinstance(config, ClipConfig):
        return Fitted(*fill(config, stored, dtype, None))
    if head in ("causal", "masked_lm"):
        return Fitted(*fill(config, _passed_over(config, stored), dtype, None))
    named = hub_metadata.class_names(config.metadata)
    changes: dict[str, Any] = {"num_classes": len(data.classes)}
    changes["metadata"] = hub_metadata.named(config.metadata, data.classes)
    if isinstance(config, DecoderConfig) and data.tokenizer is not None:
        changes["pad_id"] = padding_id(data.tokenizer)
    config = dataclasses.replace(config, **changes)
    stored, drawn = _with_head(config, _passed_over(config, stored), key)
    notes = [f"{folder}: {', '.join(drawn)} drawn anew, for {len(data.classes)} classes."]
    if not drawn:
        order, notes = _order(named, data.classes, folder)
        stored = {name: _reordered(name, tensor, order) for name, tensor in stored.items()}
    model, variables = fill(config, stored, dtype, None)
    return Fitted(_normalised(model), variables, drawn, tuple(notes))


def _normalised(model: Model) -> Model:
    """Returns the model that takes images in 0..1, if its folder says how they are normalised."""
    scale = hub_metadata.pixel_scale(model.config.metadata)
    if not isinstance(model.config, VitConfig) or scale is None:
        return model
    transform = image_transform(mean=scale[0], std=scale[1])
    return model._replace(
        apply=lambda variables, images, **kwargs: model.apply(
            variables, transform(images, None), **kwargs
        )
    )


def pretrained(model: Model, variables: Variables) -> Model:
    """Returns the model whose `init` gives these variables, whatever the key."""
    host = jax.tree.map(np.asarray, variables)
    return model._replace(init=lambda key: jax.tree.map(jnp.array, host))


def reads_text(path_or_name: str | os.PathLike) -> bool:
    """Returns whether a folder, or a name on the hub, holds a model of tokens."""
    folder = hub_files.find_folder(path_or_name)
    kind = hub_metadata.read_json(folder / "config.json").get("model_type")
    return kind not in (own_format.MODEL_TYPE, "vit")


def _check_inputs(config: hub_config.Config, data: Data, folder: pathlib.Path) -> None:
    """Raises where tokens or images of the data do not go into a model."""
    if isinstance(config, VitConfig | ClipConfig):
        wanted = (*config.image_size, config.num_channels)
        if (shape := data.validation["image"].shape[1:]) != wanted:
            raise ValueError(
                f"{folder} takes images of {_times(wanted)} (height, width, channels), and these "
                f"are {_times(shape)}; image files are scaled by --data.image_size."
            )
    if isinstance(config, VitConfig):
        return
    assert data.tokenizer is not None
    if data.tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{folder} knows {config.vocab_size} tokens, and the text has "
            f"{data.tokenizer.vocab_size}; read it with the folder's own tokenizer."
        )
    length = data.validation["tokens"].shape[1] - (kind_of(data.validation) == "language")
    most = config.max_len
    if isinstance(config, EncoderConfig) and config.family == "roberta":
        most -= config.pad_id + 1  # type: ignore[operator]
    if length > most:
        raise ValueError(
            f"{folder} takes at most {most} tokens, and rows have {length}; give a smaller "
            "--data.length."
        )


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _passed_over(config: hub_config.Config, stored: Stored) -> Stored:
    """Returns the tensors without those of heads that this config does not have."""
    shapes = jax.eval_shape(build(config).init, jax.random.key(0)).params
    wanted = {short_name(name) for name in tensor_map(config, flatten_dict(shapes, sep="."))}
    assert not isinstance(config, ClipConfig)  # it has one form, and no head
    other = _OTHER_HEADS[config.head]
    keeps = lambda short: short in wanted or not other.match(short)
    return {name: tensor for name, tensor in stored.items() if keeps(short_name(name))}


def _with_head(
    config: hub_config.Config, stored: Stored, key: Key
) -> tuple[Stored, tuple[str, ...]]:
    """Returns the tensors with those drawn that a head lacks, and the names of these parts."""
    model = build(config)
    shapes = flatten_dict(jax.eval_shape(model.init, key).params, sep=".")
    tensors = tensor_map(config, shapes)
    known = {short_name(name): (name, tensor.shape) for name, tensor in stored.items()}
    part_of = lambda some: some[0].path.rpartition(".")[0]
    drawn = {
        part_of(some)
        for name, some in tensors.items()
        if part_of(some) in _DRAWN
        and known.get(short_name(name), ("", None))[1] != hub_names.tensor_shape(some)
    }
    if not drawn:
        return stored, ()
    head = flatten_dict({"head": jax.jit(lambda key: model.init(key).params["head"])(key)}, sep=".")
    result = dict(stored)
    for name, some in tensors.items():
        if part_of(some) not in drawn:
            continue
        result.pop(known.get(short_name(name), ("",))[0], None)
        value = hub_names.to_file(some[0], np.asarray(head[some[0].path]))
        result[name] = StoredTensor(value.shape, value.dtype.name, functools.partial(_same, value))
    return result, tuple(sorted(part.removeprefix("head.") for part in drawn))


def _same(value: np.ndarray) -> np.ndarray:
    return value


def _order(
    named: Sequence[str], classes: Sequence[str], folder: pathlib.Path
) -> tuple[list[int] | None, list[str]]:
    """Returns which of the folder's logits stands for each class, None for the same order."""
    if not named or tuple(named) == tuple(classes):
        return None, []
    if sorted(named) == sorted(classes):
        return [list(named).index(name) for name in classes], []
    pairs = ", ".join(f"{new!r} ({old!r})" for new, old in zip(classes, named))
    return None, [f"{folder} keeps its classifier, whose classes had other names: {pairs}."]


def _reordered(name: str, tensor: StoredTensor, order: list[int] | None) -> StoredTensor:
    """Returns a tensor of a classifier with its rows in another order."""
    last = re.search(r"^(score|classifier|classifier\.out_proj)\.(weight|bias)$", name)
    if order is None or not last:
        return tensor
    return tensor._replace(read=lambda: tensor.read()[np.asarray(order)])


def _own(
    data: Data, folder: pathlib.Path, raw: Mapping[str, Any], dtype: str | None, key: Key
) -> Fitted:
    """Returns a network of ours with a head for the data."""
    model, variables = own_format.load(folder, raw, dtype)
    _check_own(model.config, data, f"{folder}", raw["family"])
    named, count = tuple(raw.get("classes", ())), len(data.classes)
    along = functools.partial(jax.tree.map, is_leaf=is_axes)
    if model.config.num_classes == count:
        order, notes = _order(named, data.classes, folder)
        take = lambda names, x: (
            jnp.take(x, np.asarray(order), names.index("class")) if "class" in names else x
        )
        moved = variables if order is None else along(take, model.axes, variables)
        return Fitted(model, moved, (), tuple(notes))
    is_mlp = isinstance(model.config, MlpConfig)
    sizes = {"sizes": (*model.config.sizes[:-1], count)} if is_mlp else {"num_classes": count}
    model = build(dataclasses.replace(model.config, **sizes))

    def pick(names, new, old):
        """Draws what has an axis of classes; at the size of a slice, where the folder holds one."""
        axes = zip(names, old.shape, strict=True)
        return (
            new[tuple(slice(None if name == "class" else size) for name, size in axes)]
            if "class" in names
            else old
        )

    variables = along(pick, model.axes, model.init(key), variables)
    note = f"{folder}: classifier drawn anew, for {count} classes."
    return Fitted(model, variables, ("classifier",), (note,))


def _check_own(config: Any, data: Data, folder: str, family: str) -> None:
    """Raises where the data do not go into a network of ours."""
    kind, is_mlp = kind_of(data.validation), isinstance(config, MlpConfig)
    called = _KINDS[kind][2]
    if kind != "images" and not (kind == "features" and is_mlp):
        raise ValueError(f"{folder} holds a {family}, which does not fit {called}.")
    shape = data.validation["image" if kind == "images" else "features"].shape[1:]
    size = math.prod(shape) if is_mlp else shape[-1]
    wanted = config.sizes[0] if is_mlp else config.num_channels
    if size != wanted or (hasattr(config, "image_size") and shape[:2] != _square(config)):
        raise ValueError(
            f"{folder} takes {_takes(config)}, and these {called} are {_times(shape)}."
        )


def _square(config: Any) -> tuple[int, ...]:
    size = config.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def _takes(config: Any) -> str:
    if isinstance(config, MlpConfig):
        return f"{config.sizes[0]} numbers"
    if hasattr(config, "image_size"):
        return f"images of {_times((*_square(config), config.num_channels))}"
    return f"images of {config.num_channels} channels"
