"""What the pipe holds between two ticks, and what its devices tell each other.

Everything is replicated except keys and values, the draft's own state and the hidden states: every
device makes the same decisions from the same answers (`jaxfm.parallel.pipe.tick`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm.model import Array, PyTree
from jaxfm.parallel.drafting import Ask, Proposals
from jaxfm.parallel.pipe.pipeline import STAGE, Cut
from jaxfm.parallel.pipe.scheduler import LATE, Limits, Packet
from jaxfm.parallel.rows import Rows
from jaxfm.parallel.token_tree import NONE, Cells, Tree, num_words

IDLE, LIVE, CANCELLED, PREFILL, DRAFTED = range(5)  # what a stage, or the draft, did in a tick


class Counters(NamedTuple):
    """What happened since the start; ticks of prefill are counted in `prefill` only.

    Attributes:
      ticks: i32[].
      prefill: i32[] ticks that reading the prompts took.
      executed: i32[S] ticks in which each stage computed, counted by the stage itself.
      cancelled: i32[S] ticks in which a stage passed by a packet that had been cancelled.
      launched: i32[2] packets, and tokens in them.
      drafted: i32[] ticks in which the draft computed, counted by its device.
      corrections: i32[B] times that no proposal foresaw the answer.
      places: i32[w] right tokens that were the draft's first candidate, second, ...
      wide: i32[] ticks in which a stage read more than one token.
      in_flight: i32[] packets in the pipe, summed over ticks.
      timeline: u8[R, S + 1] what each stage did in each of the first R ticks; the last column is
        the draft's.
    """

    ticks: Array
    prefill: Array
    executed: Array
    cancelled: Array
    launched: Array
    drafted: Array
    corrections: Array
    places: Array
    wide: Array
    in_flight: Array
    timeline: Array


class State(NamedTuple):
    """Everything that the pipe holds between two ticks.

    Attributes:
      rows: keys and values; leaves [slots * L, G, B * C, K], or [slots * G, B * C, K] of a layer.
      draft: the drafter's state, with a leading axis of slots.
      hidden: [slots, K, D] what each slot has received.
      trees, cells: of each text, with a leading axis B.
      pipe: the packets in the S stages.
      sizes: i32[S] tokens that each packet had when it was launched.
      sent: i32[n] the last tick's message of the last stage and the draft.
      asked: what the draft was asked in that tick.
      counters: counts.
    """

    rows: Rows
    draft: PyTree
    hidden: Array
    trees: Tree
    cells: Cells
    pipe: Packet
    sizes: Array
    sent: Array
    asked: Ask
    counters: Counters


class Shape(NamedTuple):
    """The static side of an engine; hashable.

    Attributes:
      stages: S.
      own_slot: 1 where the draft has a slot of its own, before the first stage; else 0.
      width, levels: most candidates at a depth, and most levels drafted a tick.
      nodes: N of each tree.
      record: ticks of the timeline that are kept.
    """

    stages: int
    own_slot: int
    width: int
    levels: int
    nodes: int
    record: int

    @property
    def packet(self) -> int:
        """K, tokens of a packet."""
        return self.width * self.levels


class Arrays(NamedTuple):
    """What the programs of an engine read.

    Attributes:
      cut: the target.
      draft: the drafter's variables.
      limits: how eagerly to speculate.
    """

    cut: Cut
    draft: PyTree
    limits: Limits


class Message(NamedTuple):
    """What travels to all devices in a tick: one vector of integers, by one sum.

    Attributes:
      answers: i32[K] the target's tokens after the nodes of the packet that leaves the pipe.
      logprobs: f32[K] of these.
      proposals: the draft's.
      reads: bool[] whether the draft read what it was asked about.
      executed: i32[S] 1 for each stage that computed.
      drafted: i32[] 1 if the draft computed.
    """

    answers: Array
    logprobs: Array
    proposals: Proposals
    reads: Array
    executed: Array
    drafted: Array

    @staticmethod
    def like(shape: Shape) -> Message:
        """A message of zeros."""
        places = (shape.levels, shape.width)
        proposals = Proposals(
            tokens=jnp.zeros(places, jnp.int32),
            parents=jnp.zeros(places, jnp.int32),
            logprobs=jnp.zeros(places),
            valid=jnp.zeros(places, bool),
        )
        return Message(
            answers=jnp.zeros((shape.packet,), jnp.int32),
            logprobs=jnp.zeros((shape.packet,)),
            proposals=proposals,
            reads=jnp.zeros((), bool),
            executed=jnp.zeros((shape.stages,), jnp.int32),
            drafted=jnp.zeros((), jnp.int32),
        )

    @staticmethod
    def size(shape: Shape) -> int:
        """n, the integers of a message."""
        return sum(x.size for x in jax.tree.leaves(Message.like(shape)))

    def pack(self) -> Array:
        """i32[n]; each value comes from one device only, so that bits survive the sum."""
        as_int = lambda x: (
            lax.bitcast_convert_type(x, jnp.int32)
            if x.dtype == jnp.float32
            else x.astype(jnp.int32)
        )
        return jnp.concatenate([as_int(x).reshape(-1) for x in jax.tree.leaves(self)])

    @staticmethod
    def unpack(flat: Array, shape: Shape) -> Message:
        """The inverse of `pack`."""
        leaves, form = jax.tree.flatten(Message.like(shape))
        ends = np.cumsum([leaf.size for leaf in leaves])
        parts = jnp.split(flat, ends[:-1])
        back = lambda x, like: (
            lax.bitcast_convert_type(x, jnp.float32)
            if like.dtype == jnp.float32
            else x.astype(like.dtype)
        ).reshape(like.shape)
        return jax.tree.unflatten(form, [back(x, like) for x, like in zip(parts, leaves)])


def init_ask(shape: Shape, num_cells: int) -> Ask:
    """What the draft was asked before the first tick: nothing."""
    whole = lambda *dims: jnp.zeros(dims, jnp.int32)
    places = (shape.levels, shape.width)
    return Ask(
        wanted=jnp.zeros((), bool),
        request=whole(),
        tips=whole(shape.width),
        slots=whole(*places),
        cells=whole(*places),
        late=jnp.full((LATE,), num_cells, jnp.int32),
        late_bits=jnp.zeros((LATE, num_words(shape.nodes)), jnp.uint32),
        behind=jnp.zeros((), bool),
    )


def init_counters(shape: Shape, batch: int, prefill: Array) -> Counters:
    """The counts before the first tick; `prefill` i32[] ticks were needed to read the prompts."""
    whole = lambda *dims: jnp.zeros(dims, jnp.int32)
    return Counters(
        ticks=whole(),
        prefill=prefill,
        executed=whole(shape.stages),
        cancelled=whole(shape.stages),
        launched=whole(2),
        drafted=whole(),
        corrections=whole(batch),
        places=whole(shape.width),
        wide=whole(),
        in_flight=whole(),
        timeline=jnp.zeros((shape.record, shape.stages + 1), jnp.uint8),
    )


def stage_of(shape: Shape) -> Array:
    """i32[] the stage of this device; -1: it only drafts."""
    return lax.axis_index(STAGE) - shape.own_slot


def pass_on(x: Array, shape: Shape) -> Array:
    """What each stage receives from the one before it: one collective, outside of all branches."""
    first, last = shape.own_slot, shape.own_slot + shape.stages - 1
    return lax.ppermute(x, STAGE, [(i, i + 1) for i in range(first, last)])


def take(tree: PyTree, i: Array) -> PyTree:
    """Row `i` of every leaf."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def put(tree: PyTree, i: Array, value: PyTree) -> PyTree:
    """`tree` with row `i` of every leaf replaced."""
    return jax.tree.map(lambda x, y: x.at[i].set(y), tree, value)


def in_flight(pipe: Packet, batch: int) -> Array:
    """i32[B] number of live packets of each text in the pipe."""
    live = (pipe.nodes != NONE).any(1)
    return jnp.zeros((batch,), jnp.int32).at[pipe.request].add(live.astype(jnp.int32))
