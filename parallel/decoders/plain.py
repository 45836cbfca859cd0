"""Plain decoding: one token of each text a pass."""

from __future__ import annotations

import jax.numpy as jnp

from jaxfm.model import Model, Variables
from jaxfm.parallel.decode import Decoder, Drafter, draft_and_verify
from jaxfm.parallel.verification import Draft, Text


def plain(model: Model, variables: Variables) -> Decoder:
    """The decoder that drafts nothing: the measure of all others.

    Raises:
      ValueError: the model is no causal language model.
    """
    return draft_and_verify(model, variables, _NOTHING)


def _propose(variables, state, text: Text, rules) -> tuple[Draft, None]:
    batch = text.length.shape[0]
    return Draft(jnp.zeros((batch, 0), jnp.int32), jnp.zeros((batch,), jnp.int32)), None


_NOTHING = Drafter(0, lambda variables, tokens, length, cells, chunk: None, _propose)
