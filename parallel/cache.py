"""The cache of keys and values, and the one pass of a model that reads and fills it.

A cell holds the keys and values of one token in all layers. Two small arrays say what each cell is:
its position, and one bit for each branch of text that it belongs to. A query sees a cell if they
share a bit and the cell is not later:

    visible = (query bits & cell bits) != 0  and  0 <= query position - cell position < window

So keeping, dropping and branching are vector operations on these arrays and never move a row of
keys or values. Decoders of one line of text use bit 0 and the cell whose number is the position;
`keep` drops later cells, and they are overwritten.

Layers that are stacked have stacked keys and values, layers apart have arrays of their own, of any
shapes. Blocks only read them and return new rows, which are written after all layers. So XLA sees
every read before the first write and updates the donated buffers in place. A head's rows lie side
by side, as products with them read them: XLA's CPU backend would otherwise transpose all of them in
every pass.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxfm.adapters.prompts import num_virtual
from jaxfm.layers import contained
from jaxfm.model import (
    Array,
    Model,
    Past,
    PyTree,
    Stages,
    Variables,
    is_stacked,
    layer_at,
    layers_of,
    num_layers,
    unstack,
    with_layers,
)

TRUTH = 1  # bit 0: the text that is committed


class CausalModel(NamedTuple):
    """The functions of a causal language model, without variables; hashable, unlike Model.

    Attributes:
      stages: embedding, block and head.
      window: number of latest positions that a token sees; None: all.
    """

    stages: Stages
    window: int | None = None


class Positions(NamedTuple):
    """The positions of a model.

    Attributes:
      number: of those that it knows; None: any.
      learned: there are no others. Computed ones go on, but the model was not trained on them.
    """

    number: int | None
    learned: bool


class Cache(NamedTuple):
    """Keys and values of tokens already seen.

    Attributes:
      k: keys: [L, B, G, S, K] of stacked layers, or a tuple of each layer's [B, G, S, K].
      v: values, likewise.
      positions: i32[B, S] of the token in each cell.
      bits: u32[B, S] branches that each cell belongs to; 0: the cell is free.
    """

    k: Array | tuple[Array, ...]
    v: Array | tuple[Array, ...]
    positions: Array
    bits: Array


class Prior(NamedTuple):
    """What was read before of a text with which several begin.

    Attributes:
      state: of a decoder, of a drafter, or a Cache; of one text, its first `first` tokens at least.
      first: i32[], position of the first token that is still to be read.
    """

    state: PyTree
    first: Array


class Block(NamedTuple):
    """Tokens to be read in one pass.

    Attributes:
      tokens: i32[B, T].
      positions: i32[B, T].
      cells: i32[B, T] where their rows are written; a cell S or beyond is nowhere.
      bits: u32[B, T] their branches; 0: no token (its output means nothing).
      own: bits by which others see them, where these are fewer than the bits they see by (a node
        of a tree of tokens sees its ancestors, but is not one of them); None: `bits`.
    """

    tokens: Array
    positions: Array
    cells: Array
    bits: Array
    own: Array | None = None


def causal_model(model: Model) -> CausalModel:
    """The functions of a causal language model.

    Raises:
      ValueError: the model has no stages.
    """
    if model.stages is None:
        raise ValueError("The model has no stages; only causal language models can decode.")
    return CausalModel(model.stages, getattr(model.config, "sliding_window", None))


def vocab_size(model: Model, variables: Variables) -> int:
    """V, the number of logits of a causal language model."""
    stages = causal_model(model).stages
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    logits = jax.eval_shape(lambda v, t: stages.head(v, stages.embed(v, t, t)), variables, one)
    return logits.shape[-1]


def positions_of(model: Model) -> Positions:
    """How many positions a model has for tokens, after those of its prompts."""
    number = getattr(model.config, "max_len", None)
    number = None if number is None else number - num_virtual(model)
    return Positions(number, getattr(model.config, "positions", None) == "learned")


def decoding_layout(variables: Variables) -> Variables:
    """The variables in the form that decodes fastest on the default backend.

    XLA's CPU backend copies each layer's weights out of the stack before it multiplies by them,
    which costs a third of the speed of a matrix-vector product from memory (21 against 32 GB/s on
    two cores). So there the layers are taken apart, once. Other backends read the slice in place,
    and keep the smaller program of stacked layers. Reuse the result to pay only once.
    """
    layers = layers_of(variables)
    if jax.default_backend() != "cpu" or not is_stacked(layers):
        return variables
    return with_layers(variables, unstack(layers))


def init_cache(lm: CausalModel, variables: Variables, batch: int, cells: int) -> Cache:
    """An empty cache for `batch` sequences of up to `cells` tokens, sized by the parameters."""

    def empty(row: jax.ShapeDtypeStruct) -> Array:
        *stack, heads, size = row.shape
        return jnp.zeros((*stack, batch, heads, cells, size), row.dtype)

    k, v = jax.tree.map(empty, _row_shapes(lm, variables, batch))
    return Cache(k, v, jnp.zeros((batch, cells), jnp.int32), jnp.zeros((batch, cells), jnp.uint32))


def copies(cache: Cache, batch: int, cells: int) -> Cache:
    """The cache of one text, copied for `batch` texts of `cells` cells.

    Args:
      cache: whose cells are free from `cells` on.
    """

    def copy(x: Array, axis: int, batch_axis: int) -> Array:
        own = lax.slice_in_dim(x, 0, min(cells, x.shape[axis]), axis=axis)
        pads = [(0, cells - own.shape[axis] if i == axis else 0) for i in range(x.ndim)]
        return jnp.repeat(jnp.pad(own, pads), batch, axis=batch_axis)

    k, v = jax.tree.map(lambda x: copy(x, x.ndim - 2, x.ndim - 4), cache[:2])
    return Cache(k, v, copy(cache.positions, 1, 0), copy(cache.bits, 1, 0))


def _row_shapes(lm: CausalModel, variables: Variables, batch: int) -> tuple[PyTree, PyTree]:
    """The shapes [G, K] and dtypes of one token's keys and values, in the form of a Cache."""
    token = jnp.zeros((batch, 1), jnp.int32)

    def one(layer: Variables):
        x = lm.stages.embed(variables, token, token)
        _, rows = lm.stages.block(layer, x, token, jnp.ones((1, 1, 1), bool))
        return tuple(row[0, 0] for row in rows)

    layers = layers_of(variables)
    if is_stacked(layers):
        return jax.eval_shape(jax.vmap(one), layers)
    k, v = zip(*(jax.eval_shape(one, layer_at(layers, i)) for i in range(num_layers(layers))))
    return k, v


def visible(
    q_positions: Array, q_bits: Array, positions: Array, bits: Array, window: int | None
) -> Array:
    """bool[B, T, S]: which of S cells each of T queries may see, by the rule of this module.

    Bits are u32[B, T] and u32[B, S], or have a last axis of words where 32 branches are not enough.
    """
    distance = q_positions[:, :, None] - positions[:, None, :]
    shared = (q_bits[:, :, None] & bits[:, None]) != 0
    seen = (distance >= 0) & (shared.any(-1) if shared.ndim == 4 else shared)
    return seen if window is None else seen & (distance < window)


def keep(cache: Cache, length: Array) -> Cache:
    """The cache without the cells at position `length` i32[B] or later, in all branches."""
    kept = cache.positions < length[:, None]
    return cache._replace(bits=jnp.where(kept, cache.bits, jnp.zeros_like(cache.bits)))


def line(tokens: Array, start: Array, live: Array, cells: int) -> Block:
    """The block of consecutive tokens i32[B, T] of one line of text from position `start` i32[B].

    Places that are not `live` bool[B, T] get position 0, which every model can embed.
    """
    positions = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    return Block(
        tokens,
        positions=jnp.where(live, positions, 0),
        cells=jnp.where(live, positions, cells),
        bits=jnp.where(live, jnp.uint32(TRUTH), jnp.uint32(0)),
    )


def read(
    lm: CausalModel, variables: Variables, cache: Cache, block: Block, *, empty: bool = False
) -> tuple[Array, Cache]:
    """The hidden state before the head after one pass over a block, and the fuller cache.

    Args:
      lm, variables: the model.
      cache: not changed; donate it to update it in place.
      block: the tokens, which see the cache and each other by the same rule.
      empty: the cache is known to be empty and need not be read.
    Returns:
      x [B, T, D] and the cache with the block's rows written.
    """
    x = lm.stages.embed(variables, block.tokens, block.positions)
    if empty:  # what stands in places without a token harms nobody
        x = jnp.where((block.bits != 0)[..., None], x, jnp.zeros_like(x))
    x, rows = through(lm, variables, x, cache, block, empty=empty)
    return x, store(cache, block, rows)


def through(
    lm: CausalModel,
    variables: Variables,
    x: Array,
    cache: Cache,
    block: Block,
    *,
    empty: bool = False,
) -> tuple[Array, tuple[PyTree, PyTree]]:
    """Runs a block of tokens through the layers that `variables` has: a stage's part of a pass.

    Returns:
      x [B, T, D] and the new rows of keys and values, not yet written: [L, B, T, G, K], or a tuple
      of each layer's [B, T, G, K]. What is not finite makes the logits of all tokens that see it
      NaN, and harms no others.
    """
    own = block.bits if block.own is None else block.own
    mask = visible(block.positions, block.bits, block.positions, own, lm.window)
    cached = visible(block.positions, block.bits, cache.positions, cache.bits, lm.window)

    def step(x, layer: Variables, k: Array, v: Array):
        past = None if empty else Past(k, v, cached)
        return lm.stages.block(layer, x, block.positions, mask, past)

    layers = layers_of(variables)
    if is_stacked(layers):
        over: PyTree = (layers, cache.k, cache.v)
        x, (k, v) = lax.scan(lambda x, one: step(x, one[0], one[1], one[2]), x, over)
        return x, _marked(x, k, v)
    each = []
    for i, past in enumerate(zip(cache.k, cache.v, strict=True)):
        x, new = step(x, layer_at(layers, i), *past)
        each.append(new)
    k, v = zip(*each)
    return x, _marked(x, k, v)


def _marked(x: Array, k: PyTree, v: PyTree) -> tuple[PyTree, PyTree]:
    """Rows in which a number that is not finite harms only who sees it.

    They depend on x for another reason, too: so no write can be scheduled before the last read.
    Otherwise XLA guards the reads with copies of the cache (barriers do not help).
    """
    finite = jnp.isfinite(x).all(-1)[..., None, None]
    mark = lambda k, v: contained(k, v, finite if k.ndim == 4 else finite[None])
    return jax.tree.transpose(jax.tree.structure(k), None, jax.tree.map(mark, k, v))


def store(cache: Cache, block: Block, rows: tuple[PyTree, PyTree]) -> Cache:
    """The cache with a block's rows, as `through` returns them, in its cells."""
    batch = jnp.arange(block.tokens.shape[0])[:, None]

    def write(old: Array, new: Array) -> Array:
        if old.ndim == 4:
            return old.at[batch, :, block.cells].set(new, mode="drop")
        # Indices that a slice stands between come first: [B, T, L, G, K].
        return old.at[:, batch, :, block.cells].set(jnp.moveaxis(new, 0, 2), mode="drop")

    put = lambda old, new: old.at[batch, block.cells].set(new, mode="drop")
    k, v = jax.tree.map(write, cache[:2], rows)
    bits = block.bits if block.own is None else block.own
    return Cache(k, v, put(cache.positions, block.positions), put(cache.bits, bits))


def num_cells(cache: Cache) -> int:
    """S, the number of cells of each sequence."""
    return cache.positions.shape[1]


def extend(
    lm: CausalModel, variables: Variables, cache: Cache, tokens: Array, start: Array, live: Array
) -> tuple[Array, Cache]:
    """Like `read` for one line of text, after dropping whatever the cache held from `start` on.

    Args:
      lm, variables: the model.
      cache: of the text so far.
      tokens: i32[B, T].
      start: i32[B] position of the first of them.
      live: bool[B, T], as in `line`.
    Returns:
      x [B, T, D] and the cache.
    """
    block = line(tokens, start, live, num_cells(cache))
    return read(lm, variables, keep(cache, start), block)


def prefill(
    lm: CausalModel,
    variables: Variables,
    tokens: Array,
    length: Array,
    cells: int,
    chunk: int | None = None,
    prior: Prior | None = None,
) -> Cache:
    """A cache of the first `length` tokens of each text.

    Args:
      lm, variables: the model.
      tokens: i32[B, P], right-padded, from the first that is to be read.
      length: i32[B].
      cells: S of the cache, at least P.
      chunk: tokens a pass, to bound the memory of the scores; None: all at once.
      prior: the cache of what all texts begin with; None: nothing was read.
    """
    batch, width = tokens.shape
    if prior is None:
        start, cache = jnp.zeros((batch,), jnp.int32), init_cache(lm, variables, batch, cells)
    else:
        start = jnp.broadcast_to(prior.first, (batch,))
        cache = keep(copies(prior.state, batch, cells), start)
    live = start[:, None] + jnp.arange(width, dtype=jnp.int32)[None] < length[:, None]
    if chunk is None or chunk >= width:
        block = line(tokens, start, live, cells)
        return read(lm, variables, cache, block, empty=prior is None)[1]

    chunks = -(-width // chunk)
    to_whole = lambda x: jnp.pad(x, ((0, 0), (0, chunks * chunk - width)))
    tokens, live = to_whole(tokens), to_whole(live)

    def body(i, cache: Cache) -> Cache:
        part = lambda x: lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1)
        block = line(part(tokens), start + i * chunk, part(live), cells)
        return read(lm, variables, cache, block)[1]

    return lax.fori_loop(0, chunks, body, cache)
