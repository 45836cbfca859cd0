"""Keys and values of several texts in flat rows, read one text at a time.

What each cell holds is not stored beside the rows but with the text's tree
(`jaxfm.parallel.token_tree.Cells`), which is small and may be kept on every device.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxfm.model import Array, Variables
from jaxfm.parallel.cache import Block, Cache, CausalModel, through
from jaxfm.parallel.token_tree import Cells

_FEW = 16  # tokens that are written without a loop


class Rows(NamedTuple):
    """Keys and values of several texts, without an axis of size 1 that XLA could lay out anew.

    Attributes:
      k, v: [L, B * C, G, K]; for layers of unequal shape [B * C, F], as in
        `jaxfm.parallel.cache.Cache`.
    """

    k: Array
    v: Array


def flat_rows(cache: Cache) -> Rows:
    """The rows of a cache."""

    def flat(x: Array) -> Array:
        if x.ndim == 5:
            return x.reshape(*x.shape[:-4], -1, *x.shape[-2:])
        return x.reshape(-1, x.shape[-1])

    return Rows(flat(cache.k), flat(cache.v))


def past_of(rows: Rows, request: Array, cells: Cells, block: Block) -> Cache:
    """The cache of one text, with positions and bits of its cells.

    The cells of the block itself, which are filled only by this pass, are hidden.
    """
    size = cells.positions.shape[0]

    def one(x: Array) -> Array:
        axis = 1 if x.ndim == 4 else 0
        own = lax.dynamic_slice_in_dim(x, request * size, size, axis=axis)
        return lax.expand_dims(own, (axis,))

    bits = cells.bits.at[block.cells[0]].set(0, mode="drop")
    return Cache(one(rows.k), one(rows.v), cells.positions[None], bits[None])


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
        positions=cells.positions.at[at].set(block.positions[0], mode="drop"),
        bits=cells.bits.at[at].set(block.own[0], mode="drop"),
    )
    return x, rows, cells


def put_rows(
    rows: Rows, request: Array, cells: Cells, block: Block, new: tuple[Array, Array]
) -> Rows:
    """The rows with new keys and values in one text's cells.

    What has no cell goes to the last one, which is never given to a token. Updates of one token
    each are done in place, whereas a scatter would make XLA keep the whole cache in another layout.
    """
    size = cells.positions.shape[0]
    at = request * size + jnp.minimum(block.cells, size - 1)[0]

    def write(old: Array, values: Array) -> Array:
        axis = 1 if old.ndim == 4 else 0  # of cells
        values = lax.squeeze(values, (axis,))

        def step(i, old):
            row = lax.dynamic_slice_in_dim(values, i, 1, axis=axis)
            return lax.dynamic_update_slice_in_dim(old, row, at[i], axis=axis)

        if at.shape[0] > _FEW:
            return lax.fori_loop(0, at.shape[0], step, old)
        for i in range(at.shape[0]):
            old = step(i, old)
        return old

    return Rows(write(rows.k, new[0]), write(rows.v, new[1]))
