"""A text's tree of proposed tokens, and what stands in the cells of its cache.

The root of the tree, the *tip*, is the newest token that is known to be right; a node's children
are guesses at what follows it. Node `i` of a text owns bit `i` of a set of bits. A query carries
the bits of itself, its ancestors and the truth (bit 0); a cell carries the bit of its node and, for
committed tokens, also bit 0. So branching, cancelling and committing never move keys or values.

All functions work on one text (no batch axis); callers `vmap` or index them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxfm.model import Array
from jaxfm.parallel.cache import TRUTH, visible
from jaxfm.parallel.penalties import History

NONE = 0  # the node slot that is never used: bit 0 is the truth


class Cells(NamedTuple):
    """What each cell of a text's cache holds; the same on every stage.

    Attributes:
      tokens: i32[C].
      positions: i32[C].
      bits: u32[C, W]; all zero: the cell is free.
      read: bool[C] whether the draft has read the cell as well.
    """

    tokens: Array
    positions: Array
    bits: Array
    read: Array


class Tree(NamedTuple):
    """The proposed tokens of a text, and its newest right one.

    Attributes:
      tip: i32[] node of the newest right token.
      tokens, positions, cells: i32[N] of each node.
      parents: i32[N]; NONE for one that replaced its tree.
      bits: u32[N, W] of the node, its ancestors and the truth.
      scores: f32[N] log-probability, by the draft, of the path from its first proposal.
      alive, launched: bool[N]; a node is launched once a packet holds it.
      answers: i32[N] the target's token after the node; -1: not known yet.
      logprobs: f32[N] of the answers.
      misses: i32[] times in a row that the draft proposed nothing.
      places: i32[N] of each node among the candidates of its depth, the most probable first.
      states: i32[N] of the text's grammar after each node; the tip's is the text's own.
    """

    tip: Array
    tokens: Array
    positions: Array
    cells: Array
    parents: Array
    bits: Array
    scores: Array
    alive: Array
    launched: Array
    answers: Array
    logprobs: Array
    misses: Array
    places: Array
    states: Array


def num_words(num_nodes: int) -> int:
    """W, the number of 32-bit words that hold one bit a node."""
    return -(-num_nodes // 32)


def bit(nodes: Array, words: int) -> Array:
    """u32[..., W]: for each node i32[...] the set that holds only its bit."""
    word, place = nodes // 32, (nodes % 32).astype(jnp.uint32)
    every = jnp.arange(words, dtype=jnp.int32).reshape(*[1] * nodes.ndim, words)
    return jnp.where(every == word[..., None], jnp.left_shift(jnp.uint32(1), place)[..., None], 0)


def has(bits: Array, node: Array) -> Array:
    """bool[...]: whether sets u32[..., W] hold a node i32[]."""
    word = lax.dynamic_index_in_dim(bits, node // 32, axis=bits.ndim - 1, keepdims=False)
    return (jnp.right_shift(word, (node % 32).astype(jnp.uint32)) & jnp.uint32(1)) != 0


def init_cells(tokens: Array, length: Array, num_cells: int, words: int) -> Cells:
    """The cells after target and draft have read the first `length - 1` of `tokens` i32[P]."""
    places = jnp.arange(num_cells, dtype=jnp.int32)
    known = places < length - 1
    padded = jnp.zeros((num_cells,), jnp.int32).at[: tokens.shape[0]].set(tokens)
    truth = jnp.zeros((words,), jnp.uint32).at[0].set(TRUTH)
    bits = jnp.where(known[:, None], truth[None], jnp.uint32(0))
    return Cells(padded, jnp.where(known, places, 0), bits, known)


def history(cells: Cells, positions: Array, bits: Array) -> History:
    """The tokens that nodes see, themselves included: what comes before the tokens after them.

    Args:
      cells: of the text.
      positions: i32[1, K] of the nodes.
      bits: u32[1, K, W] that they see by.
    """
    own, its_bits = cells.positions[None], cells.bits[None]
    return History(cells.tokens[None], own, visible(positions, bits, own, its_bits, window=None))


def init_tree(num_nodes: int) -> Tree:
    """A tree without nodes."""
    whole = jnp.zeros((num_nodes,), jnp.int32)
    off = jnp.zeros((num_nodes,), bool)
    bits = jnp.zeros((num_nodes, num_words(num_nodes)), jnp.uint32)
    real = jnp.zeros((num_nodes,), jnp.float32)
    zero = jnp.zeros((), jnp.int32)
    return Tree(
        tip=zero, tokens=whole, positions=whole, cells=whole, parents=whole, bits=bits, scores=real,
        alive=off, launched=off, answers=whole, logprobs=real, misses=zero, places=whole,
        states=whole,
    )  # fmt: skip


def replant(
    tree: Tree, cells: Cells, token: Array, position: Array, busy: Array
) -> tuple[Tree, Cells]:
    """The tree of one right token that no node had proposed: all other nodes die.

    Args:
      tree, cells: of the text.
      token, position: i32[] of the right token.
      busy: bool[N] slots that packets in flight may still refer to.
    """
    words = tree.bits.shape[1]
    tree = tree._replace(alive=jnp.zeros_like(tree.alive))
    tree, cells = release(tree, cells)
    node = free_nodes(tree.alive | busy, 1)[0]
    cell = free_cells(cells, 1)[0]
    both = bit(node, words) | bit(jnp.zeros((), jnp.int32), words)
    put = lambda field, value: field.at[node].set(value)
    tree = tree._replace(
        tip=node,
        tokens=put(tree.tokens, token),
        positions=put(tree.positions, position),
        cells=put(tree.cells, cell),
        parents=put(tree.parents, NONE),
        bits=put(tree.bits, both),
        scores=put(tree.scores, 0.0),
        alive=put(tree.alive, True),
        launched=put(tree.launched, False),
        answers=put(tree.answers, -1),
    )
    cells = Cells(
        cells.tokens.at[cell].set(token),
        cells.positions.at[cell].set(position),
        cells.bits.at[cell].set(both),
        cells.read.at[cell].set(False),
    )
    return tree, cells


def descend(tree: Tree, cells: Cells, node: Array) -> tuple[Tree, Cells]:
    """Moves the tip to one of its children: only the child's subtree stays alive."""
    truth = bit(jnp.zeros((), jnp.int32), tree.bits.shape[1])
    tree = tree._replace(tip=node, alive=tree.alive & has(tree.bits, node))
    cell = tree.cells[node]
    cells = cells._replace(bits=cells.bits.at[cell].set(cells.bits[cell] | truth))
    return release(tree, cells)


def release(tree: Tree, cells: Cells) -> tuple[Tree, Cells]:
    """Clears the bits of dead nodes, so that their slots and cells can be used again.

    Committed cells keep the truth's bit.
    """
    words = tree.bits.shape[1]
    nodes = jnp.arange(tree.alive.shape[0], dtype=jnp.int32)
    keep = jnp.where(tree.alive[:, None], bit(nodes, words), jnp.uint32(0))
    keep = lax.reduce(keep, jnp.uint32(0), lax.bitwise_or, (0,))
    keep = (keep | bit(jnp.zeros((), jnp.int32), words))[None]
    return tree._replace(bits=tree.bits & keep), cells._replace(bits=cells.bits & keep)


def kill(tree: Tree, cells: Cells) -> tuple[Tree, Cells]:
    """Lets all nodes die, since the text is done."""
    tree = tree._replace(alive=jnp.zeros_like(tree.alive))
    return release(tree, cells)


def free_nodes(busy: Array, count: int) -> Array:
    """i32[count] the first node slots that are not busy bool[N]; NONE where there are fewer."""
    return _first((~busy).at[NONE].set(False), count, NONE)


def free_cells(cells: Cells, count: int) -> Array:
    """i32[count] the first free cells; C where there are fewer."""
    return _first(is_free(cells), count, cells.positions.shape[0])


def is_free(cells: Cells) -> Array:
    """bool[C]; the last cell, which takes what is to be written nowhere (`put_rows`), never is."""
    return (cells.bits == 0).all(1).at[-1].set(False)


def _first(mask: Array, count: int, otherwise: int) -> Array:
    """i32[count], the first places where `mask` is true."""
    return jnp.nonzero(mask, size=count, fill_value=otherwise)[0].astype(jnp.int32)
