"""Soft prompts and prefixes in PEFT's folders, both ways.

    PROMPT_TUNING   prompt_embeddings [P, D]
    PREFIX_TUNING   prompt_embeddings [P, L * 2 * G * K]: of each layer the keys, then the values

PEFT keeps what a network makes of a prefix, not the network: so `settled` comes before. Around
encoders PEFT reads the class from the first virtual token, where ours have the class token: only
causal language models go both ways.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.adapters import (
    PrefixConfig,
    adapter_of,
    attach,
    prefix_tuning,
    soft_prompt,
)
from jaxfm.hub.files import StoredTensor
from jaxfm.model import Model, Variables
from jaxfm.virtual_tokens import PREFIX

_KEY = "prompt_embeddings"


def load(
    raw: Mapping[str, Any],
    stored: Mapping[str, StoredTensor],
    where: pathlib.Path,
    model: Model,
    variables: Variables,
) -> tuple[Model, Variables]:
    """Returns the prompted model and its variables; see `jaxfm.hub.load_adapter`.

    Args:
      raw: what adapter_config.json holds, of peft_type PROMPT_TUNING or PREFIX_TUNING.
      stored: the tensors of the folder.
      where: adapter_config.json, for messages.
      model, variables: the base.
    Raises:
      ValueError: the base is no causal language model, a number of tokens that is none, tensors
        that do not fit.
    """
    if model.stages is None:
        raise ValueError(
            f"{where} is of a prompt of PEFT; these are read for causal language models only."
        )
    count = raw.get("num_virtual_tokens")
    if type(count) is not int or count < 1:
        raise ValueError(
            f"{where} has num_virtual_tokens={count!r}; it should be a whole number above 0."
        )
    if raw.get("num_transformer_submodules") not in (None, 1):
        raise ValueError(
            f"{where} has num_transformer_submodules={raw['num_transformer_submodules']!r}; a "
            "decoder has 1."
        )
    if list(stored) != [_KEY]:
        strange = sorted(set(stored) - {_KEY}) or [f"no {_KEY}"]
        raise ValueError(f"The folder of {where} has {strange[0]}; it should have {_KEY} alone.")
    is_prefix = raw["peft_type"] == "PREFIX_TUNING"
    prompted = prefix_tuning(model, count) if is_prefix else soft_prompt(model, count)
    full = attach(prompted, variables, jax.random.key(0))
    own = full.params["layers"][PREFIX]["k"] if is_prefix else full.params["prompt"]["vectors"]
    rows = stored[_KEY].read()
    shape = (count, own.shape[0] * 2 * own.shape[2] * own.shape[3]) if is_prefix else own.shape
    if rows.shape != shape:
        raise ValueError(
            f"The tensor {_KEY} should have shape {shape} for this base; in the file it has "
            f"{rows.shape}."
        )
    if not is_prefix:
        return prompted, full._replace(params={"prompt": {"vectors": jnp.asarray(rows)}})
    layers, _, groups, size = own.shape
    each = np.moveaxis(rows.reshape(count, layers, 2, groups, size), 0, 2)
    keys, values = (jnp.asarray(np.ascontiguousarray(each[:, i])) for i in range(2))
    return prompted, full._replace(params={"layers": {PREFIX: {"k": keys, "v": values}}})


def has_form(model: Model) -> bool:
    """Returns whether PEFT has a form for a prompted model: it trains the prompt and no more."""
    root, config = adapter_of(model).root, adapter_of(model).config
    is_plain = not config.hidden if isinstance(config, PrefixConfig) else config.name == "prompt"
    return root.stages is not None and is_plain and not config.trained


def fields_and_tensors(
    model: Model, variables: Variables, base: str | os.PathLike
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns adapter_config.json and the tensors of a folder; see `jaxfm.hub.save_adapter`."""
    config = adapter_of(model).config
    root = adapter_of(model).root.config
    fields: dict[str, Any] = {
        "base_model_name_or_path": os.fspath(base) or None,
        "inference_mode": True,
        "num_virtual_tokens": config.num_tokens,
        "num_transformer_submodules": 1,
        "num_layers": root.num_layers,
        "task_type": "CAUSAL_LM",
    }
    if not isinstance(config, PrefixConfig):
        vectors = variables.params[config.name]["vectors"]
        fields |= {
            "peft_type": "PROMPT_TUNING", "token_dim": root.embed_dim,
            "num_attention_heads": root.num_heads, "prompt_tuning_init": "RANDOM",
        }  # fmt: skip
        return fields, {_KEY: np.ascontiguousarray(vectors)}
    rows = variables.params["layers"][PREFIX]
    both = np.stack([np.asarray(rows["k"]), np.asarray(rows["v"])], axis=1)  # [L, 2, P, G, K]
    fields |= {
        "peft_type": "PREFIX_TUNING", "token_dim": root.num_kv_heads * root.head_dim,
        "num_attention_heads": root.num_kv_heads, "prefix_projection": False,
        "encoder_hidden_size": root.embed_dim,
    }  # fmt: skip
    flat = np.moveaxis(both, 2, 0).reshape(both.shape[2], -1)
    return fields, {_KEY: np.ascontiguousarray(flat)}
