"""What the pipe works on next: continuous speculation as a pure function on small arrays.

Every text has a tree of proposed tokens. Its root, the *tip*, is the newest token that is known to
be right; a node's children are guesses at what follows it. Nodes travel through the pipe in
packets, S ticks long; what returns is the target's own token after each node. In a tick, in this
order:

    insert    what the draft proposed in the last tick becomes nodes below those it was asked about
    settle    answers come back: the tip moves to the child that was right, its siblings' subtrees
              die; if no child was right, the tree is replaced by the right token (a correction)
    launch    nodes that no packet holds yet are put into the pipe
    ask       the draft is given the deepest nodes to go on from

A node that died is taken out of the packets in flight at once, so a packet without nodes computes
nothing, and its cache cells can be given away. Node `i` of a text owns bit `i` of a set of bits; a
query carries the bits of itself, its ancestors and the truth (bit 0), a cell the bit of its node,
and for committed tokens also bit 0. So branching, cancelling and committing move no keys or values.

All functions work on one text (no batch axis) and are `vmap`ped or indexed by the caller.
Source: PipeInfer (arXiv 2407.11798), sections on continuous speculation and early cancellation;
differences are named in `jaxfm.parallel.pipe.pipeinfer`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxfm.model import Array
from jaxfm.parallel.cache import TRUTH

LATE = 4  # cells that a drafting model reads a tick beside the nodes it is asked about
NONE = 0  # the node slot that is never used: bit 0 is the truth


class Cells(NamedTuple):
    """What stands in each cell of a text's cache; the same on every stage.

    Attributes:
      tokens, positions: i32[C].
      bits: u32[C, W]; all zero: the cell is free.
      read: bool[C] whether the draft has read the cell, too.
    """

    tokens: Array
    positions: Array
    bits: Array
    read: Array


class Tree(NamedTuple):
    """The tokens of a text that are on their way.

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


class Limits(NamedTuple):
    """How eagerly to speculate; arrays, so that a policy changes them without a compilation.

    Attributes:
      width: i32[] candidates alive at each depth; 0 switches speculation off.
      levels: i32[] tokens of a path that are drafted a tick.
      window: i32[] most packets of one text in flight.
      accept: f32[] least probability of a proposed token.
      split: f32[] least probability of a second or later candidate.
      recovery: f32[] added to both cut-offs for each packet in flight.
      decay: f32[] taken from both for each time in a row that nothing was proposed.
    """

    width: Array
    levels: Array
    window: Array
    accept: Array
    split: Array
    recovery: Array
    decay: Array


class Packet(NamedTuple):
    """Nodes that go through the stages together.

    Attributes:
      request: i32[...] text they belong to.
      nodes: i32[..., K]; NONE: an empty place.
    """

    request: Array
    nodes: Array


class Proposals(NamedTuple):
    """What the draft answers: levels of nodes, each level below the one before.

    Attributes:
      tokens: i32[k, w].
      parents: i32[k, w]; in the first level indices of the tips asked about, then of the level
        before.
      logprobs: f32[k, w] of each token after its parent, by the draft.
      valid: bool[k, w].
    """

    tokens: Array
    parents: Array
    logprobs: Array
    valid: Array


class Ask(NamedTuple):
    """What the draft is asked to go on from.

    Attributes:
      wanted: bool[] whether it is asked at all.
      request: i32[].
      tips: i32[w] nodes; NONE: an empty place.
      slots: i32[k, w] nodes for the answer.
      cells: i32[k, w] likewise.
      late: i32[M] cells before the best tip that the draft has still to read; C: none.
      late_bits: u32[M, W] what these see.
      behind: bool[] there are more of them: this time the draft only reads.
    """

    wanted: Array
    request: Array
    tips: Array
    slots: Array
    cells: Array
    late: Array
    late_bits: Array
    behind: Array


def limits(
    *, width: int = 1, levels: int = 1, window: int = 1 << 30, accept: float = 0.0,
    split: float = 0.0, recovery: float = 0.0, decay: float = 0.0,
) -> Limits:  # fmt: skip
    """`Limits` of plain numbers; the defaults speculate without restraint."""
    whole = lambda x: jnp.asarray(x, jnp.int32)
    real = lambda x: jnp.asarray(x, jnp.float32)
    return Limits(
        whole(width), whole(levels), whole(window), real(accept), real(split), real(recovery),
        real(decay),
    )  # fmt: skip


def num_words(num_nodes: int) -> int:
    """W, the 32-bit words that hold one bit a node."""
    return -(-num_nodes // 32)


def bit(nodes: Array, words: int) -> Array:
    """u32[..., W] with the bit of each node i32[...] set."""
    word, place = nodes // 32, (nodes % 32).astype(jnp.uint32)
    every = jnp.arange(words, dtype=jnp.int32).reshape(*[1] * nodes.ndim, words)
    return jnp.where(every == word[..., None], jnp.left_shift(jnp.uint32(1), place)[..., None], 0)


def has(bits: Array, node: Array) -> Array:
    """bool[...]: whether sets u32[..., W] hold a node i32[]."""
    word = lax.dynamic_index_in_dim(bits, node // 32, axis=bits.ndim - 1, keepdims=False)
    return (jnp.right_shift(word, (node % 32).astype(jnp.uint32)) & jnp.uint32(1)) != 0


def init_cells(tokens: Array, length: Array, num_cells: int, words: int) -> Cells:
    """The cells after the first `length - 1` of `tokens` i32[P] were read by target and draft."""
    places = jnp.arange(num_cells, dtype=jnp.int32)
    known = places < length - 1
    padded = jnp.zeros((num_cells,), jnp.int32).at[: tokens.shape[0]].set(tokens)
    truth = jnp.zeros((words,), jnp.uint32).at[0].set(TRUTH)
    bits = jnp.where(known[:, None], truth[None], jnp.uint32(0))
    return Cells(padded, jnp.where(known, places, 0), bits, known)


def init_tree(num_nodes: int) -> Tree:
    """A tree without nodes."""
    whole = jnp.zeros((num_nodes,), jnp.int32)
    off = jnp.zeros((num_nodes,), bool)
    bits = jnp.zeros((num_nodes, num_words(num_nodes)), jnp.uint32)
    real = jnp.zeros((num_nodes,), jnp.float32)
    zero = jnp.zeros((), jnp.int32)
    return Tree(zero, whole, whole, whole, whole, bits, real, off, off, whole, real, zero, whole)


def replant(
    tree: Tree, cells: Cells, token: Array, position: Array, busy: Array
) -> tuple[Tree, Cells]:
    """The tree of one right token that no node stood for: everything else dies.

    `busy` bool[N] are slots that packets in flight may still name.
    """
    words = tree.bits.shape[1]
    tree = tree._replace(alive=jnp.zeros_like(tree.alive))
    tree, cells = _free(tree, cells)
    node = _free_nodes(tree.alive | busy, 1)[0]
    cell = _free_cells(cells, 1)[0]
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


class Settled(NamedTuple):
    """What a verdict added to a text.

    Attributes:
      tokens: i32[E] new right tokens, in order.
      logprobs: f32[E].
      size: i32[] how many are meant.
      guessed: i32[] how many of these the draft had made any proposal for.
      right: i32[] how many of these it had proposed.
      places: i32[E] of the proposed ones among the candidates of their depth; -1: not proposed.
    """

    tokens: Array
    logprobs: Array
    size: Array
    guessed: Array
    right: Array
    places: Array


def settle(tree: Tree, cells: Cells, most: int) -> tuple[Tree, Cells, Settled]:
    """Moves the tip along the answers that are known; at most `most` (static) tokens."""
    busy = tree.alive

    def step(carry, _):
        tree, cells = carry
        answer = tree.answers[tree.tip]
        known = tree.alive[tree.tip] & (answer >= 0)
        children = tree.alive & (tree.parents == tree.tip)
        matches = children & (tree.tokens == answer)
        found = matches.any()
        place = jnp.where(known & found, tree.places[jnp.argmax(matches)], -1)
        logprob = tree.logprobs[tree.tip]
        on, on_cells = _move(tree, cells, jnp.argmax(matches))
        anew, anew_cells = replant(tree, cells, answer, tree.positions[tree.tip] + 1, busy)
        pick = lambda a, b, c: jnp.where(known, jnp.where(found, a, b), c)
        carry = jax.tree.map(pick, (on, on_cells), (anew, anew_cells), (tree, cells))
        return carry, (answer, logprob, known, known & children.any(), known & found, place)

    (tree, cells), (tokens, logprobs, known, guessed, right, places) = lax.scan(
        step, (tree, cells), length=most
    )
    total = lambda x: x.sum(dtype=jnp.int32)
    settled = Settled(tokens, logprobs, total(known), total(guessed), total(right), places)
    return tree, cells, settled


def _move(tree: Tree, cells: Cells, node: Array) -> tuple[Tree, Cells]:
    """The tip goes on to one of its children; only the child's subtree lives."""
    truth = bit(jnp.zeros((), jnp.int32), tree.bits.shape[1])
    tree = tree._replace(tip=node, alive=tree.alive & has(tree.bits, node))
    cell = tree.cells[node]
    cells = cells._replace(bits=cells.bits.at[cell].set(cells.bits[cell] | truth))
    return _free(tree, cells)


def _free(tree: Tree, cells: Cells) -> tuple[Tree, Cells]:
    """Bits of dead nodes vanish: their slots can be used again, and their cells are free. Committed
    cells keep the truth's bit."""
    words = tree.bits.shape[1]
    nodes = jnp.arange(tree.alive.shape[0], dtype=jnp.int32)
    keep = jnp.where(tree.alive[:, None], bit(nodes, words), jnp.uint32(0))
    keep = lax.reduce(keep, jnp.uint32(0), lax.bitwise_or, (0,))
    keep = (keep | bit(jnp.zeros((), jnp.int32), words))[None]
    return tree._replace(bits=tree.bits & keep), cells._replace(bits=cells.bits & keep)


def kill(tree: Tree, cells: Cells) -> tuple[Tree, Cells]:
    """All nodes die: the text is done."""
    tree = tree._replace(alive=jnp.zeros_like(tree.alive))
    return _free(tree, cells)


def _first(mask: Array, count: int, otherwise: int) -> Array:
    """i32[count], the first places where `mask` is true."""
    return jnp.nonzero(mask, size=count, fill_value=otherwise)[0].astype(jnp.int32)


def _free_nodes(busy: Array, count: int) -> Array:
    return _first((~busy).at[NONE].set(False), count, NONE)


def _free_cells(cells: Cells, count: int) -> Array:
    return _first(_empty(cells), count, cells.positions.shape[0])


def _empty(cells: Cells) -> Array:
    """bool[C]; the last cell takes what is to be written nowhere (`pipeline.put_rows`)."""
    return (cells.bits == 0).all(1).at[-1].set(False)


def mark_read(tree: Tree, cells: Cells, ask: Ask, reads: Array) -> Cells:
    """What the draft was asked about has been read, where `reads` bool[] says it read at all."""
    none = cells.positions.shape[0]
    read = cells.read.at[jnp.where(reads, ask.late, none)].set(True, mode="drop")
    tips = jnp.where(reads & ~ask.behind & (ask.tips != NONE), tree.cells[ask.tips], none)
    return cells._replace(read=read.at[tips].set(True, mode="drop"))


def insert(
    tree: Tree,
    cells: Cells,
    ask: Ask,
    proposals: Proposals,
    reads: Array,
    limits: Limits,
    in_flight: Array,
    end: Array,
) -> tuple[Tree, Cells]:
    """The proposals that the draft was asked for last tick become nodes.

    Args:
      tree, cells: of the text that was asked about.
      ask: of the last tick.
      proposals: the answer.
      reads: bool[] whether the draft read its own levels but the last.
      limits: cut-offs.
      in_flight: i32[] packets of the text, for `Limits.recovery`.
      end: i32[] position from which on nothing is proposed.
    """
    words = tree.bits.shape[1]
    levels, width = proposals.tokens.shape
    shift = in_flight.astype(jnp.float32) * limits.recovery
    shift -= tree.misses.astype(jnp.float32) * limits.decay
    above, above_ok = ask.tips, tree.alive[ask.tips] & (ask.tips != NONE)
    born = jnp.zeros((), jnp.int32)
    for level in range(levels):
        slots, to = ask.slots[level], ask.cells[level]
        index = proposals.parents[level]
        parents, logprobs = above[index], proposals.logprobs[level]
        same = (index[:, None] == index[None]) & proposals.valid[level][None]
        earlier = (same & (jnp.arange(width)[None] < jnp.arange(width)[:, None])).any(1)
        least = jnp.where(earlier, limits.split, limits.accept) + shift
        ok = proposals.valid[level] & above_ok[index] & ask.wanted & (slots != NONE)
        ok &= (jnp.exp(logprobs) >= least) & (level < limits.levels)
        positions = tree.positions[parents] + 1
        ok &= (jnp.arange(width) < limits.width) & (positions < end)
        at = jnp.where(ok, slots, tree.alive.shape[0])
        cell = jnp.where(ok, to, cells.positions.shape[0])
        put = lambda field, value, at=at: field.at[at].set(value, mode="drop")
        bits = tree.bits[parents] | bit(slots, words)
        tree = tree._replace(
            tokens=put(tree.tokens, proposals.tokens[level]),
            positions=put(tree.positions, positions),
            cells=put(tree.cells, to),
            parents=put(tree.parents, parents),
            bits=put(tree.bits, bits),
            scores=put(tree.scores, tree.scores[parents] + logprobs),
            alive=put(tree.alive, True),
            launched=put(tree.launched, False),
            answers=put(tree.answers, -1),
            places=put(tree.places, jnp.arange(width, dtype=jnp.int32)),
        )
        read = jnp.broadcast_to(reads & (level < levels - 1), (width,))
        cells = Cells(
            put(cells.tokens, proposals.tokens[level], cell),
            put(cells.positions, positions, cell),
            put(cells.bits, bit(slots, words), cell),
            put(cells.read, read, cell),
        )
        above, above_ok = slots, ok
        born += ok.sum(dtype=jnp.int32)
    missed = ask.wanted & (born == 0)
    return tree._replace(misses=jnp.where(missed, tree.misses + 1, 0)), cells


def waiting(tree: Tree) -> Array:
    """bool[N]: nodes that no packet holds yet."""
    return tree.alive & ~tree.launched


def launch(tree: Tree, size: int) -> tuple[Tree, Array]:
    """Up to `size` waiting nodes, parents first: i32[size], NONE where there are fewer."""
    free = waiting(tree)
    late = jnp.iinfo(jnp.int32).max
    order = jnp.argsort(jnp.where(free, tree.positions, late), stable=True)
    order = jnp.resize(order, (size,)) if order.shape[0] < size else order[:size]
    nodes = jnp.where(free[order], order, NONE).astype(jnp.int32)
    launched = tree.launched.at[jnp.where(nodes != NONE, nodes, tree.launched.shape[0])].set(
        True, mode="drop"
    )
    return tree._replace(launched=launched), nodes


def could_ask(
    tree: Tree, cells: Cells, limits: Limits, in_flight: Array, end: Array, new: int
) -> Array:
    """bool[]: whether the draft may go on with a text.

    Args:
      in_flight: i32[] packets of the text.
      end: i32[] position at which the text ends: nothing is proposed there.
      new: nodes that an answer may hold.
    """
    deepest = jnp.where(tree.alive, tree.positions, -1).max()
    room = (~tree.alive).sum() - 1 >= new + 1  # a correction needs one, too
    room &= _empty(cells).sum() >= new + 1
    idle = ~waiting(tree).any() & (in_flight < limits.window)
    return tree.alive.any() & idle & room & (limits.width > 0) & (deepest + 1 < end)


def ask(tree: Tree, cells: Cells, request: Array, wanted: Array, levels: int, width: int) -> Ask:
    """Asks for what follows the most probable of the deepest nodes.

    The nodes and cells of the answer are the first free ones; `insert` comes before anything that
    could give them away.
    """
    deepest = jnp.where(tree.alive, tree.positions, -1).max()
    here = tree.alive & (tree.positions == deepest)
    best, tips = lax.top_k(jnp.where(here, tree.scores, -jnp.inf), width)
    tips = jnp.where(best > -jnp.inf, tips, NONE).astype(jnp.int32)
    slots, to = _free_nodes(tree.alive, levels * width), _free_cells(cells, levels * width)
    shape = (levels, width)
    late = _unread(tree, cells, tips)
    return Ask(wanted, request, tips, slots.reshape(shape), to.reshape(shape), *late)


def _unread(tree: Tree, cells: Cells, tips: Array) -> tuple[Array, Array, Array]:
    """Cells that the best tip sees and the draft has not read: the first ones, what these see, and
    whether there are more."""
    none, words = cells.positions.shape[0], tree.bits.shape[1]
    seen = ((cells.bits & tree.bits[tips[0]][None]) != 0).any(1)
    missing = seen & ~cells.read & (cells.positions < tree.positions[tips[0]])
    latest = jnp.iinfo(jnp.int32).max
    key, place = lax.top_k(-jnp.where(missing, cells.positions, latest), LATE)
    late = jnp.where(key > -latest, place, none).astype(jnp.int32)
    owned = tree.alive[None] & (tree.cells[None] == late[:, None])
    truth = bit(jnp.zeros((), jnp.int32), words)
    bits = jnp.where(owned.any(1)[:, None], tree.bits[jnp.argmax(owned, axis=1)], truth[None])
    return late, bits, missing.sum() > LATE
