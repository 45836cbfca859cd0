"""What the pipe works on next: continuous speculation as pure functions on small arrays.

Every text has a tree of proposed tokens (`jaxfm.parallel.token_tree`). Its nodes travel through the
pipe in packets, which takes S ticks; what returns is the target's own token after each node. A tick
does this, in this order:

    insert    what the draft proposed in the last tick becomes nodes below those it was asked about
    settle    answers come back: the tip moves to the child that was right, and its siblings'
              subtrees die; if no child was right, the right token replaces the tree (a correction)
    launch    nodes that no packet holds yet are put into the pipe
    ask       the draft is asked what follows the deepest nodes

A node that dies is taken out of the packets in flight at once. So a packet without nodes computes
nothing, and its cache cells can be given to others.

All functions work on one text (no batch axis); callers `vmap` or index them.
Source: PipeInfer (arXiv 2407.11798), sections on continuous speculation and early cancellation;
differences are named in `jaxfm.parallel.pipe.pipeinfer`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxfm.model import Array
from jaxfm.parallel.drafting import Ask, Proposals
from jaxfm.parallel.token_tree import (
    NONE,
    Cells,
    Tree,
    bit,
    descend,
    free_cells,
    free_nodes,
    is_free,
    replant,
)

LATE = 4  # cells that a drafting model reads a tick beside the nodes it is asked about


class Limits(NamedTuple):
    """How eagerly to speculate; arrays, so that a policy can change them without a compilation.

    Attributes:
      width: i32[] candidates alive at each depth; 0 switches speculation off.
      levels: i32[] tokens of a path that are drafted a tick.
      window: i32[] most packets of one text in flight.
      accept: f32[] least probability of a proposed token.
      branch: f32[] least probability of a second or later candidate.
      recovery: f32[] added to both cut-offs for each packet in flight.
      decay: f32[] taken from both for each time in a row that nothing was proposed.
    """

    width: Array
    levels: Array
    window: Array
    accept: Array
    branch: Array
    recovery: Array
    decay: Array


class Packet(NamedTuple):
    """Nodes that go through the stages of a pipe together.

    Attributes:
      request: i32[...] text they belong to.
      nodes: i32[..., K]; NONE: an empty place.
    """

    request: Array
    nodes: Array


def limits(
    *, width: int = 1, levels: int = 1, window: int = 1 << 30, accept: float = 0.0,
    branch: float = 0.0, recovery: float = 0.0, decay: float = 0.0,
) -> Limits:  # fmt: skip
    """The `Limits` of plain numbers; the defaults do not restrain speculation.

    Args:
      width: candidates alive at each depth; 0 switches speculation off.
      levels: tokens of a path that are drafted a tick.
      window: most packets of one text in flight.
      accept: least probability of a proposed token.
      branch: least probability of a second or later candidate.
      recovery: added to both cut-offs for each packet in flight.
      decay: taken from both cut-offs for each time in a row that nothing was proposed.
    Raises:
      ValueError: a number is out of range; with a window of 0 nothing would ever be decoded.
    """
    for name, value, least in (("width", width, 0), ("levels", levels, 1), ("window", window, 1)):
        if value < least:
            raise ValueError(f"{name}={value}: give at least {least}.")
    shares = {"accept": accept, "branch": branch, "recovery": recovery, "decay": decay}
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name}={share}: give a probability from 0 to 1.")
    whole = lambda x: jnp.asarray(x, jnp.int32)
    real = lambda x: jnp.asarray(x, jnp.float32)
    return Limits(
        width=whole(width),
        levels=whole(levels),
        window=whole(window),
        accept=real(accept),
        branch=real(branch),
        recovery=real(recovery),
        decay=real(decay),
    )


class NewTokens(NamedTuple):
    """The tokens of a text that became known in a tick.

    Attributes:
      tokens: i32[E] new right tokens, in order.
      logprobs: f32[E] of these, by the target.
      size: i32[] how many of the E are meant.
      guessed: i32[] how many of these the draft had made any proposal for.
      right: i32[] how many of these it had proposed.
      places: i32[E] place of each among the candidates of its depth; -1: it was not proposed.
    """

    tokens: Array
    logprobs: Array
    size: Array
    guessed: Array
    right: Array
    places: Array


def settle(tree: Tree, cells: Cells, most: int) -> tuple[Tree, Cells, NewTokens]:
    """Moves the tip along the answers that are known, by at most `most` (static) tokens."""
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
        on, on_cells = descend(tree, cells, jnp.argmax(matches))
        anew, anew_cells = replant(tree, cells, answer, tree.positions[tree.tip] + 1, busy)
        pick = lambda a, b, c: jnp.where(known, jnp.where(found, a, b), c)
        carry = jax.tree.map(pick, (on, on_cells), (anew, anew_cells), (tree, cells))
        return carry, (answer, logprob, known, known & children.any(), known & found, place)

    (tree, cells), (tokens, logprobs, known, guessed, right, places) = lax.scan(
        step, (tree, cells), length=most
    )
    total = lambda x: x.sum(dtype=jnp.int32)
    new = NewTokens(
        tokens=tokens,
        logprobs=logprobs,
        size=total(known),
        guessed=total(guessed),
        right=total(right),
        places=places,
    )
    return tree, cells, new


def mark_read(tree: Tree, cells: Cells, ask: Ask, reads: Array) -> Cells:
    """The cells, with those that the draft was asked about marked as read if it `reads` bool[]."""
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
    """The tree with the proposals that the draft was asked for in the last tick as nodes.

    Args:
      tree, cells: of the text that was asked about.
      ask: of the last tick.
      proposals: the answer.
      reads: bool[] whether the draft has read all its own levels except the last.
      limits: cut-offs.
      in_flight: i32[] packets of the text, for `Limits.recovery`.
      end: i32[] first position for which nothing is proposed.
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
        least = jnp.where(earlier, limits.branch, limits.accept) + shift
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
    """bool[N]: which live nodes no packet holds yet."""
    return tree.alive & ~tree.launched


def launch(tree: Tree, size: int) -> tuple[Tree, Array]:
    """Takes up to `size` waiting nodes, parents first: i32[size], NONE where there are fewer."""
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
    """bool[]: whether the draft may be asked about a text.

    Args:
      in_flight: i32[] packets of the text.
      end: i32[] position at which the text ends; nothing is proposed there.
      new: nodes that an answer may hold.
    """
    deepest = jnp.where(tree.alive, tree.positions, -1).max()
    room = (~tree.alive).sum() - 1 >= new + 1  # a correction needs one as well
    room &= is_free(cells).sum() >= new + 1
    idle = ~waiting(tree).any() & (in_flight < limits.window)
    return tree.alive.any() & idle & room & (limits.width > 0) & (deepest + 1 < end)


def ask(tree: Tree, cells: Cells, request: Array, wanted: Array, levels: int, width: int) -> Ask:
    """The question what follows the most probable of the deepest nodes.

    The nodes and cells of the answer are the first free ones; `insert` runs before anything that
    could give them to others.
    """
    deepest = jnp.where(tree.alive, tree.positions, -1).max()
    here = tree.alive & (tree.positions == deepest)
    best, tips = lax.top_k(jnp.where(here, tree.scores, -jnp.inf), width)
    tips = jnp.where(best > -jnp.inf, tips, NONE).astype(jnp.int32)
    slots, to = free_nodes(tree.alive, levels * width), free_cells(cells, levels * width)
    shape = (levels, width)
    late, late_bits, behind = _unread(tree, cells, tips)
    return Ask(
        wanted=wanted,
        request=request,
        tips=tips,
        slots=slots.reshape(shape),
        cells=to.reshape(shape),
        late=late,
        late_bits=late_bits,
        behind=behind,
    )


def _unread(tree: Tree, cells: Cells, tips: Array) -> tuple[Array, Array, Array]:
    """The first cells that the best tip sees and the draft has not read.

    Returns:
      i32[M] cells, u32[M, W] what these see, and bool[] whether there are more.
    """
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
