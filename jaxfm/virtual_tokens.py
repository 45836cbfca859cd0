"""Virtual tokens: trained vectors before the tokens of a text or the patches of an image.

    params["virtual"]["vectors"]           [P, D]        embedded as tokens are
    params["layers"]["prefix"]["k", "v"]   [L, P, G, K]  keys and values that every layer sees

A model's own tree has neither. `jaxfm.adapters.prompts` puts them there, and the transformers of
our families read them. Where both stand, the prefix comes first. Positions of tokens are counted
after all virtual ones, and nothing is put out at virtual places. Either may be different for each
example, with an axis of the batch before that of P.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from jaxfm.model import Array, Variables, is_stacked, layers_of

VIRTUAL, PREFIX = "virtual", "prefix"  # the names above


def virtual_vectors(variables: Variables, batch: int) -> Array | None:
    """Returns [B, P, D], the vectors before each example; None: there are none."""
    if VIRTUAL not in variables.params:
        return None
    vectors = variables.params[VIRTUAL]["vectors"]
    return jnp.broadcast_to(vectors, (batch, *vectors.shape[-2:]))


def prefix_of(layer: Variables) -> Mapping[str, Array] | None:
    """Returns the rows [P, G, K] that one layer sees before its tokens; None: there are none."""
    return layer.params.get(PREFIX)


def prefix_length(variables: Variables) -> int:
    """Returns P of the prefix of a whole tree; 0 without one."""
    layers = layers_of(variables)
    own = layers.params
    if own and not is_stacked(layers):
        own = next(iter(own.values()))
    return own[PREFIX]["k"].shape[-3] if PREFIX in own else 0


def length_of(vectors: Array | None) -> int:
    """Returns P of virtual vectors; 0 without any."""
    return 0 if vectors is None else vectors.shape[1]


def before(vectors: Array | None, x: Array) -> Array:
    """Returns [B, P + T, D], virtual vectors and embedded tokens x [B, T, D]."""
    return x if vectors is None else jnp.concatenate([vectors.astype(x.dtype), x], axis=1)


def after(vectors: Array | None, x: Array) -> Array:
    """Returns [B, T, D], what stands after the virtual vectors in x [B, P + T, D]."""
    return x if vectors is None else x[:, vectors.shape[1] :]


def padded_before(x: Array, count: int, value: int | bool) -> Array:
    """Returns [B, count + T] of x [B, T], with one value at virtual places."""
    return jnp.pad(x, ((0, 0), (count, 0)), constant_values=value) if count else x


def seeing_prefix(
    prefix: Mapping[str, Array] | None, mask: Array, places: Array | None = None,
    window: int | None = None,
) -> Array:  # fmt: skip
    """Returns bool[B, T, P + T], the mask [B, T, T] with the rows of a prefix before it.

    Args:
      prefix: of the layer; None: the mask is as it was.
      mask: which tokens see each other.
      places: i32[B, T], positions counted after the prefix; needed with a window.
      window: number of latest positions that a token sees; None: all.
    """
    if prefix is None:
        return mask
    count = prefix["k"].shape[-3]
    if window is None:
        return jnp.pad(mask, ((0, 0), (0, 0), (count, 0)), constant_values=True)
    assert places is not None
    distance = places[:, :, None] + count - jnp.arange(count, dtype=jnp.int32)[None, None]
    batch = max(mask.shape[0], distance.shape[0])
    wide = lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:]))
    return jnp.concatenate([wide(distance < window), wide(mask)], axis=-1)


def with_prefix(prefix: Mapping[str, Array] | None, k: Array, v: Array) -> tuple[Array, Array]:
    """Returns keys and values [B, P + T, G, K]: those of a prefix, then the tokens' own."""
    if prefix is None:
        return k, v

    def join(rows: Array, own: Array) -> Array:
        rows = jnp.broadcast_to(rows, (own.shape[0], *rows.shape[-3:]))
        return jnp.concatenate([rows.astype(own.dtype), own], axis=1)

    return join(prefix["k"], k), join(prefix["v"], v)
