"""Speculative decoding: a drafter proposes some tokens, the model checks all in one pass.

Greedy output is what the model alone gives; sampled output has its distribution
(`jaxfm.parallel.verification.verify`). Source: Leviathan et al. 2023; Chen et al. 2023.
"""

from __future__ import annotations

from jaxfm.model import Model, Variables
from jaxfm.parallel.decode import Decoder, draft_and_verify
from jaxfm.parallel.drafting import Drafter


def speculative(
    model: Model, variables: Variables, drafter: Drafter, *, length: int = 4
) -> Decoder:
    """The decoder that checks a drafter's proposals in one pass of the model a tick.

    Args:
      model, variables: the target.
      drafter: of `jaxfm.parallel.drafters`, most often `model_drafter`.
      length: tokens drafted a pass of the target.
    Raises:
      ValueError: a length below 1, a drafter with another number of tokens, or one that continues
        trees only.
    """
    if length < 1:
        raise ValueError(f"length={length} tokens cannot be drafted; give 1 or more.")
    return draft_and_verify(model, variables, drafter, length)
