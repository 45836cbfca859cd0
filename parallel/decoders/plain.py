"""Plain decoding: one token of each text a pass."""

from __future__ import annotations

from jaxfm.model import Model, Variables
from jaxfm.parallel.decode import Decoder, draft_and_verify


def plain(model: Model, variables: Variables) -> Decoder:
    """The decoder that drafts nothing: all others are compared with it.

    Raises:
      ValueError: the model is not a causal language model.
    """
    return draft_and_verify(model, variables, None, 0)
