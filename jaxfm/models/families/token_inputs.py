"""What models of padded texts are given: tokens, a mask and segments, by either of two names."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from jaxfm.model import Array

_INPUTS = {"input_ids": "tokens", "attention_mask": "mask", "token_type_ids": "types"}


def read_inputs(inputs: Mapping[str, Array]) -> tuple[Array, Array, Array]:
    """Returns tokens, mask bool[B, T] and types of a dict of inputs."""
    given = sorted(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
    named = {_INPUTS.get(name, name): inputs[name] for name in given if isinstance(given, list)}
    if "tokens" not in named or set(named) - set(_INPUTS.values()) or len(named) < len(given):
        raise ValueError(
            "This model takes a dict of 'tokens' i32[B, T] and, optionally, 'mask' and 'types' (or "
            f"'input_ids', 'attention_mask' and 'token_type_ids'); got {given}."
        )
    shapes = {name: getattr(x, "shape", type(x).__name__) for name, x in named.items()}
    if len(set(shapes.values())) > 1 or len(shapes["tokens"]) != 2:
        raise ValueError(f"Inputs of this model are arrays of one shape [B, T]; got {shapes}.")
    tokens = jnp.asarray(named["tokens"])
    mask = jnp.asarray(named.get("mask", jnp.ones(tokens.shape, bool))).astype(bool)
    return tokens, mask, jnp.asarray(named.get("types", jnp.zeros_like(tokens)))
