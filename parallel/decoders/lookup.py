"""Lookup decoding: speculative decoding whose drafts are copied from the text itself."""

from __future__ import annotations

from jaxfm.model import Model, Variables
from jaxfm.parallel.decode import Decoder
from jaxfm.parallel.decoders.speculative import speculative
from jaxfm.parallel.drafters.forced import forced_drafter
from jaxfm.parallel.drafters.lookup import lookup_drafter


def lookup(
    model: Model, variables: Variables, *, length: int = 8, max_ngram: int = 4, min_ngram: int = 1
) -> Decoder:
    """The decoder that drafts from the text itself, and what its grammar forces, if it has one.

    Args:
      model, variables: the model that verifies.
      length: tokens drafted a pass.
      max_ngram: longest ending of the text that is looked for.
      min_ngram: shortest ending of the text that is looked for.
    Raises:
      ValueError: a length below 1, or not 1 <= min_ngram <= max_ngram.
    """
    return speculative(
        model, variables, forced_drafter(lookup_drafter(max_ngram, min_ngram)), length=length
    )
