"""Clipping to a norm, and Gaussian noise: the two halves of a private sum."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxfm.federated.algorithm import full_width
from jaxfm.model import Array, Key, PyTree


def global_norm(tree: PyTree) -> Array:
    """f32[]: the norm over all floats of a tree, in 32 bits."""
    squares = [jnp.sum(jnp.square(full_width(x))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.float32(0)))


def clipped(tree: PyTree, norm: Array) -> PyTree:
    """The tree, of floats, scaled down to this norm where it is longer; in 32 bits."""
    own = global_norm(tree)
    scale = jnp.where(own > norm, norm / jnp.where(own > 0, own, 1), 1)
    return jax.tree.map(lambda x: full_width(x) * scale.astype(full_width(x).dtype), tree)


def noised(tree: PyTree, deviation: Array, key: Key) -> PyTree:
    """The tree, of floats of 32 bits or more, plus Gaussian noise of this standard deviation.

    Args:
      tree: any.
      deviation: f32[].
      key: consumed.
    """
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, max(len(leaves), 1))
    draw = lambda x, key: deviation.astype(x.dtype) * jax.random.normal(key, x.shape, x.dtype)
    return jax.tree.unflatten(structure, [x + draw(x, k) for x, k in zip(leaves, keys)])
