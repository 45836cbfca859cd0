"""Streaming DiLoCo: one fragment of the model travels at a time.

    round t, f = t mod P:  clients take H / P inner steps of all parameters;
                           d = sum_i n_i (y_i - x)_f / sum_i n_i
                           m_f <- b m_f + d;   x_f <- x_f + a (d + b m_f)
    next round:            y_i,f <- (1 - w) x_f + w y_i,f

Each fragment is exchanged every P rounds, so a round sends 1/P of the model up and down and the
rest of it goes on as each client has it. `delay_steps` and `own_share` (w) are what training does
while a fragment is still under way. Sent in 4 bits (`with_compression`) it is the paper's setting.
Source: Douillard et al. 2025 (Streaming DiLoCo with overlapping communication), algorithm 2 and
sections 2.1 to 2.3.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxfm.federated.algorithm import (
    Algorithm,
    Aside,
    Bucket,
    ClientData,
    Info,
    Mean,
    Profile,
    Spent,
    anybody,
    exact,
    mean,
    weighted,
)
from jaxfm.federated.algorithms.fed_opt import OWN_STEP, check_rates
from jaxfm.federated.averaging import difference, moved
from jaxfm.federated.local import Local, continued_fit, objective
from jaxfm.federated.parts.fragments import (
    check_fragments,
    cut,
    fragment_at,
    joined,
    with_fragment,
)
from jaxfm.federated.registry import register
from jaxfm.model import Array, Key, Model, PyTree, Variables
from jaxfm.tasks import Task


class StreamingState(NamedTuple):
    """The server of Streaming DiLoCo.

    Attributes:
      variables: the global model.
      momentum: of its fragments; leaves [P, ...].
      turn: i32[], outer steps done; the next one is of fragment `turn` mod P.
    """

    variables: Variables
    momentum: PyTree
    turn: Array

    def with_variables(self, variables: Variables) -> StreamingState:
        """See `jaxfm.federated.algorithm.with_variables`; everybody has missed all fragments."""
        pieces = jax.tree.leaves(self.momentum)[0].shape[0]
        return self._replace(variables=variables, turn=self.turn + 2 * pieces)


class StreamingDownload(NamedTuple):
    """What a client gets.

    Attributes:
      turn: i32[], of the server.
      fragment: the global model, of whose parameters only the fragment that moved last.
      missed: the parameters of the global model, for whoever missed some.
    """

    turn: Array
    fragment: Variables
    missed: Aside


class StreamingMemory(NamedTuple):
    """What a client keeps.

    Attributes:
      params: its own parameters, of which each fragment has moved since it was last received.
      base: the parameters as they were received.
      opt_state: of its inner optimizer.
      turn: i32[], of the server when it last took part.
    """

    params: PyTree
    base: PyTree
    opt_state: PyTree
    turn: Array


@register(breaks=OWN_STEP)
def streaming_diloco(
    model: Model, task: Task, local: Local, *,
    fragments: int = 2, learning_rate: float = 0.7, momentum: float = 0.9,
    delay_steps: int = 0, own_share: float = 0.0,
) -> Algorithm:  # fmt: skip
    """Streaming DiLoCo: a round exchanges one fragment of the model.

    Partition: parameters and statistics are shared; clients keep parameters of their own between
    the exchanges of a fragment. A round without a single upload changes nothing, and its fragment
    has another turn. A client that missed rounds gets the fragments that it missed, or the whole
    model if it missed them all, and the ledger counts them.

    Args:
      model, task: as in `fed_avg`.
      local: the inner optimizer, with the batch size and epochs of a round.
      fragments: P, which divides the number of the model's layers.
      learning_rate: of the outer steps.
      momentum: share of the last outer step of a fragment that the server keeps.
      delay_steps: local steps of a round before the fragment has arrived.
      own_share: of a client's own fragment in what it goes on with.
    Raises:
      ValueError: a value out of range, fragments that do not divide the layers.
    """
    check_rates(learning_rate=learning_rate, momentum=momentum, own_share=own_share)
    check_fragments(model, fragments)
    if delay_steps < 0:
        raise ValueError(f"delay_steps={delay_steps} must be 0 or more.")
    start, fit = continued_fit(objective(model, task), local)

    def init(variables: Variables) -> StreamingState:
        zeros = jax.tree.map(jnp.zeros_like, cut(variables.params, fragments))
        return StreamingState(variables, zeros, jnp.zeros((), jnp.int32))

    def send(state: StreamingState, public) -> StreamingDownload:
        params, last = state.variables.params, (state.turn - 1) % fragments
        fragment = state.variables._replace(params=fragment_at(cut(params, fragments), last))
        return StreamingDownload(state.turn, fragment, Aside(params))

    def init_client(download: StreamingDownload, data, profile, key) -> StreamingMemory:
        whole = _whole(download, fragments)
        return StreamingMemory(
            whole, whole, start(download.fragment._replace(params=whole)),
            jnp.int32(-1 - fragments),
        )  # fmt: skip

    def client(download: StreamingDownload, memory: StreamingMemory, data, profile, key):
        received = _whole(download, fragments)
        missed = download.turn - memory.turn
        is_new = _these(memory.params, fragments, download.turn, missed)
        is_late = missed > fragments  # its own parameters are of no use
        own = jax.tree.map(lambda x, new: jnp.where(is_late, new, x), memory.params, received)
        base = jax.tree.map(jnp.where, is_new, received, memory.base)
        opt_state, early = memory.opt_state, None
        variables = download.fragment._replace(params=own)
        if delay_steps:
            first_key, key = jax.random.split(key)
            some = jnp.minimum(profile.max_steps, delay_steps)
            variables, opt_state, early = fit(variables, opt_state, data, some, first_key)
        arrived = jax.tree.map(
            lambda new, mine, x: jnp.where(new & ~is_late, x + own_share * (mine - x), mine),
            is_new, variables.params, received,
        )  # fmt: skip
        left = _steps_left(local, data, profile, early)
        variables = variables._replace(params=arrived)
        trained, opt_state, info = fit(variables, opt_state, data, left, key)
        now = download.turn % fragments
        moved_by = difference(trained, download.fragment._replace(params=base))
        part = moved_by._replace(params=fragment_at(cut(moved_by.params, fragments), now))
        kept = StreamingMemory(trained.params, base, opt_state, download.turn)
        caught_up = jnp.clip(missed - 1, 0, fragments - 1).astype(jnp.float32)
        info = _together(info, early).measured(caught_up=caught_up)
        return weighted(info.examples, part), kept, info

    def server(state: StreamingState, totals: Mean, public, key: Key):
        new = _outer_step(state, mean(totals), fragments, learning_rate, momentum)
        came = anybody(totals.den)
        return jax.tree.map(lambda a, b: jnp.where(came, a, b), new, state), {}

    bucket = Bucket(
        model, send, client, init_client, most_caught_up=fragments - 1, changes_places=True
    )
    return Algorithm(init, (bucket,), server, model)


def _outer_step(
    state: StreamingState, step: Variables, fragments: int, learning_rate: float, momentum: float
) -> StreamingState:
    """A step of Nesterov's method of the fragment whose turn it is, by the clients' mean step."""
    now = state.turn % fragments
    trace = jax.tree.map(
        lambda m, d: momentum * m[now] + d.astype(m.dtype), state.momentum, step.params
    )
    pieces = cut(state.variables.params, fragments)
    piece = jax.tree.map(
        lambda x, d, m: x + learning_rate * (d.astype(x.dtype) + momentum * m),
        fragment_at(pieces, now), step.params, trace,
    )  # fmt: skip
    params = joined(with_fragment(pieces, now, piece), state.variables.params)
    still = jax.tree.map(jnp.zeros_like, params)
    variables = moved(state.variables._replace(params=params), (still, exact(step.stats)))
    return StreamingState(variables, with_fragment(state.momentum, now, trace), state.turn + 1)


def _whole(download: StreamingDownload, pieces: int) -> PyTree:
    """The parameters of the global model, in which the last fragment is as it was sent."""
    params = download.missed.value
    last = (download.turn - 1) % pieces
    return joined(with_fragment(cut(params, pieces), last, download.fragment.params), params)


def _these(like: PyTree, pieces: int, turn: Array, missed: Array) -> PyTree:
    """bool leaves: which parameters lie in the `missed` fragments that moved before `turn`."""
    age = (turn - 1 - jnp.arange(pieces)) % pieces  # of fragments, 0 for the last that moved
    of = lambda x: jnp.broadcast_to((age < missed).reshape(-1, *[1] * (x.ndim - 1)), x.shape)
    return joined(jax.tree.map(of, cut(like, pieces)), like)


def _steps_left(local: Local, data: ClientData, profile: Profile, early: Info | None) -> Array:
    """i32[]: the steps of a round that are left after the early ones."""
    if early is None:
        return profile.max_steps
    steps = local.epochs * -(-data.count // local.batch_size)
    return jnp.minimum(profile.max_steps, steps) - early.spent.steps.astype(jnp.int32)


def _together(info: Info, early: Info | None) -> Info:
    """The report of both parts of a round."""
    if early is None:
        return info
    return info._replace(
        spent=Spent(info.spent.steps + early.spent.steps),
        loss_total=info.loss_total + early.loss_total,
        loss_count=info.loss_count + early.loss_count,
    )
