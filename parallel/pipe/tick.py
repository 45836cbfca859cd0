"""One tick of the pipe: every device decides the same, computes its own part, and sends it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxfm.model import Array
from jaxfm.parallel import token_tree
from jaxfm.parallel.cache import CausalModel
from jaxfm.parallel.drafting import Ask, Proposals, Proposer
from jaxfm.parallel.grammar import FREE, advance_within
from jaxfm.parallel.pipe import scheduler
from jaxfm.parallel.pipe.pipeline import STAGE, assemble
from jaxfm.parallel.pipe.scheduler import Limits, Packet
from jaxfm.parallel.pipe.stage import compute, propose, states_of
from jaxfm.parallel.pipe.state import (
    CANCELLED,
    IDLE,
    LIVE,
    Arrays,
    Counters,
    Message,
    Shape,
    State,
    in_flight,
    pass_on,
    put,
    take,
)
from jaxfm.parallel.token_tree import NONE, Tree
from jaxfm.parallel.verification import Rules, Text, append


def one_tick(
    lm: CausalModel, drafter: Proposer, shape: Shape, arrays: Arrays, state: State, text: Text,
    rules: Rules,
) -> tuple[State, Text]:  # fmt: skip
    """The state and the texts after one tick, inside `shard_map`."""
    sent = Message.unpack(state.sent, shape)
    with jax.named_scope("schedule"):
        state = _insert(shape, state, text, rules, sent, arrays.limits)
        state, text = _settle(shape, state, text, rules, sent)
        state = _launch(shape, state, arrays.limits)
        state = _ask(shape, state, text, arrays.limits)
    own = assemble(arrays.cut)
    with jax.named_scope("stage"):
        state, x, answers, logprobs, executed = compute(lm, shape, own, state, text, rules)
    with jax.named_scope("draft"):
        state, proposals, reads, drafted = propose(drafter, shape, arrays.draft, state, text, rules)
    with jax.named_scope("send"):
        hidden = pass_on(x, shape)
        message = Message(
            answers=answers, logprobs=logprobs, proposals=proposals, reads=reads,
            executed=executed, drafted=drafted,
        )  # fmt: skip
        flat = lax.psum(message.pack(), STAGE)
    counters = tally(state, Message.unpack(flat, shape))
    return state._replace(hidden=hidden, sent=flat, counters=counters), text


def _settle(
    shape: Shape, state: State, text: Text, rules: Rules, sent: Message
) -> tuple[State, Text]:
    """Brings the answers of the packet that has left the pipe to its text."""
    request, nodes = jax.tree.map(lambda x: x[-1], state.pipe)
    tree, cells = take(state.trees, request), take(state.cells, request)
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
    text, count = append(
        text, spread(new.tokens), jnp.where(mine, new.size, 0), rules, logprobs=kept
    )
    some = lambda x: jnp.where(mine & (count > 0), x, 0)
    stats = text.stats._replace(
        passes=text.stats.passes + running.astype(jnp.int32),
        drafted=text.stats.drafted + some(new.guessed)[:, None],
        accepted=text.stats.accepted + some(jnp.minimum(new.right, count.max()))[:, None],
    )
    text = text._replace(stats=stats)
    ended = jax.tree.map(
        lambda a, b: jnp.where(text.done[request], a, b),
        token_tree.kill(tree, cells),
        (tree, cells),
    )
    trees, all_cells = put(state.trees, request, ended[0]), put(state.cells, request, ended[1])
    # Dead nodes are in no packet any more; their cells and slots may be given to others.
    alive = trees.alive[state.pipe.request[:, None], state.pipe.nodes]
    pipe = state.pipe._replace(nodes=jnp.where(alive, state.pipe.nodes, NONE))
    corrections = state.counters.corrections + some(new.size - new.right)
    took = jnp.arange(new.places.shape[0], dtype=jnp.int32) < count.max()
    place = jnp.where(took & (new.places >= 0), new.places, shape.width)
    counters = state.counters._replace(
        corrections=corrections,
        places=state.counters.places.at[place].add(1, mode="drop"),
    )
    state = state._replace(trees=trees, cells=all_cells, pipe=pipe, counters=counters)
    return state, text


def _insert(
    shape: Shape, state: State, text: Text, rules: Rules, sent: Message, limits: Limits
) -> State:
    """Adds the draft's proposals of the last tick to the tree that it was asked about."""
    asked = state.asked
    request = asked.request
    old = take(state.trees, request), take(state.cells, request)
    flying = in_flight(state.pipe, text.length.shape[0])[request]
    cells = scheduler.mark_read(*old, asked, sent.reads)
    proposals, states = _in_grammar(old[0], asked, sent.proposals, text, rules)
    new = scheduler.insert(
        old[0], cells, asked, proposals, sent.reads, limits, flying, text.limit[request] - 1
    )
    new = new[0]._replace(states=new[0].states.at[asked.slots].set(states)), new[1]
    # Where nothing was asked the tree stays as it is.
    tree, cells = jax.tree.map(lambda a, b: jnp.where(asked.wanted, a, b), new, old)
    return state._replace(
        trees=put(state.trees, request, tree), cells=put(state.cells, request, cells)
    )


def _in_grammar(
    tree: Tree, ask: Ask, proposals: Proposals, text: Text, rules: Rules
) -> tuple[Proposals, Array]:
    """The proposals that a text's grammar allows, and its states i32[k, w] after each."""
    grammar, along = rules.sampling.grammar, []
    if grammar is None:
        return proposals, jnp.zeros_like(proposals.tokens)
    states, good = states_of(tree, ask.tips, text, ask.request), []
    left = text.limit[ask.request] - 1 - tree.positions[ask.tips]
    for tokens, parents in zip(proposals.tokens, proposals.parents):
        after = advance_within(grammar, states[parents], tokens, left[parents])
        states, left = jnp.maximum(after, FREE), left[parents] - 1
        along.append(states)
        good.append(after >= 0)
    return proposals._replace(valid=proposals.valid & jnp.stack(good)), jnp.stack(along)


def _launch(shape: Shape, state: State, limits: Limits) -> State:
    """Moves the pipe on by one stage; the first text that has waiting nodes launches them."""
    batch = state.trees.tip.shape[0]
    moved = jax.tree.map(lambda x: x[:-1], state.pipe)
    flying = in_flight(moved, batch)
    ready = jax.vmap(scheduler.waiting)(state.trees).any(1) & (flying < limits.window)
    request = jnp.argmax(ready).astype(jnp.int32)
    tree, nodes = scheduler.launch(take(state.trees, request), shape.packet)
    tree, nodes = jax.tree.map(
        lambda a, b: jnp.where(ready.any(), a, b),
        (tree, nodes), (take(state.trees, request), jnp.zeros_like(nodes)),
    )  # fmt: skip
    size = (nodes != NONE).sum(dtype=jnp.int32)
    join = lambda new, old: jnp.concatenate([new[None], old])
    counters = state.counters
    launched = counters.launched + jnp.stack([ready.any().astype(jnp.int32), size])
    return state._replace(
        trees=put(state.trees, request, tree),
        pipe=Packet(join(request, moved.request), join(nodes, moved.nodes)),
        sizes=join(size, state.sizes[:-1]),
        counters=counters._replace(launched=launched),
    )


def _ask(shape: Shape, state: State, text: Text, limits: Limits) -> State:
    """Asks the draft about the first text that it may continue."""
    batch = text.length.shape[0]
    new = shape.packet
    can = jax.vmap(
        lambda tree, cells, flying, end: scheduler.could_ask(tree, cells, limits, flying, end, new)
    )(state.trees, state.cells, in_flight(state.pipe, batch), text.limit - 1)
    request = jnp.argmax(can).astype(jnp.int32)
    tree, cells = take(state.trees, request), take(state.cells, request)
    asked = scheduler.ask(tree, cells, request, can.any(), shape.levels, shape.width)
    return state._replace(asked=asked)


def tally(state: State, message: Message) -> Counters:
    """The counts after a tick, with the message of that tick."""
    live = (state.pipe.nodes != NONE).any(1)
    cancelled = ~live & (state.sizes > 0)
    old = state.counters
    row = jnp.where(live, LIVE, jnp.where(cancelled, CANCELLED, IDLE)).astype(jnp.uint8)
    row = jnp.concatenate([row, message.drafted.astype(jnp.uint8)[None]])
    return old._replace(
        ticks=old.ticks + 1,
        executed=old.executed + message.executed,
        cancelled=old.cancelled + cancelled.astype(jnp.int32),
        drafted=old.drafted + message.drafted,
        wide=old.wide + (state.pipe.nodes[:, 1:] != NONE).any().astype(jnp.int32),
        in_flight=old.in_flight + live.sum(dtype=jnp.int32),
        timeline=old.timeline.at[old.ticks].set(row, mode="drop")
        if old.timeline.size
        else old.timeline,
    )
