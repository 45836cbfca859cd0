"""Asynchronous server steps, many of them, as one compiled program.

    x_(t+1) = server(x_t, (sum_k s(t - t_k) n_k d_k) / sum_k n_k)

d_k is the movement of a client that started at step t_k. The K updates of a buffer are averaged as
in a synchronous round, each by its weight s of staleness in the numerator alone: a buffer of old
updates moves the model less. With `mixes_models` a client's model counts in the place of its
movement, d_k = y_k - x_t, so that with K = 1, a rate a and a server that averages

    x_(t+1) = (1 - a s) x_t + a s y_k

Sources: Nguyen et al. 2022 (FedBuff, arXiv 2106.06639), Algorithm 1; Xie et al. 2019 (FedAsync,
arXiv 1903.03934), Algorithm 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxfm.federated import homes
from jaxfm.federated.algorithm import Algorithm, Bucket, Exact, Mean, exact, scaled
from jaxfm.federated.asynchronous.schedule import Schedule
from jaxfm.federated.asynchronous.staleness import Staleness, polynomial
from jaxfm.federated.averaging import Movement
from jaxfm.federated.client_steps import client_after_client, client_step
from jaxfm.federated.cohort import RoundInfo, Slots, joined, round_keys
from jaxfm.federated.population import Population
from jaxfm.federated.rounds import Rounds, RunState, compile_rounds, default_clients_at_once
from jaxfm.federated.tensor import is_split
from jaxfm.model import Array, Key, PyTree, Variables
from jaxfm.parallel.mesh import make_mesh, put

_AGAIN = 2**31 - 1  # less a number of starts; no client has such a number


class AsyncState(NamedTuple):
    """All that an asynchronous run needs to go on.

    Attributes:
      server, memories, key: as of `RunState`; memories of one bucket.
      round: i32[], server steps done.
      sent: what clients could download at the last H versions; leaves [H, ...], version v at v
        mod H.
    """

    server: PyTree
    memories: tuple[PyTree, ...]
    round: Array
    key: Key
    sent: PyTree


def compile_asynchronous(
    algorithm: Algorithm,
    population: Population,
    schedule: Schedule,
    *,
    num_rounds: int = 1,
    staleness: Staleness | None = None,
    rate: float = 1.0,
    mixes_models: bool = False,
    history: int | None = None,
    public: PyTree = None,
    mesh: Mesh | None = None,
    clients_at_once: int | None = None,
) -> Rounds:
    """Compiles asynchronous server steps of an algorithm.

    A client that is lost never arrives, and its memory stays as it was; one whose update is not
    finite counts for nothing.

    Args:
      algorithm: with one kind of client, whose uploads are a `Mean` of movements.
      population: who there is; everybody's data on every device.
      schedule: of all steps of the run.
      num_rounds: steps per call of `run`.
      staleness: the weight of an update by its age; None: `polynomial(0.5)`.
      rate: a, on every update.
      mixes_models: a client's model counts, in the place of its movement (FedAsync).
      history: H, versions that are kept; None: as many as the schedule needs. It is a part of the
        state, and so of checkpoints.
      public, mesh, clients_at_once: as in `compile_rounds`.
    Returns:
      `Rounds` over `AsyncState`: `run(state)` takes the steps of the schedule that are next, and
      `info.server` has the mean "staleness" of a step's updates and its simulated "seconds".
    Raises:
      ValueError: unequal clients, predictions, privacy, clients with homes, uploads that are no
        `Mean`; a schedule of other clients, or of older updates than the history has; a rate
        outside (0, 1].
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate={rate} must be in (0, 1].")
    oldest = int(schedule.behind.max(initial=0))
    history = oldest + 1 if history is None else history
    if oldest >= history:
        raise ValueError(
            f"An update of the schedule is {oldest} steps old, and history={history} versions are "
            f"kept; keep {oldest + 1}."
        )
    mesh = make_mesh(clients=len(jax.devices())) if mesh is None else mesh
    _check(algorithm, population, schedule, mesh)
    weigh = staleness or polynomial(0.5)
    places = schedule.client.shape[1]
    steps = _steps(
        algorithm, mesh, history, places, clients_at_once, lambda behind: rate * weigh(behind),
        mixes_models,
    )  # fmt: skip
    synchronous = compile_rounds(
        algorithm, population, cohort_size=min(places, len(population.bucket)), public=public,
        num_rounds=num_rounds, mesh=mesh, clients_at_once=steps.at_once,
    )  # fmt: skip
    everywhere = NamedSharding(mesh, P())
    place = lambda tree: jax.tree.map(lambda x: put(x, everywhere), tree)
    fixed = (homes.settle(population, mesh), place(public))
    bucket = algorithm.buckets[0]

    @functools.partial(jax.jit, out_shardings=everywhere)
    def first(run: RunState, public: PyTree) -> AsyncState:
        sent = bucket.send(run.server, public)
        repeated = lambda x: jnp.broadcast_to(x, (history, *x.shape))
        return AsyncState(*run, jax.tree.map(repeated, sent))

    def init(variables: Variables, key: Key) -> AsyncState:
        state = synchronous.init(variables, key)
        _check_uploads(bucket, state, fixed, mixes_models)
        return first(state, fixed[1])

    compiled = jax.jit(
        functools.partial(_run, steps), donate_argnums=0, out_shardings=(everywhere, everywhere)
    )
    lasting = np.diff(schedule.seconds, prepend=0.0).astype(np.float32)
    table = (schedule.client, schedule.version, schedule.again, lasting)

    def run(state: AsyncState) -> tuple[AsyncState, RoundInfo]:
        done = int(state.round)
        if done + num_rounds > len(schedule.client):
            raise ValueError(
                f"{done} steps are done of {len(schedule.client)} in the schedule, and "
                f"{num_rounds} more were asked for; give a longer one."
            )
        return compiled(state, place([x[done : done + num_rounds] for x in table]), fixed)

    return Rounds(init, run, synchronous.members)


class _Steps(NamedTuple):
    """What is fixed when steps are compiled."""

    algorithm: Algorithm
    mesh: Mesh
    history: int
    slots: int  # on all devices
    at_once: int
    weigh: Staleness
    mixes_models: bool


def _steps(algorithm, mesh, history, places, clients_at_once, weigh, mixes_models) -> _Steps:
    """With as many slots as whole groups of clients on every device take."""
    devices = mesh.shape["clients"]
    share = math.ceil(places / devices)
    at_once = default_clients_at_once() if clients_at_once is None else clients_at_once
    at_once = share if at_once is None else min(at_once, share)
    slots = math.ceil(share / at_once) * at_once * devices
    return _Steps(algorithm, mesh, history, slots, at_once, weigh, mixes_models)


def _run(steps: _Steps, state: AsyncState, arrivals, fixed) -> tuple[AsyncState, RoundInfo]:
    return lax.scan(lambda s, a: _step(steps, s, a, fixed), state, arrivals)


def _step(steps: _Steps, state: AsyncState, arrivals, fixed) -> tuple[AsyncState, RoundInfo]:
    """One server step, of the updates in the buffer."""
    people, public = fixed
    (bucket,) = steps.algorithm.buckets
    *arrivals, lasting = arrivals
    now = bucket.send(state.server, public)
    write = lambda x, new: x.at[state.round % steps.history].set(new)
    sent = jax.tree.map(write, state.sent, now)
    places = arrivals[0].shape[0]
    client, version, again = (
        jnp.pad(x, (0, steps.slots - places), constant_values=fill)
        for x, fill in zip(arrivals, (-1, state.round, 0), strict=True)
    )
    order = jnp.arange(steps.slots).reshape(-1, steps.mesh.shape["clients"]).T.reshape(-1)
    client, version, again = client[order], version[order], again[order]
    taken, row = client >= 0, jnp.maximum(client, 0)
    num_clients = people[0].count.shape[0]
    slots = Slots(row, taken, order, row, jnp.where(taken, row, num_clients))
    sums, report, kept = _over_devices(steps)(
        state.server, public, people, state.memories[0], sent, slots, (version, again), state.round,
        state.key,
    )  # fmt: skip
    keep = lambda x, new: x.at[slots.memory].set(new, mode="drop")
    memories = jax.tree.map(keep, state.memories[0], kept)
    server_key = round_keys(state.key, state.round)[3]
    server, figures = steps.algorithm.server(
        state.server, bucket.lift(state.server, sums), public, server_key
    )
    age = jnp.where(taken, state.round - version, 0).sum() / jnp.maximum(taken.sum(), 1)
    figures = figures | {"staleness": age.astype(jnp.float32), "seconds": lasting}
    info = joined(arrivals[0], [slots], [report], figures)
    return AsyncState(server, (memories,), state.round + 1, state.key, sent), info


def _over_devices(steps: _Steps) -> Callable:
    """The part of a step that clients do: (sums, reports and memories by slot)."""
    (bucket,) = steps.algorithm.buckets

    def on_device(
        server, public, people, memories, sent, slots: Slots, start, now: Array, key: Key
    ):
        def one(client, row, present, version, again, memory):
            download = jax.tree.map(lambda x: x[version % steps.history], sent)
            own_key = round_keys(key, version)[2]
            own_key = jnp.where(again > 0, jax.random.fold_in(own_key, _AGAIN - again), own_key)
            received, memory, report = client_step(
                bucket, download, server, public, people, own_key, client, row, present, memory
            )
            if steps.mixes_models:
                received = _of_models(received, download, bucket.send(server, public))
            weight = steps.weigh((now - version).astype(jnp.float32))
            return received._replace(num=scaled(weight, received.num)), memory, report

        own = jax.tree.map(lambda x: jnp.take(x, slots.memory, axis=0, mode="clip"), memories)
        inputs = (slots.client, slots.row, slots.taken, *start)
        sums, _, reports, own = client_after_client(one, inputs, own, slots.taken, steps.at_once)
        return lax.psum(sums, "clients"), reports, own

    spread = P("clients")
    return jax.shard_map(
        on_device,
        mesh=steps.mesh,
        in_specs=(P(), P(), P(), P(), P(), spread, spread, P(), P()),
        out_specs=(P(), spread, spread),
        check_vma=False,
    )


def _of_models(received: Mean, then: Variables, now: Variables) -> Mean:
    """The summand of a model in the place of its movement: n (y - x_t) for n (y - x_then)."""
    weight = exact(received.den)
    less = lambda a, b: jax.tree.map(jnp.subtract, a, b)
    gap = Movement(less(then.params, now.params), Exact(less(then.stats, now.stats)))
    add = lambda num, d: num + weight.astype(num.dtype) * d.astype(num.dtype)
    return received._replace(num=jax.tree.map(add, received.num, gap))


def _check(algorithm: Algorithm, population: Population, schedule: Schedule, mesh: Mesh) -> None:
    buckets = algorithm.buckets
    if len(buckets) != 1 or buckets[0].sends_predictions or buckets[0].combine is not None:
        raise ValueError(
            "Asynchronous steps take algorithms with one kind of client, whose movements are "
            "averaged, such as fed_avg, fed_prox or fed_adam."
        )
    if algorithm.privacy is not None:
        raise ValueError(
            "The privacy of this algorithm accounts for cohorts that are drawn for a round, and "
            "asynchronous steps have none."
        )
    if population.home is not None:
        raise ValueError("Clients with homes cannot arrive at any time; leave Population.home out.")
    if is_split(mesh):
        raise ValueError(
            f"Asynchronous steps run a client on one device, and the mesh splits it over "
            f"tensor={mesh.shape['tensor']}; give one of clients alone."
        )
    if schedule.client.max(initial=-1) >= len(population.bucket):
        raise ValueError(
            f"The schedule has a client {schedule.client.max()}, and the population has "
            f"{len(population.bucket)}."
        )


def _check_uploads(bucket: Bucket, state: RunState, fixed: Any, mixes_models: bool) -> None:
    people, public = fixed
    zero = jnp.zeros((), jnp.int32)

    def received(server, memory):
        download = bucket.send(server, public)
        return client_step(
            bucket, download, server, public, people, state.key, zero, zero, zero > 0, memory
        )[0]

    memory = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state.memories[0])
    found: Any = jax.eval_shape(received, state.server, memory)
    if not isinstance(found, Mean):
        raise ValueError(
            "Asynchronous steps weigh the numerator of a Mean by its age; this algorithm uploads a "
            f"{type(found).__name__}."
        )
    if mixes_models and not isinstance(found.num, Movement):
        raise ValueError(
            "mixes_models needs uploads of whole movements, such as those of fed_avg; this "
            f"algorithm averages a {type(found.num).__name__}."
        )
