"""Steps of an optax optimizer under strict dtype promotion.

Optax mixes integer counts and floats, which `jax_numpy_dtype_promotion="strict"` refuses. These
two functions allow it for optax alone.
"""

from __future__ import annotations

import jax
import optax

from jaxfm.model import PyTree


def update(
    optimizer: optax.GradientTransformation, grads: PyTree, opt_state: PyTree, params: PyTree
) -> tuple[PyTree, PyTree]:
    """Returns (updates, new opt_state) of `optimizer.update`."""
    with jax.numpy_dtype_promotion("standard"):
        return optimizer.update(grads, opt_state, params)


def apply_gradients(
    optimizer: optax.GradientTransformation, grads: PyTree, opt_state: PyTree, params: PyTree
) -> tuple[PyTree, PyTree]:
    """Returns (new params, new opt_state) after one step of the optimizer."""
    updates, opt_state = update(optimizer, grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state
