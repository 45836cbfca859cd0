"""PipeInfer on a device mesh: continuous asynchronous speculation with early cancellation.

The target is cut by layers over the mesh axis "stage"; a tick moves every packet of proposed tokens
on by one stage. A token launched in one tick is answered S ticks later, and the pipe does not wait:
the draft proposes on, below what is still in flight. When an answer contradicts a proposal, all
that hangs below it is cancelled everywhere in the next tick, and what agrees with the answer lives
on. With a draft that answers within a tick and is right with probability a, a token takes

    (1 - a) S + a    ticks, where plain decoding through the same pipe takes S.

One program runs on all devices (`jax.shard_map`). Its control state is replicated: each device
makes the same decisions from the same answers, so nothing but one stage's hidden states
(`ppermute`) and a few integers (`psum`) is sent in a tick, and no collective stands inside a
branch.

Beside the published algorithm: the newest right token is launched on its own only where no packet
holds it already; cancelling is by token, not by packet; trees stay alive across a correction that
one of their branches foresaw; several texts share the pipe, the first one first; texts are sampled
without loss and do not depend on how they were scheduled (`jaxfm.parallel.draft`).
Source: PipeInfer (arXiv 2407.11798); trees in the pipe as in PipeDec (arXiv 2504.04104).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxfm.model import Array, Model, PyTree, Variables, layers_of, num_layers
from jaxfm.parallel import sampling as sample
from jaxfm.parallel import scheduler
from jaxfm.parallel.cache import Block, Network, init_cache, network, through
from jaxfm.parallel.decode import Decoder, Program, vocab_size
from jaxfm.parallel.draft import Functions, Question, Source
from jaxfm.parallel.mesh import make_mesh
from jaxfm.parallel.pipeline import (
    STAGE,
    Cut,
    Rows,
    assemble,
    cut,
    even_split,
    flat_rows,
    local,
    past_of,
    put_rows,
    skipping,
)
from jaxfm.parallel.sampling import Sampling
from jaxfm.parallel.scheduler import NONE, Ask, Cells, Limits, Packet, Proposals, Tree
from jaxfm.parallel.verify import Rules, Stats, Text, append

IDLE, LIVE, CANCELLED, PREFILL, DRAFTED = range(5)  # what a stage, or the draft, did in a tick


class Counters(NamedTuple):
    """What happened since the start; ticks of prefill are in `prefill` alone.

    Attributes:
      ticks: i32[].
      prefill: i32[] ticks that reading the prompts took.
      executed: i32[S] ticks in which each stage computed, counted where it does.
      cancelled: i32[S] ticks in which a stage passed by a packet that had been cancelled.
      launched: i32[2] packets, and tokens in them.
      drafted: i32[] ticks in which the draft computed, counted where it does.
      corrections: i32[B] times that no proposal foresaw the answer.
      in_flight: i32[] packets in the pipe, summed over ticks.
      timeline: u8[R, S + 1] what each stage did in each of the first R ticks; last, the draft.
    """

    ticks: Array
    prefill: Array
    executed: Array
    cancelled: Array
    launched: Array
    drafted: Array
    corrections: Array
    in_flight: Array
    timeline: Array


class State(NamedTuple):
    """Everything between two ticks.

    Attributes:
      rows: keys and values; leaves [slots * L, B * C, G, K].
      draft: the source's state, with a leading axis of slots.
      hidden: [slots, K, D] what each slot has received.
      trees, cells: of each text, with a leading axis B.
      pipe: the packets in the S stages.
      sizes: i32[S] tokens that each packet had when it was launched.
      sent: i32[n] what the last stage and the draft said in the last tick.
      asked: what the draft was asked then.
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
      draft: the source's variables.
      limits: how eagerly to speculate.
    """

    cut: Cut
    draft: PyTree
    limits: Limits


def pipeinfer(
    model: Model,
    variables: Variables,
    source: Source | None,
    *,
    mesh: Mesh | None = None,
    split: Sequence[int] | None = None,
    width: int = 1,
    levels: int = 1,
    own_slot: bool = False,
    limits: Limits | None = None,
    record: int = 0,
) -> Decoder:
    """The decoder that speculates continuously through a pipe of stages.

    Args:
      model, variables: the target; its layers must be of equal shape.
      source: where proposals come from (`jaxfm.parallel.draft`); None: plain pipelined decoding.
      mesh: its axis "stage" has one slot a stage (and one more with `own_slot`); None: all on one
        device.
      split: layers of each stage; None: as even as they come.
      width: candidates kept alive at each depth; 1 is a chain, more a tree.
      levels: tokens of a path drafted a tick; more than 1 pays where a packet of several tokens
        costs little more than one.
      own_slot: give the first slot of the mesh to the draft alone. Otherwise it shares the first
        stage's device.
      limits: of `jaxfm.parallel.scheduler.limits`; None: all of width and levels, a window that
        fills the pipe.
      record: ticks whose timeline is kept (`Counters.timeline`).
    Raises:
      ValueError: a setting out of range, a split that fits neither model nor mesh, or a draft with
        another number of tokens.
    """
    for name, value in (("width", width), ("levels", levels)):
        if value < 1:
            raise ValueError(f"{name}={value}: give at least 1.")
    if record < 0:
        raise ValueError(f"record={record}: give the number of ticks to keep, or 0.")
    mesh = make_mesh() if mesh is None else mesh
    stages = mesh.shape[STAGE] - own_slot
    if stages < 1:
        raise ValueError(
            f"Mesh axis {STAGE!r} has {mesh.shape[STAGE]} slots; own_slot=True needs at least 2."
        )
    layers = num_layers(layers_of(variables))
    split = even_split(layers, stages) if split is None else tuple(split)
    if len(split) != stages or min(split) < 1:
        raise ValueError(f"split={split}: give 1 or more layers for each of {stages} stages.")
    tokens = vocab_size(model, variables)
    if source is not None and source.vocab_size not in (None, tokens):
        raise ValueError(
            f"The target has {tokens} tokens and the draft {source.vocab_size}; both need the same "
            "vocabulary."
        )
    if limits is None:
        limits = scheduler.limits(width=width if source else 0, levels=levels)
    # Everything in flight, one more packet's worth in the draft's hands, and a correction.
    nodes = 32 * scheduler.num_words((stages + 2) * width * levels + 2)
    shape = Shape(stages, int(own_slot), width, levels, nodes, record)
    functions = source.functions if source else _NO_FUNCTIONS
    program = _program(network(model), functions, mesh, shape)
    everywhere = NamedSharding(mesh, PartitionSpec())
    drafts, limits = jax.device_put((source.variables if source else None, limits), everywhere)
    arrays = Arrays(cut(variables, (0,) * shape.own_slot + split, mesh), drafts, limits)
    learned = getattr(model.config, "positions", None) == "learned"
    return Decoder(program, arrays, 1, tokens, model.config.max_len if learned else None, mesh)


def pipelined(
    model: Model, variables: Variables, *, mesh: Mesh | None = None, split=None, record: int = 0
) -> Decoder:
    """Plain decoding through a pipe of stages: one token of each text in S ticks."""
    return pipeinfer(model, variables, None, mesh=mesh, split=split, record=record)


def _nothing(variables, state, question, levels: int, width: int):
    raise AssertionError("No draft was given, so none is asked.")


_NO_FUNCTIONS = Functions(lambda variables, tokens, length, cells, chunk: (), _nothing)


@functools.cache
def _program(target: Network, source: Functions, mesh: Mesh, shape: Shape) -> Program:
    """Cached, so that the same parts give equal programs."""
    net = skipping(target)
    everywhere = PartitionSpec()
    spec: Any = PartitionSpec  # stands where arrays will
    arrays_spec = Arrays(Cut(spec(), spec(STAGE)), spec(), spec())
    state_spec = State(*[spec()] * len(State._fields))
    state_spec = state_spec._replace(rows=spec(STAGE), draft=spec(STAGE), hidden=spec(STAGE))
    sharded = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)

    def start(arrays: Arrays, tokens: Array, length: Array, cells: int, chunk: int | None) -> State:
        body = lambda arrays, tokens, length: _start(
            net, source, shape, arrays, tokens, length, cells, chunk
        )
        specs = (arrays_spec, everywhere, everywhere)
        return sharded(body, in_specs=specs, out_specs=state_spec)(arrays, tokens, length)

    def tick(arrays: Arrays, state: State, text: Text, rules: Rules) -> tuple[State, Text]:
        body = functools.partial(_tick, net, source, shape)
        specs = (arrays_spec, state_spec, everywhere, everywhere)
        return sharded(body, in_specs=specs, out_specs=(state_spec, everywhere))(
            arrays, state, text, rules
        )

    return Program(start, tick, lambda state: state.counters)


def _stage(shape: Shape) -> Array:
    """i32[] the stage of this device; -1: it only drafts."""
    return lax.axis_index(STAGE) - shape.own_slot


def _pass_on(x: Array, shape: Shape) -> Array:
    """What each stage receives from the one before; one collective, outside of all branches."""
    first, last = shape.own_slot, shape.own_slot + shape.stages - 1
    return lax.ppermute(x, STAGE, [(i, i + 1) for i in range(first, last)])


def _at(tree: PyTree, i: Array) -> PyTree:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _put(tree: PyTree, i: Array, value: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: x.at[i].set(y), tree, value)


def _start(
    net: Network, source: Functions, shape: Shape, arrays: Arrays, tokens: Array, length: Array,
    num_cells: int, chunk: int | None,
) -> State:  # fmt: skip
    """The state after the prompts were read, all but their newest tokens."""
    batch, wide = tokens.shape
    words = scheduler.num_words(shape.nodes)
    num_cells += shape.nodes  # text and tree; one of them is the last, which stays empty
    variables = assemble(arrays.cut)
    empty = flat_rows(init_cache(net, variables, batch, num_cells))
    cells = jax.vmap(lambda t, n: scheduler.init_cells(t, n, num_cells, words))(tokens, length)
    rows, ticks = _prefill(net, shape, variables, empty, cells, tokens, length, chunk or wide)

    newest = jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)[:, 0]
    trees = jax.vmap(lambda _: scheduler.init_tree(shape.nodes))(jnp.arange(batch))
    trees, cells = jax.vmap(scheduler.replant)(trees, cells, newest, length - 1, trees.alive)

    draft_chunk = chunk if chunk is not None and wide % chunk == 0 else None
    begin = lambda: source.start(arrays.draft, tokens, length, num_cells, draft_chunk)
    blank = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(begin))
    draft = lax.switch((lax.axis_index(STAGE) == 0).astype(jnp.int32), [blank, begin])

    one = jax.ShapeDtypeStruct((1, shape.packet), jnp.int32)
    x = jax.eval_shape(lambda t: net.stages.embed(variables, t, t), one)
    zeros = lambda *dims: jnp.zeros(dims, jnp.int32)
    places = (shape.levels, shape.width)
    late = jnp.full((scheduler.LATE,), num_cells, jnp.int32)
    asked = Ask(
        jnp.zeros((), bool), zeros(), zeros(shape.width), zeros(*places), zeros(*places), late,
        jnp.zeros((scheduler.LATE, words), jnp.uint32), jnp.zeros((), bool),
    )  # fmt: skip
    counters = Counters(
        zeros(), ticks, zeros(shape.stages), zeros(shape.stages), zeros(2), zeros(), zeros(batch),
        zeros(), jnp.zeros((shape.record, shape.stages + 1), jnp.uint8),
    )  # fmt: skip
    lead = lambda tree: jax.tree.map(lambda x: x[None], tree)
    return State(
        rows=rows,
        draft=lead(draft),
        hidden=jnp.zeros((1, *x.shape[1:]), x.dtype),
        trees=trees,
        cells=cells,
        pipe=Packet(zeros(shape.stages), zeros(shape.stages, shape.packet)),
        sizes=zeros(shape.stages),
        sent=zeros(_Sent.size(shape)),
        asked=asked,
        counters=counters,
    )


def _prefill(
    net: Network, shape: Shape, variables: Variables, rows: Rows, cells: Cells, tokens: Array,
    length: Array, chunk: int,
) -> tuple[Rows, Array]:  # fmt: skip
    """Reads the prompts in chunks, one after the other through the pipe.

    Returns:
      The stage's rows, and how many ticks it took: chunks + S - 1.
    """
    batch, wide = tokens.shape
    chunks = -(-wide // chunk)
    tokens = jnp.pad(tokens, ((0, 0), (0, chunks * chunk - wide)))
    ticks, stage, none = batch * chunks + shape.stages - 1, _stage(shape), cells.positions.shape[1]

    def tick(i, carry):
        rows, x = carry
        number = i - stage
        request = jnp.clip(number // chunks, 0, batch - 1)
        first = (number % chunks) * chunk
        places = first + jnp.arange(chunk, dtype=jnp.int32)
        meant = (places < length[request] - 1) & (number >= 0) & (number < batch * chunks)
        meant &= stage >= 0
        own = _at(cells, request)
        # Later tokens are not there yet; earlier ones are all in the cache.
        before = own._replace(bits=jnp.where((own.positions < first)[:, None], own.bits, 0))
        truth = scheduler.bit(jnp.zeros((), jnp.int32), own.bits.shape[1])
        block = Block(
            lax.dynamic_slice(tokens, (request, first), (1, chunk)),
            jnp.where(meant, places, 0)[None],
            jnp.where(meant, places, none)[None],
            jnp.where(meant[:, None], truth[None], 0)[None],
        )

        def run(x, rows):
            embedded = net.stages.embed(variables, block.tokens, block.positions)
            x = jnp.where(stage == 0, embedded, x)
            return through(net, variables, x, past_of(rows, request, before, block), block)

        like = jax.eval_shape(run, x, rows)[1]
        by = lambda x, rows: (x, jax.tree.map(lambda r: jnp.zeros(r.shape, r.dtype), like))
        x, new = lax.switch(meant.any().astype(jnp.int32), [by, run], x, rows)
        written = meant[None] & jnp.isfinite(x).all(-1)
        return put_rows(rows, request, own, block, new, written), _pass_on(x, shape)

    one = jax.ShapeDtypeStruct((1, chunk), jnp.int32)
    x = jax.eval_shape(lambda t: net.stages.embed(variables, t, t), one)
    rows, _ = lax.fori_loop(0, ticks, tick, (rows, jnp.zeros(x.shape, x.dtype)))
    return rows, jnp.asarray(ticks, jnp.int32)


class _Sent(NamedTuple):
    """What travels to all devices in a tick; one vector of integers, one sum."""

    answers: Array  # i32[K]
    logprobs: Array  # f32[K]
    proposals: Proposals
    reads: Array  # bool[]
    executed: Array  # i32[S]
    drafted: Array  # i32[]

    @staticmethod
    def like(shape: Shape) -> _Sent:
        places = (shape.levels, shape.width)
        proposals = Proposals(
            jnp.zeros(places, jnp.int32), jnp.zeros(places, jnp.int32), jnp.zeros(places),
            jnp.zeros(places, bool),
        )  # fmt: skip
        return _Sent(
            jnp.zeros((shape.packet,), jnp.int32), jnp.zeros((shape.packet,)), proposals,
            jnp.zeros((), bool), jnp.zeros((shape.stages,), jnp.int32), jnp.zeros((), jnp.int32),
        )  # fmt: skip

    @staticmethod
    def size(shape: Shape) -> int:
        return sum(x.size for x in jax.tree.leaves(_Sent.like(shape)))

    def pack(self) -> Array:
        """i32[n]; each value comes from one device only, so that bits survive the sum."""
        as_int = lambda x: (
            lax.bitcast_convert_type(x, jnp.int32)
            if x.dtype == jnp.float32
            else x.astype(jnp.int32)
        )
        return jnp.concatenate([as_int(x).reshape(-1) for x in jax.tree.leaves(self)])

    @staticmethod
    def unpack(flat: Array, shape: Shape) -> _Sent:
        leaves, form = jax.tree.flatten(_Sent.like(shape))
        ends = np.cumsum([leaf.size for leaf in leaves])
        parts = jnp.split(flat, ends[:-1])
        back = lambda x, like: (
            lax.bitcast_convert_type(x, jnp.float32)
            if like.dtype == jnp.float32
            else x.astype(like.dtype)
        ).reshape(like.shape)
        return jax.tree.unflatten(form, [back(x, like) for x, like in zip(parts, leaves)])


def _tick(
    net: Network, source: Functions, shape: Shape, arrays: Arrays, state: State, text: Text,
    rules: Rules,
) -> tuple[State, Text]:  # fmt: skip
    """Decides (the same everywhere), computes (what is this device's), sends."""
    sent = _Sent.unpack(state.sent, shape)
    with jax.named_scope("schedule"):
        state = _insert(shape, state, text, sent, arrays.limits)
        state, text = _settle(shape, state, text, rules, sent)
        state = _launch(shape, state, arrays.limits)
        state = _ask(shape, state, text, arrays.limits)
    own = assemble(arrays.cut)
    with jax.named_scope("stage"):
        state, x, answers, logprobs, executed = _compute(net, shape, own, state, rules)
    with jax.named_scope("draft"):
        state, proposals, reads, drafted = _draft(source, shape, arrays.draft, state, text, rules)
    with jax.named_scope("send"):
        hidden = _pass_on(x, shape)
        flat = _Sent(answers, logprobs, proposals, reads, executed, drafted).pack()
        flat = lax.psum(flat, STAGE)
    said = _Sent.unpack(flat, shape)
    counters = _count(state, said)
    return state._replace(hidden=hidden, sent=flat, counters=counters), text


def _settle(
    shape: Shape, state: State, text: Text, rules: Rules, sent: _Sent
) -> tuple[State, Text]:
    """The packet that has left the pipe brings its answers to its text."""
    request, nodes = jax.tree.map(lambda x: x[-1], state.pipe)
    tree, cells = _at(state.trees, request), _at(state.cells, request)
    at = jnp.where(nodes != NONE, nodes, shape.nodes)
    tree = tree._replace(
        answers=tree.answers.at[at].set(sent.answers, mode="drop"),
        logprobs=tree.logprobs.at[at].set(sent.logprobs, mode="drop"),
    )
    tree, cells, new = scheduler.settle(tree, cells, shape.levels)
    batch = text.length.shape[0]
    mine = jnp.arange(batch, dtype=jnp.int32) == request
    spread = lambda x: jnp.broadcast_to(x, (batch, *x.shape))
    running = ~text.done
    kept = spread(new.logprobs) if text.logprobs is not None else None
    text, count = append(text, spread(new.tokens), jnp.where(mine, new.size, 0), rules, kept)
    some = lambda x: jnp.where(mine & (count > 0), x, 0)
    stats = text.stats._replace(
        passes=text.stats.passes + running.astype(jnp.int32),
        drafted=text.stats.drafted + some(new.guessed)[:, None],
        accepted=text.stats.accepted + some(jnp.minimum(new.right, count.max()))[:, None],
    )
    text = text._replace(stats=stats)
    ended = jax.tree.map(
        lambda a, b: jnp.where(text.done[request], a, b), scheduler.kill(tree, cells), (tree, cells)
    )
    trees, all_cells = _put(state.trees, request, ended[0]), _put(state.cells, request, ended[1])
    # What died is in no packet any more; its cells and slots may be given away.
    alive = trees.alive[state.pipe.request[:, None], state.pipe.nodes]
    pipe = state.pipe._replace(nodes=jnp.where(alive, state.pipe.nodes, NONE))
    corrections = state.counters.corrections + some(new.size - new.right)
    counters = state.counters._replace(corrections=corrections)
    state = state._replace(trees=trees, cells=all_cells, pipe=pipe, counters=counters)
    return state, text


def _in_flight(pipe: Packet, batch: int) -> Array:
    """i32[B] packets of each text that have not left the pipe."""
    live = (pipe.nodes != NONE).any(1)
    return jnp.zeros((batch,), jnp.int32).at[pipe.request].add(live.astype(jnp.int32))


def _insert(shape: Shape, state: State, text: Text, sent: _Sent, limits: Limits) -> State:
    """The draft's proposals of the last tick join the tree that it was asked about."""
    asked = state.asked
    request = asked.request
    old = _at(state.trees, request), _at(state.cells, request)
    flying = _in_flight(state.pipe, text.length.shape[0])[request]
    cells = scheduler.mark_read(*old, asked, sent.reads)
    new = scheduler.insert(
        old[0], cells, asked, sent.proposals, sent.reads, limits, flying, text.limit[request] - 1
    )
    # Where nothing was asked the tree stays as it is.
    tree, cells = jax.tree.map(lambda a, b: jnp.where(asked.wanted, a, b), new, old)
    return state._replace(
        trees=_put(state.trees, request, tree), cells=_put(state.cells, request, cells)
    )


def _launch(shape: Shape, state: State, limits: Limits) -> State:
    """The pipe moves on; the first text that has something to launch launches it."""
    batch = state.trees.tip.shape[0]
    moved = jax.tree.map(lambda x: x[:-1], state.pipe)
    flying = _in_flight(moved, batch)
    ready = jax.vmap(scheduler.waiting)(state.trees).any(1) & (flying < limits.window)
    request = jnp.argmax(ready).astype(jnp.int32)
    tree, nodes = scheduler.launch(_at(state.trees, request), shape.packet)
    tree, nodes = jax.tree.map(
        lambda a, b: jnp.where(ready.any(), a, b),
        (tree, nodes), (_at(state.trees, request), jnp.zeros_like(nodes)),
    )  # fmt: skip
    size = (nodes != NONE).sum(dtype=jnp.int32)
    join = lambda new, old: jnp.concatenate([new[None], old])
    counters = state.counters
    launched = counters.launched + jnp.stack([ready.any().astype(jnp.int32), size])
    return state._replace(
        trees=_put(state.trees, request, tree),
        pipe=Packet(join(request, moved.request), join(nodes, moved.nodes)),
        sizes=join(size, state.sizes[:-1]),
        counters=counters._replace(launched=launched),
    )


def _ask(shape: Shape, state: State, text: Text, limits: Limits) -> State:
    """The draft is asked about the first text that it could go on with."""
    batch = text.length.shape[0]
    new = shape.packet
    can = jax.vmap(
        lambda tree, cells, flying, end: scheduler.could_ask(tree, cells, limits, flying, end, new)
    )(state.trees, state.cells, _in_flight(state.pipe, batch), text.limit - 1)
    request = jnp.argmax(can).astype(jnp.int32)
    tree, cells = _at(state.trees, request), _at(state.cells, request)
    asked = scheduler.ask(tree, cells, request, can.any(), shape.levels, shape.width)
    return state._replace(asked=asked)


def _one(sampling: Sampling, request: Array) -> Sampling:
    """The settings of one text, as arrays of one row."""
    key, *settings = sampling
    return Sampling(key, *jax.tree.map(lambda x: x[request][None], settings))


def _compute(net: Network, shape: Shape, own: Variables, state: State, rules: Rules):
    """This device's packet through its layers; on the last stage, the target's own tokens.

    Returns:
      The state, x [1, K, D], answers i32[K], their log-probabilities, executed i32[S].
    """
    stage, none = _stage(shape), state.cells.positions.shape[1]
    request, nodes = _at(state.pipe, jnp.maximum(stage, 0))
    tree, cells = _at(state.trees, request), _at(state.cells, request)
    meant = (nodes != NONE) & (stage >= 0)
    to = jnp.where(meant, tree.cells[nodes], none)
    block = Block(
        *(
            x[None]
            for x in (
                tree.tokens[nodes],
                jnp.where(meant, tree.positions[nodes], 0),
                to,
                jnp.where(meant[:, None], tree.bits[nodes], 0),
                cells.bits[jnp.minimum(to, none - 1)],
            )
        )
    )
    sampling = _one(rules.sampling, request)

    def run(x, rows):
        embedded = net.stages.embed(own, block.tokens, block.positions)
        x = jnp.where(stage == 0, embedded, x)
        x, new = through(net, own, x, past_of(rows, request, cells, block), block)
        last = (stage == shape.stages - 1).astype(jnp.int32)
        picked = lax.switch(last, [_pick_nothing, _picker(net, own, sampling)], x, block.positions)
        return x, new, *picked, jnp.ones((), jnp.int32)

    shapes = jax.eval_shape(run, state.hidden, state.rows)[1:]
    by = lambda x, rows: (x, *jax.tree.map(lambda r: jnp.zeros(r.shape, r.dtype), shapes))
    # Passing by comes first: XLA copies what the first branch writes.
    x, new, answers, logprobs, ran = lax.switch(
        meant.any().astype(jnp.int32), [by, run], state.hidden, state.rows
    )
    written = meant[None] & jnp.isfinite(x).all(-1)
    rows = put_rows(state.rows, request, cells, block, new, written)
    executed = jnp.where(jnp.arange(shape.stages) == stage, ran, 0)
    return state._replace(rows=rows), x, answers, logprobs, executed


def _picker(net: Network, own: Variables, sampling: Sampling):
    """`(x [1, K, D], positions i32[1, K]) -> (tokens i32[K], log-probabilities f32[K])`.

    The draw at each position is the one that plain decoding makes there.
    """

    def pick(x: Array, positions: Array) -> tuple[Array, Array]:
        logits = net.stages.head(own, x)
        if sampling.temperature is None:
            tokens = logits.argmax(-1).astype(jnp.int32)
        else:
            logp = sample.log_probs(logits, sampling)
            tokens = sample.draw(logp, sample.keys(sampling, positions + 1, sample.CHOOSE))
        logp = jax.nn.log_softmax(logits, axis=-1)
        return tokens[0], jnp.take_along_axis(logp, tokens[..., None], axis=-1)[0, :, 0]

    return pick


def _pick_nothing(x: Array, positions: Array) -> tuple[Array, Array]:
    return jnp.zeros(positions.shape[1], jnp.int32), jnp.zeros(positions.shape[1])


def _draft(
    source: Functions, shape: Shape, variables: PyTree, state: State, text: Text, rules: Rules
):
    """What the draft answers, on the device that drafts.

    Returns:
      The state, proposals, whether it read, and 1 where it ran.
    """
    like = _Sent.like(shape)
    blank = (like.proposals, like.reads, jnp.zeros((), jnp.int32))
    if source is _NO_FUNCTIONS:
        return state, *blank
    asked = state.asked
    tree, cells = _at(state.trees, asked.request), _at(state.cells, asked.request)
    tokens, length = _path(tree, asked.tips[0], _at(text.tokens, asked.request))
    question = Question(
        asked, tree, cells, _one(rules.sampling, asked.request), tokens, length,
        text.length[asked.request], text.limit[asked.request] - 1,
    )  # fmt: skip

    def run(own):
        answer, own = source.propose(variables, own, question, shape.levels, shape.width)
        return own, answer.proposals, answer.reads, jnp.ones((), jnp.int32)

    mine = asked.wanted & (lax.axis_index(STAGE) == 0)
    own, *said = lax.switch(
        mine.astype(jnp.int32), [lambda own: (own, *blank), run], local(state.draft)
    )
    return state._replace(draft=jax.tree.map(lambda x: x[None], own)), *said


def _path(tree: Tree, node: Array, tokens: Array) -> tuple[Array, Array]:
    """A text with the tokens on the way to a node written behind it, and its new length."""
    every = jnp.arange(tree.alive.shape[0], dtype=jnp.int32)
    above = jax.vmap(lambda i: scheduler.has(tree.bits[node], i))(every) & tree.alive
    at = jnp.where(above, tree.positions, tokens.shape[0])
    return tokens.at[at].set(tree.tokens, mode="drop"), tree.positions[node] + 1


def _count(state: State, said: _Sent) -> Counters:
    live = (state.pipe.nodes != NONE).any(1)
    cancelled = ~live & (state.sizes > 0)
    old = state.counters
    row = jnp.where(live, LIVE, jnp.where(cancelled, CANCELLED, IDLE)).astype(jnp.uint8)
    row = jnp.concatenate([row, said.drafted.astype(jnp.uint8)[None]])
    return old._replace(
        ticks=old.ticks + 1,
        executed=old.executed + said.executed,
        cancelled=old.cancelled + cancelled.astype(jnp.int32),
        drafted=old.drafted + said.drafted,
        in_flight=old.in_flight + live.sum(dtype=jnp.int32),
        timeline=old.timeline.at[old.ticks].set(row, mode="drop")
        if old.timeline.size
        else old.timeline,
    )


def cache_copies(decoder: Decoder, *, cells: int = 128) -> int:
    """Copies of a stage's keys or values in the optimised program of a tick: 0, or a tick costs
    more than it should. Whether XLA makes one depends on its version.

    Args:
      decoder: of `pipeinfer`.
      cells: tokens of the text.
    """
    from jaxfm.parallel.generate import _advance, _start

    length, limit = jnp.full((1,), 2, jnp.int32), jnp.full((1,), cells, jnp.int32)
    tokens, zero = jnp.zeros((1, cells), jnp.int32), jnp.zeros((1,), jnp.int32)
    stats = Stats(zero, zero[:, None], zero[:, None])
    text = Text(tokens, length, limit, zero > 0, zero, stats)
    rules = Rules(Sampling(jax.random.key(0), zero), jnp.zeros((0,), jnp.int32))
    state = _start(decoder.program, decoder.variables, tokens, length, 16, None)
    program = _advance.lower(decoder.program, decoder.variables, state, text, rules, 4).compile()
    size = math.prod(state.rows.k.sharding.shard_shape(state.rows.k.shape))
    copied = re.findall(r"= \w+\[([\d,]+)\]\S* copy(?:-start)?\(", program.as_text() or "")
    return sum(math.prod(map(int, shape.split(","))) == size for shape in copied)
