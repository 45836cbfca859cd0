"""Folders of adapters: adapter_config.json and adapter_model.safetensors.

What PEFT has a form for is in PEFT's (`jaxfm.hub.peft`, `jaxfm.hub.peft_prompts`). All else
(bottlenecks, trained parts, prompts before encoders and images, pools, any adapter of a model that
Hugging Face has no format for) is in one of our own, with `peft_type`
JAXFM: the options of its factory, and every trained array under its path, "params.head.kernel".
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxfm.adapters import (
    QuantizedConfig,
    adapter_of,
    attach,
    bottleneck,
    dora,
    lora,
    only,
    prefix_tuning,
    prompt_pool,
    soft_prompt,
)
from jaxfm.errors import naming
from jaxfm.hub import files as hub_files
from jaxfm.hub import folders, peft, peft_prompts, peft_write
from jaxfm.hub.files import DTYPES, StoredTensor
from jaxfm.hub.metadata import read_json
from jaxfm.hub.peft_config import KINDS
from jaxfm.model import Model, Variables

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
OWN = "JAXFM"

# By peft_type: `(adapter_config.json, its tensors, its path, model, variables)`.
Reader = Callable[..., tuple[Model, Variables]]
# By kind of config: `(model, variables, base) -> (adapter_config.json, tensors)`.
WRITERS: dict[str, Callable[..., tuple[dict[str, Any], dict[str, np.ndarray]]]] = {
    "lora": peft_write.fields_and_tensors,
    "dora": peft_write.fields_and_tensors,
    "prompt": peft_prompts.fields_and_tensors,
    "prefix": peft_prompts.fields_and_tensors,
}

# Our own form: the factory of each kind, and what its options are (see `KINDS`).
_LOW_RANK = {
    "rank": "a whole number above 0", "alpha": "a finite number", "targets": "a list of texts",
    "ranks": "an object with whole numbers above 0", "rank_stabilized": "true or false",
    "dropout": "a finite number", "trained": "a list of texts",
}  # fmt: skip
_OWN: dict[str, tuple[Callable[..., Model], dict[str, str]]] = {
    "lora": (lora, _LOW_RANK),
    "dora": (dora, _LOW_RANK),
    "bottleneck": (
        bottleneck,
        {
            "size": "a whole number above 0",
            "targets": "a list of texts",
            "trained": "a list of texts",
        },
    ),
    "parts": (only, {"trained": "a list of texts"}),
    "prompt": (
        soft_prompt,
        {
            "num_tokens": "a whole number above 0",
            "init": "a text or a list of whole numbers",
            "name": "a text",
            "trained": "a list of texts",
        },
    ),
    "prefix": (
        prefix_tuning,
        {
            "num_tokens": "a whole number above 0",
            "hidden": "a whole number",
            "trained": "a list of texts",
        },
    ),
    "pool": (
        prompt_pool,
        {
            "num_prompts": "a whole number above 0",
            "prompt_len": "a whole number above 0",
            "top": "a whole number above 0",
            "pull": "a finite number",
            "trained": "a list of texts",
        },
    ),
}


def load_adapter(
    path: str | os.PathLike, model: Model, variables: Variables
) -> tuple[Model, Variables]:
    """Puts the adapter of a folder around a model.

    The folder is one of PEFT (LoRA, DoRA, prompt and prefix tuning) or of `save_adapter`. Arrays
    keep the dtype that they have in the file; parameters of the model itself (`modules_to_save`,
    biases) get that of the model.

    Args:
      path: the folder.
      model: the base, without an adapter; its kernels may be quantized.
      variables: its.
    Returns:
      The adapted model and its variables, with those of the base in `frozen`.
    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file that cannot be read, a kind of adapter that is not supported, settings of a
        wrong type, or tensors that do not fit this base or are not finite. The message names them.
    """
    folder = pathlib.Path(path)
    for file in (CONFIG, TENSORS):
        if not (folder / file).exists():
            raise FileNotFoundError(f"{folder} has no {file}; it is no folder of an adapter.")
    if not _is_base(model):
        raise ValueError("The model has an adapter already; merge it, or detach it, first.")
    with naming(folder):
        raw = read_json(folder / CONFIG)
        kind = raw.get("peft_type")
        if not isinstance(kind, str) or kind not in READERS:
            raise ValueError(
                f"{folder / CONFIG} is of an adapter of type {kind!r}; those that can be read are "
                f"{', '.join(READERS)}."
            )
        stored = hub_files.open_file(folder / TENSORS)
        for name, tensor in stored.items():
            _check(name, tensor)
        return READERS[kind](raw, stored, folder / CONFIG, model, variables)


def save_adapter(
    model: Model, variables: Variables, path: str | os.PathLike, *, base: str | os.PathLike = ""
) -> None:
    """Writes the adapter of a model, without the model: a folder that `load_adapter` opens.

    LoRA and DoRA around a model that Hugging Face has a format for, and prompts and prefixes before
    a causal one, are written in PEFT's form, so that `peft.PeftModel.from_pretrained(base, path)`
    computes the same; others in one of our own.
    What is written of the model itself are the parameters that are trained. Arrays keep their
    dtype. A new folder appears whole; in one that exists each file is replaced whole.

    Args:
      model: with an adapter.
      variables: its arrays.
      path: the folder.
      base: name or folder of the base model, to be noted in the file.
    Raises:
      ValueError: there is no adapter, or two around each other, or PEFT has no form for what is
        trained.
    """
    adapter = adapter_of(model)
    if not _is_base(adapter.base):
        raise ValueError("The model has an adapter around another; merge the inner one first.")
    kind = getattr(adapter.config, "kind", "")
    has_form = folders.has_format(adapter.root)
    if kind in ("prompt", "prefix"):
        has_form = has_form and peft_prompts.has_form(model)
    writer = WRITERS.get(kind) if has_form else None
    fields, tensors = (writer or _own_form)(model, variables, base)
    with hub_files.new_folder(path, stale=("adapter_model.*",)) as folder:
        from safetensors.numpy import save_file

        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def _is_base(model: Model) -> bool:
    """Whether a model is without an adapter; a backbone of few bits is none."""
    return model.adapter is None or isinstance(model.adapter.config, QuantizedConfig)


def _check(name: str, tensor: StoredTensor) -> None:
    """Raises ValueError where a tensor is none of finite floats."""
    if tensor.dtype not in DTYPES.values():
        raise ValueError(
            f"The tensor {name} is stored as {tensor.dtype}; an adapter's are "
            f"{', '.join(DTYPES.values())}."
        )
    if not np.isfinite(tensor.read().astype(np.float32)).all():
        raise ValueError(f"The tensor {name} holds NaN or infinity; the adapter is unusable.")


def _read_peft(raw, stored, where, model: Model, variables: Variables) -> tuple[Model, Variables]:
    if not folders.has_format(model):
        raise ValueError(
            f"{where} is of an adapter of PEFT, which are around models that Hugging Face has a "
            "format for: decoders, encoders, vision transformers and CLIP."
        )
    return peft.load(raw, stored, where, model, variables)


def _own_form(
    model: Model, variables: Variables, base: str | os.PathLike
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """adapter_config.json and the tensors in our own form."""
    config = adapter_of(model).config
    kind = getattr(config, "kind", "")
    if kind not in _OWN:
        raise ValueError(f"An adapter of kind {kind!r} has no form in a file.")
    fields = {"peft_type": OWN, "base_model_name_or_path": os.fspath(base) or None}
    flat = flatten_dict({"params": variables.params, "stats": variables.stats}, sep=".")
    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in flat.items()}
    return fields | dataclasses.asdict(config), tensors


def _read_own(
    raw: Mapping[str, Any],
    stored: dict[str, StoredTensor],
    where: pathlib.Path,
    model: Model,
    variables: Variables,
) -> tuple[Model, Variables]:
    kind = raw.get("kind")
    if not isinstance(kind, str) or kind not in _OWN:
        raise ValueError(f"{where} has kind={kind!r}; it should be one of {', '.join(_OWN)}.")
    factory, kinds = _OWN[kind]
    for name, wanted in kinds.items():
        if not KINDS[wanted](raw.get(name)):
            raise ValueError(f"{where} has {name}={raw.get(name)!r}; it should be {wanted}.")
    adapted = factory(model, **{name: raw[name] for name in kinds})
    full = attach(adapted, variables, jax.random.key(0))
    leaves = {}
    wanted = flatten_dict({"params": full.params, "stats": full.stats}, sep=".")
    for name, leaf in wanted.items():
        if name not in stored or stored[name].shape != leaf.shape:
            shape = stored[name].shape if name in stored else "none"
            raise ValueError(
                f"The tensor {name} should have shape {leaf.shape} for this base; in the file it "
                f"has {shape}."
            )
        dtype = leaf.dtype if f".{kind}." not in name else stored[name].dtype
        leaves[name] = jnp.asarray(stored.pop(name).read(), dtype)
    if stored:
        raise ValueError(f"The file has a tensor {min(stored)}, for which this model has no place.")
    parts = {"params": {}, "stats": {}} | unflatten_dict(leaves, sep=".")
    return adapted, full._replace(**parts)


READERS: dict[str, Reader] = {
    "LORA": _read_peft,
    "PROMPT_TUNING": peft_prompts.load,
    "PREFIX_TUNING": peft_prompts.load,
    OWN: _read_own,
}
