"""Members of a supernet: from counts to indices, steps of a search, and numbers of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.model import Array, PyTree, is_axes
from jaxfm.search.elastic.groups import ElasticGroup, rows_by_axis
from jaxfm.subnet import centre, is_taps


def count_steps(
    groups: tuple[ElasticGroup, ...], smallest: float
) -> tuple[np.ndarray, np.ndarray, Callable[[Array], Array]]:
    """Returns the first and last step of each group, and how steps become counts.

    A step adds `channel_multiple` channels, or is the next larger kernel.

    Returns:
      (first i32[G], last i32[G], `(steps [..., G]) -> counts [..., G]`).
    """
    largest = np.array([g.size for g in groups], np.int32)
    multiple = np.array([g.channel_multiple for g in groups], np.int32)
    low = -(-np.array([g.least for g in groups], np.int32) // multiple)
    most = -(-largest // multiple)
    at = np.array([i for i, g in enumerate(groups) if g.kernels], np.int32)
    for i in at:
        # The projection keeps the share `smallest` of the steps; more steps let all choices remain.
        choices = len(groups[i].kernels)
        most[i] = choices
        while most[i] - max(1, int(np.ceil(smallest * most[i]))) + 1 < choices:
            most[i] += 1
        low[i] = most[i] - choices + 1
    width = max((len(groups[i].kernels) for i in at), default=0)
    table = np.array(
        [groups[i].kernels + (0,) * (width - len(groups[i].kernels)) for i in at], np.int32
    )

    def to_counts(steps: Array) -> Array:
        along = lambda x: jnp.broadcast_to(jnp.asarray(x, steps.dtype), steps.shape)
        counts = jnp.minimum(steps * along(multiple), along(largest))
        if not len(at):
            return counts
        own = steps[..., at].astype(jnp.int32)
        place = jnp.clip(own - jnp.broadcast_to(low[at], own.shape), 0)
        return counts.at[..., at].set(
            jnp.asarray(table)[np.arange(len(at)), place].astype(steps.dtype)
        )

    return low, most, to_counts


def padded_keep(groups: tuple[ElasticGroup, ...], counts: Array) -> dict[str, Array]:
    """Returns index arrays of one shape for all members: the kept indices, then padding."""
    keep = {}
    for name, at in rows_by_axis(groups).items():
        size = groups[at[0]].size
        index = jnp.arange(size)[None]
        # An index is kept where fewer come before it than are kept.
        before = jnp.abs(2 * index - (size - 1)) if is_taps(name) else index
        index = jnp.where(before < jnp.asarray(counts)[np.array(at)][:, None], index, size)
        keep[name] = index[0] if groups[at[0]].layer is None else index
    return keep


def kept_indices(groups: tuple[ElasticGroup, ...], counts: np.ndarray) -> dict[str, Any]:
    """Returns the indices that a member keeps of each axis; a list where layers differ."""
    keep: dict[str, Any] = {}
    for name, at in rows_by_axis(groups).items():
        size, of = groups[at[0]].size, is_taps(name)
        own = [centre(size, k) if of else np.arange(k, dtype=np.int32) for k in counts[at]]
        equal = len(set(counts[at].tolist())) == 1
        keep[name] = own[0] if equal else own
    return keep


def member_parameters(
    axes: PyTree, params: PyTree, groups: tuple[ElasticGroup, ...], counts: Array
) -> Array:
    """Returns Σ over leaves of the product of their kept axes, layer by layer where stacked."""
    rows = rows_by_axis(groups)
    total = jnp.zeros(())
    leaves = jax.tree.leaves(params)
    for names, leaf in zip(jax.tree.leaves(axes, is_leaf=is_axes), leaves, strict=True):
        depth = leaf.shape[names.index("layer")] if "layer" in names else 1
        each = jnp.ones(depth)
        for name, size in zip(names, leaf.shape, strict=True):
            if name == "layer":
                continue
            each = each * (counts[np.array(rows[name])] if name in rows else float(size))
        if "layer" in names and "layer" in rows:
            each = each * jnp.clip(
                counts[rows["layer"][0]] - jnp.arange(depth, dtype=jnp.float32), 0, 1
            )
        total = total + each.sum()
    return total
