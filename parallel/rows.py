"""Keys and values of several texts in flat rows, read one text at a time.

What each cell holds is not stored beside the rows but with the text's tree
(`jaxfm.parallel.token_tree.Cells`), which is small and may be kept on every device.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxfm.model import Array, PyTree, Variables
from jaxfm.parallel.cache import Block, Cache, CausalModel, through
from jaxfm.parallel.token_tree import Cells

_FEW = 16  # tokens that are written without a loop


class Rows(NamedTuple):
    """Keys and values of several texts, without an axis of size 1 that XLA could lay out anew.

    Attributes:
      k, v: [L, G, B * C, K] of stacked layers, or a tuple of each layer's [G, B * C, K].
    """

    k: Array | tuple[Array, ...]
    v: Array | tuple[Array, ...]


def flat_rows(cache: Cache) -> Rows:
    """The rows of a cache."""

    def flat(x: Array) -> Array:
        x = jnp.swapaxes(x, -4, -3)
        return x.reshape(*x.shape[:-3], -1, x.shape[-1])

    return Rows(*jax.tree.map(flat, cache[:2]))


def past_of(rows: Rows, request: Array, cells: Cells, block: Block) -> Cache:
    """The cache of one text, with positions and bits of its cells.

    The cells of the block itself, which are filled only by this pass, are hidden.
    """
    size = cells.positions.shape[0]

    def one(x: Array) -> Array:
        own = lax.dynamic_slice_in_dim(x, request * size, size, axis=x.ndim - 2)
        return lax.expand_dims(own, (x.ndim - 3,))

    bits = cells.bits.at[block.cells[0]].set(0, mode="drop")
    k, v = jax.tree.map(one, tuple(rows))
    return Cache(k, v, cells.positions[None], bits[None])


def read_block(
    lm: CausalModel, variables: Variables, rows: Rows, request: Array, cells: Cells, block: Block
) -> tuple[Array, Rows, Cells]:
    """Runs a block of one text through a whole model.

    Returns:
      x [1, T, D], the fuller rows, and the cells with the block in them.
    """
    x = lm.stages.embed(variables, block.tokens, block.positions)
    x, new = through(lm, variables, x, past_of(rows, request, cells, block), block)
    rows = put_rows(rows, request, cells, block, new)
    assert block.own is not None
    at = block.cells[0]
    cells = cells._replace(
        tokens=cells.tokens.at[at].set(block.tokens[0], mode="drop"),
        positions=cells.positions.at[at].set(block.positions[0], mode="drop"),
        bits=cells.bits.at[at].set(block.own[0], mode="drop"),
    )
    return x, rows, cells


def put_rows(
    rows: Rows, request: Array, cells: Cells, block: Block, new: tuple[PyTree, PyTree]
) -> Rows:
    """The rows with new keys and values in one text's cells.

    What has no cell goes to the last one, which is never given to a token. Updates of one token
    each are done in place, whereas a scatter would make XLA keep the whole cache in another layout.
    """
    size = cells.positions.shape[0]
    at = request * size + jnp.minimum(block.cells, size - 1)[0]

    def write(old: Array, values: Array) -> Array:
        axis = old.ndim - 2  # of cells
        values = jnp.swapaxes(lax.squeeze(values, (axis - 1,)), -3, -2)

        def step(i, old):
            row = lax.dynamic_slice_in_dim(values, i, 1, axis=axis)
            return lax.dynamic_update_slice_in_dim(old, row, at[i], axis=axis)

        if at.shape[0] > _FEW:
            return lax.fori_loop(0, at.shape[0], step, old)
        for i in range(at.shape[0]):
            old = step(i, old)
        return old

    return Rows(*jax.tree.map(write, tuple(rows), new))
