"""Trees as named host arrays, as they travel and lie on disk, and back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.federated.remote.standalone import Arrays, Leaf, leaf_of
from jaxfm.model import PyTree


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def names_of(part: str, tree: PyTree) -> list[str]:
    """A name for each leaf, in their order: the part of the message, and the path."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return [part + jax.tree_util.keystr(path) for path, _ in paths]


def flat(part: str, tree: PyTree) -> Arrays:
    """The leaves by name, on the host; typed keys as their words."""
    leaves = words_of(jax.tree.map(_array, tree))
    return dict(zip(names_of(part, tree), map(np.asarray, jax.device_get(leaves)), strict=True))


def _array(leaf: Any) -> Any:
    return leaf if hasattr(leaf, "dtype") else np.asarray(leaf)


def leaves_of(part: str, shapes: PyTree) -> dict[str, Leaf]:
    """What is known of each leaf of a tree of arrays or `jax.ShapeDtypeStruct`."""
    words = lambda x: jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x
    leaves = [leaf_of(words(x)) for x in map(_array, jax.tree.leaves(shapes))]
    return dict(zip(names_of(part, shapes), leaves, strict=True))


def shapes_of(tree: PyTree) -> PyTree:
    """The tree of `jax.ShapeDtypeStruct`."""
    shape = lambda x: jax.ShapeDtypeStruct(_array(x).shape, _array(x).dtype)
    return jax.tree.map(shape, tree)


def tree_of(shapes: PyTree, leaves: list) -> PyTree:
    """The tree of these shapes from its leaves in order, keys made of their words; traceable."""

    def typed(shape, leaf):
        if not _is_key(shape):
            return leaf
        return jax.random.wrap_key_data(leaf)  # of JAX's default kind

    like = jax.tree.leaves(shapes)
    return jax.tree.unflatten(
        jax.tree.structure(shapes), [typed(*pair) for pair in zip(like, leaves, strict=True)]
    )


def words_of(tree: PyTree) -> list:
    """The leaves in order, keys as their words; traceable."""
    return [jax.random.key_data(x) if _is_key(x) else x for x in jax.tree.leaves(tree)]
