"""A model in fragments of equal size, of which one travels at a time.

Of layers that are stacked, fragment f of P holds layers f, f + P, f + 2 P, ...; every other array
(embedding, head, norms) is cut into P equal pieces, so that all fragments have the same shapes and
the same bytes.
Source: Douillard et al. 2025 (Streaming DiLoCo), section 2.1, the strided pattern.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxfm.model import Array, Model, PyTree, Variables, is_stacked, layers_of, num_layers


def check_fragments(model: Model, pieces: int) -> None:
    """Raises ValueError where `pieces` fragments do not divide the layers of a model."""
    if pieces < 1:
        raise ValueError(f"fragments={pieces} must be at least 1.")
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    layers = layers_of(shapes)
    if not layers.params or not is_stacked(layers):
        return
    if (depth := num_layers(layers)) % pieces:
        fitting = [n for n in range(1, depth + 1) if depth % n == 0]
        raise ValueError(
            f"fragments={pieces} do not divide the model's {depth} layers; choose one of {fitting}."
        )


def cut(params: PyTree, pieces: int) -> PyTree:
    """The parameters as fragments: leaves [P, ...], a fragment each; padded with zeros.

    Args:
      params: of a model, "layers" stacked on axis 0 if it has any.
      pieces: P.
    """

    def of(path, x: Array) -> Array:
        if _is_layer(params, path):
            return jnp.moveaxis(x.reshape(-1, pieces, *x.shape[1:]), 1, 0)
        return jnp.pad(x.reshape(-1), (0, -x.size % pieces)).reshape(pieces, -1)

    return jax.tree_util.tree_map_with_path(of, params)


def joined(fragments: PyTree, like: PyTree) -> PyTree:
    """The parameters that `cut` has cut; `like` has their shapes."""

    def of(path, shape, x: Array) -> Array:
        if _is_layer(like, path):
            return jnp.moveaxis(x, 0, 1).reshape(shape.shape)
        return x.reshape(-1)[: shape.size].reshape(shape.shape)

    return jax.tree_util.tree_map_with_path(of, like, fragments)


def fragment_at(fragments: PyTree, f: Array) -> PyTree:
    """Fragment number f i32[] of `cut` parameters."""
    return jax.tree.map(lambda x: x[f], fragments)


def with_fragment(fragments: PyTree, f: Array, fragment: PyTree) -> PyTree:
    """The fragments with another one in the place of number f i32[]."""
    return jax.tree.map(lambda x, new: x.at[f].set(new.astype(x.dtype)), fragments, fragment)


def _is_layer(params: PyTree, path: tuple) -> bool:
    if path[0].key != "layers":
        return False
    return is_stacked(Variables(params["layers"], {}, {}))
