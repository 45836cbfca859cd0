"""How much an update counts that was made from a model of some server steps ago.

Source: Xie et al. 2019 (FedAsync, arXiv 1903.03934), section 5.2; Nguyen et al. 2022 (FedBuff,
arXiv 2106.06639) take polynomial(0.5).
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from jaxfm.model import Array

Staleness = Callable[[Array], Array]  # f32[], server steps behind -> f32[], the weight


def constant() -> Staleness:
    """Updates of any age count the same: s = 1."""
    return lambda behind: jnp.ones_like(behind)


def polynomial(power: float = 0.5) -> Staleness:
    """s = (1 + t)^-power.

    Raises:
      ValueError: a negative power.
    """
    if not power >= 0:
        raise ValueError(f"power={power} must be 0 or more: old updates count no more than new.")
    return lambda behind: (1 + behind) ** -power


def hinge(slope: float = 10.0, until: float = 4.0) -> Staleness:
    """s = 1 for t <= until, and 1 / (slope (t - until) + 1) beyond.

    Raises:
      ValueError: a negative number.
    """
    if not (slope >= 0 and until >= 0):
        raise ValueError(f"slope={slope} and until={until} must be 0 or more.")
    return lambda behind: 1 / (slope * jnp.maximum(behind - until, 0) + 1)
