"""PipeInfer on a device mesh: continuous asynchronous speculation with early cancellation.

The target is cut by layers over the mesh axis "stage"; a tick moves every packet of proposed tokens
one stage further. A token launched in one tick is answered S ticks later, and the pipe does not
wait: the draft goes on proposing below what is still in flight. When an answer contradicts a
proposal, everything below that proposal is cancelled on all stages in the next tick, and what
agrees with the answer stays. With a draft that answers within a tick and is right with probability
a, a token takes

    (1 - a) S + a    ticks, where plain decoding through the same pipe takes S.

One program runs on all devices (`jax.shard_map`). Its control state is replicated: each device
makes the same decisions from the same answers, so nothing but one stage's hidden states
(`ppermute`) and a few integers (`psum`) is sent between stages in a tick, and no collective between
stages stands inside a branch.

It differs from the published algorithm as follows. The newest right token is launched on its own
only where no packet holds it already. Tokens are cancelled, not whole packets. A tree stays alive
across a correction that one of its branches foresaw. Several texts share the pipe, and the first
one has priority. Sampled texts have the target's distribution and do not depend on how they were
scheduled (`jaxfm.parallel.drafting`).
Source: PipeInfer (arXiv 2407.11798); trees in the pipe as in PipeDec (arXiv 2504.04104).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxfm.adapters.prompts import read_prompts
from jaxfm.model import Array, Model, Variables, layers_of, num_layers
from jaxfm.parallel.cache import CausalModel, causal_model, init_cache, positions_of, vocab_size
from jaxfm.parallel.decode import Decoder, DecoderFunctions
from jaxfm.parallel.drafting import Drafter, Proposer, check_vocabulary
from jaxfm.parallel.mesh import make_mesh
from jaxfm.parallel.pipe import scheduler
from jaxfm.parallel.pipe.pipeline import (
    STAGE,
    TENSOR,
    Cut,
    assemble,
    cut,
    even_split,
    skipping,
)
from jaxfm.parallel.pipe.scheduler import Limits, Packet
from jaxfm.parallel.pipe.stage import NO_DRAFT, prefill
from jaxfm.parallel.pipe.state import Arrays, Message, Shape, State, init_ask, init_counters
from jaxfm.parallel.pipe.tick import one_tick
from jaxfm.parallel.rows import flat_rows
from jaxfm.parallel.token_tree import init_cells, init_tree, num_words, replant
from jaxfm.parallel.verification import Rules, Text


def pipeinfer(
    model: Model,
    variables: Variables,
    drafter: Drafter | None,
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
      drafter: continues trees (`jaxfm.parallel.drafters`); None: plain pipelined decoding.
      mesh: its axis "stage" has one slot a stage (and one more with `own_slot`), and the devices
        of its axis "tensor" share a stage's heads, MLP units and cache; None: all on one device.
      split: layers of each stage; None: as even as possible.
      width: candidates kept alive at each depth; 1 is a chain, more is a tree.
      levels: tokens of a path drafted a tick; more than 1 pays where a packet of several tokens
        costs little more than one.
      own_slot: give the first slot of the mesh to the draft alone. Otherwise it shares the first
        stage's device.
      limits: of `jaxfm.parallel.pipe.scheduler.limits`; None: all of width and levels, and a window
        that fills the pipe.
      record: ticks whose timeline is kept (`Counters.timeline`).
    Raises:
      ValueError: a setting out of range, a split that fits neither model nor mesh, heads or MLP
        units that do not divide over "tensor", a drafter with another number of tokens, or one that
        continues no trees.
    """
    for name, value in (("width", width), ("levels", levels)):
        if value < 1:
            raise ValueError(f"{name}={value}: give at least 1.")
    if record < 0:
        raise ValueError(f"record={record}: give the number of ticks to keep, or 0.")
    mesh = make_mesh() if mesh is None else mesh
    split = _split(variables, mesh, split, own_slot)
    model, variables = read_prompts(model, variables)
    tokens = vocab_size(model, variables)
    proposer = NO_DRAFT
    if drafter is not None:
        check_vocabulary(tokens, drafter)
        if drafter.tree is None:
            raise ValueError("This drafter continues chains only: give it to `speculative`.")
        proposer = drafter.tree
    if limits is None:
        limits = scheduler.limits(width=width if drafter else 0, levels=levels)
    # Everything in flight, one more packet's worth in the draft's hands, and a correction.
    nodes = 32 * num_words((len(split) + 2) * width * levels + 2)
    shape = Shape(
        stages=len(split), own_slot=int(own_slot), width=width, levels=levels, nodes=nodes,
        record=record,
    )  # fmt: skip
    everywhere = NamedSharding(mesh, PartitionSpec())
    drafts, limits = jax.device_put((drafter.variables if drafter else None, limits), everywhere)
    dealt = cut(variables, model.axes, (0,) * shape.own_slot + split, mesh)
    return Decoder(
        functions=_functions(causal_model(model), proposer, mesh, shape),
        variables=Arrays(dealt, drafts, limits),
        draft_length=1,
        vocab_size=tokens,
        positions=positions_of(model),
        mesh=mesh,
    )


def _split(
    variables: Variables, mesh: Mesh, split: Sequence[int] | None, own_slot: bool
) -> tuple[int, ...]:
    """The layers of each stage."""
    stages = mesh.shape[STAGE] - own_slot
    if stages < 1:
        raise ValueError(
            f"Mesh axis {STAGE!r} has {mesh.shape[STAGE]} slots; own_slot=True needs at least 2."
        )
    layers = num_layers(layers_of(variables))
    split = even_split(layers, stages) if split is None else tuple(split)
    if len(split) != stages or min(split) < 1:
        raise ValueError(f"split={split}: give 1 or more layers for each of {stages} stages.")
    return split


def pipelined(
    model: Model, variables: Variables, *, mesh: Mesh | None = None, split=None, record: int = 0
) -> Decoder:
    """The decoder that drafts nothing: one token of each text takes S ticks of the pipe.

    Args:
      model, variables, mesh, split, record: as in `pipeinfer`.
    """
    return pipeinfer(model, variables, None, mesh=mesh, split=split, record=record)


@functools.cache
def _functions(
    target: CausalModel, drafter: Proposer, mesh: Mesh, shape: Shape
) -> DecoderFunctions:
    """Cached, so that the same parts give equal functions."""
    lm = skipping(target)
    everywhere = PartitionSpec()
    spec: Any = PartitionSpec  # stands where arrays will
    arrays_spec = Arrays(Cut(spec(), spec(STAGE)), spec(), spec())
    state_spec = State(*[spec()] * len(State._fields))
    state_spec = state_spec._replace(rows=spec(STAGE), draft=spec(STAGE), hidden=spec(STAGE))
    # Over "tensor" XLA splits the bodies by where the weights are. Its sums stand inside branches,
    # but only devices of one stage take part in a sum, and they all take the same branch.
    manual = set(mesh.axis_names) - ({TENSOR} if mesh.shape.get(TENSOR, 1) > 1 else set())
    sharded = functools.partial(jax.shard_map, mesh=mesh, check_vma=False, axis_names=manual)

    others = set(State._fields) - {"rows"}

    def placed(state: State, text: Text | None = None):
        """Both, placed as a tick leaves them: so the next one finds what it was compiled for."""
        if TENSOR in manual:
            return state, text
        pin = lambda part, spec: lax.with_sharding_constraint(part, NamedSharding(mesh, spec))
        # Layers apart have slots and heads in one axis, stacked ones in two.
        by_head = lambda x: pin(x, spec(STAGE, TENSOR) if x.ndim == 4 else spec((STAGE, TENSOR)))
        rows = jax.tree.map(by_head, state.rows)
        kept = {name: pin(getattr(state, name), getattr(state_spec, name)) for name in others}
        return State(rows=rows, **kept), pin(text, everywhere)

    def start(arrays: Arrays, tokens: Array, length: Array, cells: int, chunk: int | None) -> State:
        body = lambda arrays, tokens, length: _start(
            lm, drafter, shape, arrays, tokens, length, cells, chunk
        )
        specs = (arrays_spec, everywhere, everywhere)
        state = sharded(body, in_specs=specs, out_specs=state_spec)(arrays, tokens, length)
        return placed(state)[0]

    def tick(arrays: Arrays, state: State, text: Text, rules: Rules) -> tuple[State, Text]:
        body = functools.partial(one_tick, lm, drafter, shape)
        specs = (arrays_spec, state_spec, everywhere, everywhere)
        out = sharded(body, in_specs=specs, out_specs=(state_spec, everywhere))
        return placed(*out(arrays, state, text, rules))

    return DecoderFunctions(start, tick, lambda state: state.counters)


def _start(
    lm: CausalModel, drafter: Proposer, shape: Shape, arrays: Arrays, tokens: Array, length: Array,
    num_cells: int, chunk: int | None,
) -> State:  # fmt: skip
    """The state after the prompts were read, except for their newest tokens."""
    batch, wide = tokens.shape
    words = num_words(shape.nodes)
    num_cells += shape.nodes  # text and tree; one of them is the last, which stays empty
    variables = assemble(arrays.cut)
    empty = flat_rows(init_cache(lm, variables, batch, num_cells))
    cells = jax.vmap(lambda t, n: init_cells(t, n, num_cells, words))(tokens, length)
    rows, ticks = prefill(lm, shape, variables, empty, cells, tokens, length, chunk or wide)

    newest = jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)[:, 0]
    trees = jax.vmap(lambda _: init_tree(shape.nodes))(jnp.arange(batch))
    trees, cells = jax.vmap(replant)(trees, cells, newest, length - 1, trees.alive)

    begin = lambda: drafter.start(arrays.draft, tokens, length, num_cells, chunk)
    blank = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(begin))
    draft = lax.switch((lax.axis_index(STAGE) == 0).astype(jnp.int32), [blank, begin])

    one = jax.ShapeDtypeStruct((1, shape.packet), jnp.int32)
    x = jax.eval_shape(lambda t: lm.stages.embed(variables, t, t), one)
    zeros = lambda *dims: jnp.zeros(dims, jnp.int32)
    lead = lambda tree: jax.tree.map(lambda x: x[None], tree)
    return State(
        rows=rows,
        draft=lead(draft),
        hidden=jnp.zeros((1, *x.shape[1:]), x.dtype),
        trees=trees,
        cells=cells,
        pipe=Packet(zeros(shape.stages), zeros(shape.stages, shape.packet)),
        sizes=zeros(shape.stages),
        sent=zeros(Message.size(shape)),
        asked=init_ask(shape, num_cells),
        counters=init_counters(shape, batch, ticks),
    )
