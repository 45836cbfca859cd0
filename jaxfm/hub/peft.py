"""LoRA and DoRA in PEFT's folders, read.

    file:  W x + s B (A x)    A [r, in], B [out, r], one pair for each module of each layer
    here:  x W + s (x A) B    A [layers, *inputs, r], B [layers, r, *outputs]

Layers are stacked here. Where a file has ranks that differ by layer, or layers without an adapter,
A has zero columns and B zero rows up to the largest rank: the product is the same, and they stay
zero in training, since the gradient of each is a product with the other. Where scales differ, B
takes the quotient. GPT-2's c_attn is q, k and v side by side: its one A is three equal ones here.
Names follow from the rules in `jaxfm.hub.names`; `jaxfm.hub.peft_write` is the way back.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from jaxfm.adapters import attach, dora, lora
from jaxfm.adapters.adapter import fetch
from jaxfm.frozen import thaw
from jaxfm.hub import config as hub_config
from jaxfm.hub import folders
from jaxfm.hub import names as hub_names
from jaxfm.hub.files import StoredTensor
from jaxfm.hub.names import Placement
from jaxfm.hub.peft_config import LoraFields, read_lora, spelled
from jaxfm.kernels import whole
from jaxfm.model import Model, PyTree, Variables
from jaxfm.models import ClipConfig, VitConfig
from jaxfm.trees import Path

PREFIX = "base_model.model."


class Part(NamedTuple):
    """What a module of the file is here: a linear map, or one of several side by side.

    Attributes:
      site: its dotted name, "layers.attention.q".
      layer: which of the stacked ones; None outside of layers.
      inputs, outputs: sizes of its axes.
    """

    site: str
    layer: int | None
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Modules(NamedTuple):
    """A base model in the names of transformers.

    Attributes:
      tensors: where our leaves lie in each tensor.
      linear: the parts of each linear module.
    """

    tensors: dict[str, tuple[Placement, ...]]
    linear: dict[str, tuple[Part, ...]]


class Factors(NamedTuple):
    """An adapter of one linear map: A [*inputs, r], B [r, *outputs], norms [*outputs], s."""

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None
    scale: float


def load(
    raw: Mapping[str, Any],
    stored: Mapping[str, StoredTensor],
    where: pathlib.Path,
    model: Model,
    variables: Variables,
) -> tuple[Model, Variables]:
    """Returns the adapted model and its variables; see `jaxfm.hub.load_adapter`.

    Args:
      raw: what adapter_config.json holds.
      stored: the tensors of the folder.
      where: adapter_config.json, for messages.
      model, variables: the base.
    """
    fields = read_lora(raw, where)
    root = model if model.adapter is None else model.adapter.root
    _require_architecture(raw, root, where)
    leaves = leaves_of(model, variables)
    require_whole(root, leaves)
    older = hub_names.MODULES.get(family_of(root), ((None, None),))[0][0]
    modules = modules_of(root, leaves, any(older and older in name for name in stored))
    tensors = {_shortened(key): x for key, x in stored.items() if ".original_module." not in key}
    factors: dict[str, dict[int | None, Factors]] = {}
    targets = [name for name in modules.linear if fields.is_target(name)]
    if not targets:
        known = ", ".join(spelled(modules.linear, modules.linear))
        raise ValueError(
            f"{where} has target_modules={fields.target_modules!r}, which means no linear module "
            f"of this model; it has {known}."
        )
    for name in targets:
        for part, own in _read(name, modules.linear[name], tensors, fields):
            factors.setdefault(part.site, {})[part.layer] = own
    trained = _read_trained(modules, tensors, fields, targets, leaves)
    if "embed.tokens.table" in trained and is_tied(root):
        require_tied(root, fields.ensure_weight_tying)
    if tensors:
        raise ValueError(_unplaced(min(tensors)))
    adapted = _adapted(model, fields, factors, trained)
    full = attach(adapted, variables, jax.random.key(0))
    params = full.params
    for site, layers in factors.items():
        path = (*site.split("."), adapted.adapter.config.kind)
        parts = _stacked(fetch(params, path), layers, adapted.adapter.config)
        params = _with(params, path, parts)
    for name, value in trained.items():
        path, old = tuple(name.split(".")), leaves[name]
        params = _with(
            params, path, jax.device_put(value.astype(old.dtype), getattr(old, "sharding", None))
        )
    return adapted, full._replace(params=params)


def leaves_of(model: Model, variables: Variables) -> dict[str, Any]:
    """Returns the parameters of a plain or quantized model by dotted path; kernels in any form."""
    joined = thaw(variables) if model.adapter is None else model.adapter.join(variables, None)
    return flatten_dict(joined.params, sep=".")


def modules_of(model: Model, leaves: Mapping[str, Any], older: bool = False) -> Modules:
    """Returns the modules of a model in the names of transformers.

    Args:
      model: of a family that Hugging Face has.
      leaves: its parameters by dotted path, of which only shapes count.
      older: whether modules are called as in the files of models, not as in transformers 5.
    """
    renamed = () if older else hub_names.MODULES.get(family_of(model), ())
    modules = Modules({}, {})
    for name, some in folders.tensor_map(model.config, leaves).items():
        for old, new in renamed:
            name = name.replace(old, new)
        modules.tensors[name] = some
        parts = [part for p in some if (part := _part(p, model.kernels)) is not None]
        if parts:
            modules.linear[name.removesuffix(".weight")] = tuple(parts)
    return modules


def family_of(model: Model) -> str:
    """The type of a model in Hugging Face's words."""
    names: dict[type, str] = {VitConfig: "vit", ClipConfig: "clip"}
    return names.get(type(model.config)) or model.config.family


def is_tied(model: Model) -> bool:
    """Whether a model's output layer is its table of tokens."""
    head = getattr(model.config, "head", "")  # a CLIP has two, of which none is tied
    return head == "masked_lm" or (head == "causal" and model.config.tied)


def require_tied(model: Model, ensured: bool) -> None:
    """Raises ValueError where PEFT would train a table of tokens and leave the tied output."""
    if not ensured or family_of(model) not in ("llama", "mistral", "qwen2"):
        raise ValueError(
            "The adapter has a table of tokens of its own, to which the model ties its output "
            "layer; PEFT keeps the two tied only in llama, mistral and qwen2, and only with "
            "ensure_weight_tying."
        )


def require_whole(model: Model, leaves: Mapping[str, Any]) -> None:
    """Raises ValueError where leaves have not the shapes of the model's config."""
    wanted = flatten_dict(thaw(jax.eval_shape(model.init, jax.random.key(0))).params, sep=".")
    config = model.config
    scale = 1.0
    if not isinstance(config, ClipConfig):
        scale = (config.attention_scale or config.head_dim**-0.5) * config.head_dim**0.5
    cut = [name for name, leaf in leaves.items() if name not in wanted
           or leaf.shape != wanted[name].shape]  # fmt: skip
    if cut or not math.isclose(scale, 1, rel_tol=1e-6):
        raise ValueError(
            "The model is a part of a larger one, to which PEFT's names do not fit; merge the "
            "adapter, save the model, and load that."
        )


def _part(placement: Placement, kernels: Mapping[Path, int]) -> Part | None:
    """The linear map of which this is the kernel; None: it is another thing."""
    count = kernels.get(tuple(placement.path.split(".")))
    ours, groups = hub_names.axes_of(placement.layout)
    if count is None or {ours[:count], ours[count:]} != set(groups):
        return None
    shape = placement.leaf_shape
    site = placement.path.removesuffix(".kernel")
    return Part(site, placement.layer, shape[:count], shape[count:])


def _require_architecture(raw: Mapping[str, Any], model: Model, where: pathlib.Path) -> None:
    """Raises where the file names a base of another kind."""
    mapping = raw.get("auto_mapping")
    named = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    known = hub_config.ARCHITECTURES.get(named) if isinstance(named, str) else None
    if known is not None and known[0] != family_of(model):
        raise ValueError(
            f"{where} is of an adapter of a {named}; this base is a model of type "
            f"{family_of(model)!r}."
        )


def _shortened(key: str) -> str:
    """The name of a tensor without what PEFT puts around modules."""
    key = key.removeprefix(PREFIX).replace(".modules_to_save.", ".").replace(".base_layer.", ".")
    return key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def _take(tensors: dict[str, StoredTensor], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Takes a tensor out of those that are left."""
    if name not in tensors:
        raise ValueError(
            f"The file lacks the tensor {PREFIX}{name} of shape {shape}, which its config and this "
            "base ask for."
        )
    tensor = tensors.pop(name)
    if tensor.shape != shape:
        raise ValueError(
            f"The tensor {PREFIX}{name} has shape {tensor.shape} in the file; its config and this "
            f"base ask for {shape}."
        )
    return tensor.read()


def _read(
    name: str, parts: tuple[Part, ...], tensors: dict[str, StoredTensor], fields: LoraFields
) -> Iterator[tuple[Part, Factors]]:
    """Takes the adapter of one module, and yields that of each part of it."""
    rank, fan_in = fields.rank(name), math.prod(parts[0].inputs)
    sizes = [math.prod(part.outputs) for part in parts]
    a = _take(tensors, f"{name}.lora_A.weight", (rank, fan_in)).T
    b = _take(tensors, f"{name}.lora_B.weight", (sum(sizes), rank)).T
    norms = None
    if fields.use_dora:
        norms = _take(tensors, f"{name}.lora_magnitude_vector", (sum(sizes),))
    start = 0
    for part, size in zip(parts, sizes, strict=True):
        own = slice(start, start + size)
        start += size
        yield (
            part,
            Factors(
                a.reshape(*part.inputs, rank),
                b[:, own].reshape(rank, *part.outputs),
                None if norms is None else norms[own].reshape(part.outputs),
                fields.scale(name),
            ),
        )


def _read_trained(
    modules: Modules,
    tensors: dict[str, StoredTensor],
    fields: LoraFields,
    targets: list[str],
    leaves: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """Takes the model's own parameters that the file holds: our leaves by dotted path."""
    biases = {
        "none": [],
        "lora_only": [f"{name}.bias" for name in targets],
        "all": [name for name in modules.tensors if name.endswith(".bias")],
    }[fields.bias]
    wanted = {name for name in modules.tensors if fields.is_saved(name.rpartition(".")[0])}
    wanted |= {name for name in biases if name in modules.tensors}
    trained: dict[str, np.ndarray] = {}
    for name in sorted(wanted | (tensors.keys() & modules.tensors.keys())):
        some = modules.tensors[name]
        tensor = _take(tensors, name, hub_names.tensor_shape(some))
        for placement in some:
            if placement.path not in trained:
                trained[placement.path] = np.array(whole(leaves[placement.path]))
            at = ... if placement.layer is None else placement.layer
            trained[placement.path][at] = hub_names.from_file(placement, some, tensor)
    _drop_copies(modules, tensors, {**leaves, **trained})
    return trained


def _drop_copies(
    modules: Modules, tensors: dict[str, StoredTensor], leaves: Mapping[str, Any]
) -> None:
    """Takes copies of tied tensors, which must equal the original."""
    for name in tensors.keys() & hub_names.COPIES.keys():
        homes = [own for own in modules.tensors
                 if own.endswith(hub_names.COPIES[name])]  # fmt: skip
        if not homes:
            continue
        original = folders.in_file(
            modules.tensors[homes[0]],
            {p.path: np.asarray(leaves[p.path]) for p in modules.tensors[homes[0]]},
        )
        if not np.array_equal(_take(tensors, name, original.shape), original):
            raise ValueError(
                f"The file has numbers of its own for {PREFIX}{name}, which this model ties to "
                f"{homes[0]}."
            )


def _unplaced(name: str) -> str:
    """Says why a tensor of the file cannot be placed."""
    if "lora_embedding" in name:
        return f"The file has {PREFIX}{name}: adapters of tables are not supported here."
    what = "linear module that is a target" if ".lora_" in name else "parameter"
    return (
        f"The file has a tensor {PREFIX}{name}, but this model has no such {what}; it may be an "
        "adapter of another base."
    )


def _adapted(
    model: Model,
    fields: LoraFields,
    factors: Mapping[str, Mapping[int | None, Factors]],
    trained: Mapping[str, Any],
) -> Model:
    """The model with an adapter of the largest rank of each site."""
    ranks = {site: max(f.a.shape[-1] for f in own.values()) for site, own in factors.items()}
    return (dora if fields.use_dora else lora)(
        model,
        fields.r,
        targets=tuple(factors),
        alpha=fields.lora_alpha,
        dropout=fields.lora_dropout,
        rank_stabilized=fields.use_rslora,
        ranks={site: rank for site, rank in ranks.items() if rank != fields.r},
        trained=tuple(trained),
    )


def _stacked(
    fresh: Mapping[str, jax.Array], own: Mapping[int | None, Factors], config: Any
) -> dict[str, jax.Array]:
    """The parameters of one site: what the file has of each layer, and zeros.

    They have the dtype of the file, but float32 where B takes a quotient of scales.
    """
    scale = config.scale(fresh["a"].shape[-1])
    ratios = {layer: f.scale / scale for layer, f in own.items()}
    is_one = lambda ratio: math.isclose(ratio, 1, rel_tol=1e-9)
    kinds = {x.dtype for f in own.values() for x in (f.a, f.b)}
    is_kept = len(kinds) == 1 and all(map(is_one, ratios.values()))
    dtype = kinds.pop() if is_kept else np.dtype(np.float32)
    out = {name: np.zeros(fresh[name].shape, dtype) for name in ("a", "b")}
    if "magnitude" in fresh:
        out["magnitude"] = np.array(fresh["magnitude"], dtype)
    for layer, f in own.items():
        at, rank = ... if layer is None else layer, f.a.shape[-1]
        b = f.b if is_one(ratios[layer]) else f.b.astype(np.float32) * np.float32(ratios[layer])
        out["a"][at][..., :rank] = f.a
        out["b"][at][:rank] = b
        if f.magnitude is not None:
            out["magnitude"][at] = f.magnitude
    return jax.tree.map(jnp.asarray, out)


def _with(tree: PyTree, path: Path, value: Any) -> PyTree:
    """Nested dicts with another value at a path."""
    if not path:
        return value
    return {**tree, path[0]: _with(tree[path[0]], path[1:], value)}
