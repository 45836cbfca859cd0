"""What one device of the pipe computes in a tick: its layers, the head, the draft.

Collectives between stages stand outside of all branches. What only this stage does is chosen by
`lax.switch`, whose first branch passes the packet by, since XLA copies what the first branch
writes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxfm.model import Array, PyTree, Variables
from jaxfm.parallel import sampling as sample
from jaxfm.parallel.cache import Block, CausalModel, through
from jaxfm.parallel.drafting import Proposer, Question, no_state
from jaxfm.parallel.grammar import Standing
from jaxfm.parallel.pipe.pipeline import STAGE, local
from jaxfm.parallel.pipe.state import Message, Shape, State, pass_on, stage_of, take
from jaxfm.parallel.rows import Rows, past_of, put_rows
from jaxfm.parallel.sampling import Sampling
from jaxfm.parallel.token_tree import NONE, Cells, Tree, bit, has, history
from jaxfm.parallel.verification import Rules, Text


def prefill(
    lm: CausalModel, shape: Shape, variables: Variables, rows: Rows, cells: Cells, tokens: Array,
    length: Array, chunk: int,
) -> tuple[Rows, Array]:  # fmt: skip
    """Reads the prompts in chunks, which go through the pipe one after the other.

    Returns:
      The stage's rows, and how many ticks it took: all chunks + S - 1.
    """
    batch, wide = tokens.shape
    chunks = -(-wide // chunk)
    tokens = jnp.pad(tokens, ((0, 0), (0, chunks * chunk - wide)))
    stage, none = stage_of(shape), cells.positions.shape[1]
    ticks = batch * chunks + shape.stages - 1

    def tick(i, carry):
        rows, x = carry
        number = i - stage
        request = jnp.clip(number // chunks, 0, batch - 1)
        first = (number % chunks) * chunk
        places = first + jnp.arange(chunk, dtype=jnp.int32)
        meant = (places < length[request] - 1) & (number >= 0) & (number < batch * chunks)
        meant &= stage >= 0
        own = take(cells, request)
        # Later tokens are not there yet; all earlier ones are in the cache.
        before = own._replace(bits=jnp.where((own.positions < first)[:, None], own.bits, 0))
        truth = bit(jnp.zeros((), jnp.int32), own.bits.shape[1])
        block = Block(
            lax.dynamic_slice(tokens, (request, first), (1, chunk)),
            jnp.where(meant, places, 0)[None],
            jnp.where(meant, places, none)[None],
            jnp.where(meant[:, None], truth[None], 0)[None],
        )

        def run(x, rows):
            embedded = lm.stages.embed(variables, block.tokens, block.positions)
            x = jnp.where(stage == 0, embedded, x)
            return through(lm, variables, x, past_of(rows, request, before, block), block)

        like = jax.eval_shape(run, x, rows)[1]
        by = lambda x, rows: (x, jax.tree.map(lambda r: jnp.zeros(r.shape, r.dtype), like))
        x, new = lax.switch(meant.any().astype(jnp.int32), [by, run], x, rows)
        return put_rows(rows, request, own, block, new), pass_on(x, shape)

    one = jax.ShapeDtypeStruct((1, chunk), jnp.int32)
    x = jax.eval_shape(lambda t: lm.stages.embed(variables, t, t), one)
    rows, _ = lax.fori_loop(0, ticks, tick, (rows, jnp.zeros(x.shape, x.dtype)))
    return rows, jnp.asarray(ticks, jnp.int32)


def _one(sampling: Sampling, request: Array) -> Sampling:
    """The settings of one text, as arrays of one row."""
    # The key, the known tokens and the tables of grammars are those of all texts.
    key, _, *settings = sampling._replace(known=None, grammar=None)
    own = jax.tree.map(lambda x: x[request][None], (sampling.request, *settings))
    return Sampling(key, *own)._replace(known=sampling.known, grammar=sampling.grammar)


def compute(lm: CausalModel, shape: Shape, own: Variables, state: State, text: Text, rules: Rules):
    """Runs this device's packet through its layers; the last stage picks the target's own tokens.

    Returns:
      The state, x [1, K, D], answers i32[K], their log-probabilities f32[K], and executed i32[S].
    """
    stage, none = stage_of(shape), state.cells.positions.shape[1]
    request, nodes = take(state.pipe, jnp.maximum(stage, 0))
    tree, cells = take(state.trees, request), take(state.cells, request)
    meant = (nodes != NONE) & (stage >= 0)
    to = jnp.where(meant, tree.cells[nodes], none)
    block = Block(
        tokens=tree.tokens[nodes][None],
        positions=jnp.where(meant, tree.positions[nodes], 0)[None],
        cells=to[None],
        bits=jnp.where(meant[:, None], tree.bits[nodes], 0)[None],
        own=cells.bits[jnp.minimum(to, none - 1)][None],
    )
    sampling = _one(rules.sampling, request)
    left = text.limit[request] - 1 - block.positions
    standing = Standing(states_of(tree, nodes, text, request)[None], left)

    def run(places, x, rows):
        """The first places of the packet."""
        some, where = jax.tree.map(lambda field: field[:, :places], (block, standing))
        embedded = lm.stages.embed(own, some.tokens, some.positions)
        x = jnp.where(stage == 0, embedded, x[:, :places])
        x, new = through(lm, own, x, past_of(rows, request, cells, block), some)
        last = (stage == shape.stages - 1).astype(jnp.int32)
        ways = [_pick_nothing, _picker(lm, own, sampling, cells)]
        picked = lax.switch(last, ways, x, (some.positions, some.bits), where)
        return x, new, *picked, jnp.ones((), jnp.int32)

    whole = functools.partial(run, shape.packet)
    shapes = jax.eval_shape(whole, state.hidden, state.rows)
    fill = lambda part, like: lax.pad(
        part, jnp.zeros((), part.dtype), [(0, b - a, 0) for a, b in zip(part.shape, like.shape)]
    )
    one = lambda x, rows: jax.tree.map(fill, run(1, x, rows), shapes)
    by = lambda x, rows: (x, *jax.tree.map(lambda r: jnp.zeros(r.shape, r.dtype), shapes[1:]))
    # The branch that passes the packet by comes first: XLA copies what the first branch writes. A
    # single token is read alone, so that wide packets cost only where they are used.
    ways: list[Callable] = [by, one, whole] if shape.packet > 1 else [by, whole]
    way = meant.any().astype(jnp.int32) + meant[1:].any().astype(jnp.int32)
    x, new, answers, logprobs, ran = lax.switch(way, ways, state.hidden, state.rows)
    rows = put_rows(state.rows, request, cells, block, new)
    executed = jnp.where(jnp.arange(shape.stages) == stage, ran, 0)
    return state._replace(rows=rows), x, answers, logprobs, executed


def states_of(tree: Tree, nodes: Array, text: Text, request: Array) -> Array:
    """i32[...], the states of a text's grammar after nodes i32[...] of its tree."""
    if text.states is None:
        return jnp.zeros(nodes.shape, jnp.int32)
    return jnp.where(nodes == tree.tip, text.states[request], tree.states[nodes])


def _picker(lm: CausalModel, own: Variables, sampling: Sampling, cells: Cells):
    """`(x [1, K, D], places, standing) -> (tokens i32[K], log-probabilities f32[K])`.

    The places are positions i32[1, K] and bits u32[1, K, W]. The draw at each position is the one
    that plain decoding makes there.
    """

    def pick(x: Array, places: tuple[Array, Array], standing: Standing) -> tuple[Array, Array]:
        logits = sample.checked(lm.stages.head(own, x), sampling)
        choices = sample.adjusted(logits, sampling, history(cells, *places), standing)
        tokens = sample.choose(choices, sampling, places[0] + 1)
        logp = jax.nn.log_softmax(logits, axis=-1)
        return tokens[0], jnp.take_along_axis(logp, tokens[..., None], axis=-1)[0, :, 0]

    return pick


def _pick_nothing(x: Array, places: tuple[Array, Array], standing: Standing) -> tuple[Array, Array]:
    return jnp.zeros(x.shape[1], jnp.int32), jnp.zeros(x.shape[1])


def _nothing(variables, state, question, levels: int, width: int):
    raise AssertionError("There is no drafter, so none is asked.")


NO_DRAFT = Proposer(no_state, _nothing)


def propose(
    drafter: Proposer, shape: Shape, variables: PyTree, state: State, text: Text, rules: Rules
):
    """Asks the drafter, on the device that drafts.

    Returns:
      The state, the proposals, whether it read, and 1 where it ran.
    """
    like = Message.like(shape)
    blank = (like.proposals, like.reads, jnp.zeros((), jnp.int32))
    if drafter is NO_DRAFT:
        return state, *blank
    asked = state.asked
    tree, cells = take(state.trees, asked.request), take(state.cells, asked.request)
    tokens, length = _path(tree, asked.tips[0], take(text.tokens, asked.request))
    question = Question(
        ask=asked,
        tree=tree,
        cells=cells,
        sampling=_one(rules.sampling, asked.request),
        tokens=tokens,
        length=length,
        committed=text.length[asked.request],
        end=text.limit[asked.request] - 1,
        states=states_of(tree, asked.tips, text, asked.request),
    )

    def run(own):
        answer, own = drafter.propose(variables, own, question, shape.levels, shape.width)
        return own, answer.proposals, answer.reads, jnp.ones((), jnp.int32)

    mine = asked.wanted & (lax.axis_index(STAGE) == 0)
    own, *answer = lax.switch(
        mine.astype(jnp.int32), [lambda own: (own, *blank), run], local(state.draft)
    )
    return state._replace(draft=jax.tree.map(lambda x: x[None], own)), *answer


def _path(tree: Tree, node: Array, tokens: Array) -> tuple[Array, Array]:
    """The text followed by the tokens on the way to a node, and its new length."""
    every = jnp.arange(tree.alive.shape[0], dtype=jnp.int32)
    above = jax.vmap(lambda i: has(tree.bits[node], i))(every) & tree.alive
    at = jnp.where(above, tree.positions, tokens.shape[0])
    return tokens.at[at].set(tree.tokens, mode="drop"), tree.positions[node] + 1
