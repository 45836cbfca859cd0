"""The round engine: whole rounds, many of them, as one compiled program on a device mesh.

`shard_map` over the mesh axis "clients"; on each device a loop over its clients, some of them at a
time under `vmap`; one psum of the sums of each bucket. A mesh axis "tensor" splits each client's
model (`jaxfm.federated.tensor`). Who takes part, how many steps and how much data are arrays, so a
new cohort never compiles anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxfm.federated import homes, tensor
from jaxfm.federated.algorithm import Algorithm, Bucket, added
from jaxfm.federated.client_steps import client_after_client, client_of, client_step
from jaxfm.federated.cohort import (
    Rate,
    Report,
    RoundInfo,
    Slots,
    Whereabouts,
    cohorts_of,
    count_slots,
    deal,
    draw,
    joined,
    round_keys,
)
from jaxfm.federated.population import Population, check_population, check_unmoved
from jaxfm.model import Array, Key, PyTree, Variables
from jaxfm.parallel.mesh import make_mesh, put


class RunState(NamedTuple):
    """All that a run needs to go on; saving it resumes the run exactly.

    Attributes:
      server: the algorithm's server state.
      memories: per bucket, what its clients keep between rounds; leaves [its clients, ...], in the
        order of `Rounds.members`.
      round: i32[], rounds done.
      key: of the whole run; the key of a round and of a client are folded from it.
    """

    server: PyTree
    memories: tuple[PyTree, ...]
    round: Array
    key: Key


class Rounds(NamedTuple):
    """A federated run as two functions.

    Attributes:
      init: `(variables, key) -> RunState`.
      run: `(state, population=None, drop_rate=None) -> (state, info: RoundInfo)`: `num_rounds`
        rounds; the given state is donated. Another drop rate, or a population with other numbers
        (data, counts, profiles) in the same shapes, buckets and homes, may take the place of the
        first one; nothing compiles anew.
      members: per bucket, i32[rows], the client that each row of its memories belongs to; -1 for
        rows that only fill a device.
    """

    init: Callable[[Variables, Key], Any]
    run: Callable[..., tuple[Any, RoundInfo]]
    members: tuple[np.ndarray, ...]


def default_clients_at_once() -> int | None:
    """Clients at a time on one device: 1 on a CPU, all of them (None) on an accelerator.

    A product batched over clients with weights of their own runs slower on a CPU than the same
    products one after another (docs/results/rounds.md); an accelerator wants the parallelism.
    """
    return 1 if jax.default_backend() == "cpu" else None


class _Engine(NamedTuple):
    """What is fixed when rounds are compiled."""

    algorithm: Algorithm
    mesh: Mesh
    members: tuple[np.ndarray, ...]
    slots: tuple[tuple[int, int], ...]  # by bucket: on all devices, clients at once
    num_clients: int
    cohort_size: int
    num_rounds: int
    lives_at_home: bool
    rate: Rate  # of Poisson sampling, for `cohort_size` places


def compile_rounds(
    algorithm: Algorithm,
    population: Population,
    *,
    cohort_size: int,
    num_rounds: int = 1,
    drop_rate: float = 0.0,
    public: PyTree = None,
    mesh: Mesh | None = None,
    clients_at_once: int | None = None,
) -> Rounds:
    """Compiles `num_rounds` rounds of an algorithm into one function.

    Each round draws `cohort_size` clients without replacement; where an algorithm is private by
    Poisson sampling (`Sampling.kind`), each by itself, `cohort_size` on average. A client that
    drops out, has no data or comes back with a non-finite upload counts for nothing, and its memory
    stays as it was.

    Args:
      algorithm: what is run.
      population: who there is.
      cohort_size: clients drawn a round, at most the population.
      num_rounds: rounds per call of `run`.
      drop_rate: probability with which a drawn client fails to report.
      public: data of the server's own, handed to `send`, `receive` and `server`.
      mesh: with an axis "clients", and maybe "tensor", over which a client's model is split; None:
        all devices, of which each holds whole clients.
      clients_at_once: clients that one device runs side by side; None: chosen per backend.
    Raises:
      ValueError: the cohort exceeds the population, arrays disagree on the number of clients, a
        bucket, a home, a row of a client or an example does not exist, or the cohorts are not those
        that the algorithm's privacy accounts for.
    """
    mesh = make_mesh(clients=len(jax.devices())) if mesh is None else mesh
    at_once = default_clients_at_once() if clients_at_once is None else clients_at_once
    _check_options(mesh, num_rounds, at_once)
    _check_drop_rate(drop_rate)
    check = functools.partial(
        check_population,
        num_buckets=len(algorithm.buckets),
        cohort_size=cohort_size,
        devices=mesh.shape["clients"],
    )
    check(population)
    cohort_size, rate = cohorts_of(algorithm, len(population.bucket), cohort_size)
    engine, where = _engine(algorithm, population, mesh, cohort_size, num_rounds, at_once, rate)
    everywhere = NamedSharding(mesh, P())
    place = lambda tree: jax.tree.map(lambda x: put(x, everywhere), tree)
    given = homes.settle(population, mesh)
    fixed = place((where, public))
    first_rate = place(np.float32(drop_rate))
    at_home = NamedSharding(mesh, P("clients")) if engine.lives_at_home else everywhere
    state_sharding: Any = RunState(everywhere, at_home, everywhere, everywhere)  # type: ignore[arg-type]
    if tensor.is_split(mesh):
        state_sharding = None  # by leaf: `_placed`
    compiled = jax.jit(
        functools.partial(_run, engine),
        donate_argnums=0,
        out_shardings=(state_sharding, everywhere),
    )
    first = jax.jit(functools.partial(_first, engine), out_shardings=state_sharding)

    def init(variables: Variables, key: Key) -> RunState:
        axes = algorithm.model and algorithm.model.axes
        tensor.check_divides(variables, axes, mesh)
        split = jax.tree.map(put, variables, tensor.places(variables, axes, mesh))
        return first(split, place(key), given, fixed)

    def run(state: RunState, people: Population | None = None, drop_rate: float | None = None):
        rate, settled = first_rate, given
        if drop_rate is not None:
            _check_drop_rate(drop_rate)
            rate = place(np.float32(drop_rate))
        if people is not None:
            check(people)
            check_unmoved(population, people)
            settled = homes.settle(people, mesh)
        return compiled(state, (settled, (*fixed, rate)))

    return Rounds(init, run, engine.members)


def _engine(
    algorithm: Algorithm, population: Population, mesh: Mesh, cohort_size: int, num_rounds: int,
    at_once: int | None, rate: Rate,
) -> tuple[_Engine, Whereabouts]:  # fmt: skip
    devices, lives_at_home = mesh.shape["clients"], population.home is not None
    where, members = homes.find(population, len(algorithm.buckets), devices)
    slots = tuple(count_slots(cohort_size, ids, devices, at_once, lives_at_home) for ids in members)
    engine = _Engine(
        algorithm=algorithm,
        mesh=mesh,
        members=members,
        slots=slots,
        num_clients=len(population.bucket),
        cohort_size=cohort_size,
        num_rounds=num_rounds,
        lives_at_home=lives_at_home,
        rate=rate,
    )
    return engine, where


def _run(engine: _Engine, state: RunState, constants) -> tuple[RunState, RoundInfo]:
    def step(state: RunState, _) -> tuple[RunState, RoundInfo]:
        state, info = _one_round(engine, state, constants)
        return _placed(engine, state), info

    if engine.num_rounds == 1:
        state, info = step(state, None)
        return state, jax.tree.map(lambda x: x[None], info)
    return lax.scan(step, state, length=engine.num_rounds)


def _placed(engine: _Engine, state: RunState) -> RunState:
    """The state, split over "tensor" where the mesh has it."""
    if not tensor.is_split(engine.mesh):
        return state
    model = engine.algorithm.model
    places = functools.partial(tensor.places, axes=model and model.axes, mesh=engine.mesh)
    rows = P("clients") if engine.lives_at_home else P(None)
    hold = lax.with_sharding_constraint
    memories = hold(state.memories, places(state.memories, rows=rows))
    return state._replace(server=hold(state.server, places(state.server)), memories=memories)


def _one_round(engine: _Engine, state: RunState, constants) -> tuple[RunState, RoundInfo]:
    people, (where, public, drop_rate) = constants
    algorithm, devices = engine.algorithm, engine.mesh.shape["clients"]
    _, _, client_key, server_key = round_keys(state.key, state.round)
    drawn, reporting = draw(
        state.key, state.round, engine.num_clients, engine.cohort_size, drop_rate, engine.rate
    )
    totals, memories = None, list(state.memories)
    slots: list[Slots | None] = [None] * len(algorithm.buckets)
    reports: list[Report | None] = [None] * len(algorithm.buckets)
    for b, bucket in enumerate(algorithm.buckets):
        count, at_once = engine.slots[b]
        if not len(engine.members[b]):
            continue
        past = len(engine.members[b]) // (devices if engine.lives_at_home else 1)
        own = deal(drawn, where, b, count, devices, past)
        sums, received, report, kept = _over_devices(engine, bucket, at_once)(
            state.server, public, people, state.memories[b], own,
            own.taken & reporting[own.client], client_key,
        )  # fmt: skip
        if bucket.combine is not None:
            sums = bucket.combine(state.server, received, report.counted > 0)
        if not engine.lives_at_home:
            write = lambda x, new, at=own.memory: x.at[at].set(new, mode="drop")
            kept = jax.tree.map(write, state.memories[b], kept)
        slots[b], reports[b], memories[b] = own, report, kept
        lifted = bucket.lift(state.server, sums)
        totals = lifted if totals is None else added(totals, lifted)
    server, figures = algorithm.server(state.server, totals, public, server_key)
    info = joined(drawn, slots, reports, figures)
    return RunState(server, tuple(memories), state.round + 1, state.key), info


def _over_devices(engine: _Engine, bucket: Bucket, at_once: int) -> Callable:
    """The part of a round that one bucket's clients do, spread over the devices.

    Returns:
      A function that gives the sums of what was received; with `Bucket.combine`, what was received
      itself, by slot; the reports, by slot; and memories, by slot or, at home, by row.
    """

    def on_device(server, public, people, memories, slots: Slots, present: Array, key: Key):
        download = bucket.send(server, public)
        one = functools.partial(client_step, bucket, download, server, public, people, key)
        own = jax.tree.map(lambda x: jnp.take(x, slots.memory, axis=0, mode="clip"), memories)
        sums, received, reports, own = client_after_client(
            one, (slots.client, slots.row, present), own, slots.taken, at_once,
            is_sum=bucket.combine is None,
        )  # fmt: skip
        if engine.lives_at_home:
            write = lambda x, new: x.at[slots.memory].set(new, mode="drop")
            own = jax.tree.map(write, memories, own)
        # XLA's partitioner knows no sum over one device of a mesh that is split otherwise.
        total = lax.psum(sums, "clients") if engine.mesh.shape["clients"] > 1 else sums
        return total, received, reports, own

    spread = P("clients")
    held = spread if engine.lives_at_home else P()
    return jax.shard_map(
        on_device,
        mesh=engine.mesh,
        in_specs=(P(), P(), held, held, spread, spread, P()),
        out_specs=(P(), spread, spread, spread),
        axis_names=_by_hand(engine.mesh),
        check_vma=False,
    )


def _by_hand(mesh: Mesh) -> set[str]:
    """The mesh axes of `shard_map`: all but "tensor", over which XLA splits a client's work."""
    return {name for name in mesh.axis_names if name != "tensor" or not tensor.is_split(mesh)}


def _first(engine: _Engine, variables: Variables, key: Key, people, fixed) -> RunState:
    """The state before the first round."""
    where, public = fixed
    server = engine.algorithm.init(variables)
    init_key = jax.random.fold_in(key, 2**32 - 1)  # no round has this number

    def of_bucket(bucket: Bucket, ids: np.ndarray) -> PyTree:
        if not len(ids):
            return ()

        def on_device(server, public, people, clients: Array, rows: Array, key: Key) -> PyTree:
            download = bucket.send(server, public)

            def one(client: Array, row: Array) -> PyTree:
                own_key = jax.random.fold_in(key, client)
                return bucket.init_client(download, *client_of(people, row), own_key)

            return jax.vmap(one)(clients, rows)

        clients = jnp.maximum(jnp.asarray(ids, jnp.int32), 0)
        inputs = (server, public, people, clients, where.row[clients], init_key)
        if not engine.lives_at_home:
            return on_device(*inputs)
        spread = P("clients")
        return jax.shard_map(
            on_device, mesh=engine.mesh, in_specs=(P(), P(), spread, spread, spread, P()),
            out_specs=spread, axis_names=_by_hand(engine.mesh), check_vma=False,
        )(*inputs)  # fmt: skip

    memories = tuple(map(of_bucket, engine.algorithm.buckets, engine.members))
    return _placed(engine, RunState(server, memories, jnp.zeros((), jnp.int32), key))


def _check_options(mesh: Mesh, num_rounds: int, at_once: int | None) -> None:
    if "clients" not in mesh.shape:
        raise ValueError(f"The mesh needs an axis 'clients'; it has {dict(mesh.shape)}.")
    if num_rounds < 1:
        raise ValueError(f"num_rounds must be at least 1, got {num_rounds}.")
    if at_once is not None and at_once < 1:
        raise ValueError(f"clients_at_once must be at least 1, got {at_once}.")


def _check_drop_rate(drop_rate: float) -> None:
    if not 0 <= drop_rate < 1:
        raise ValueError(f"drop_rate must be in [0, 1), got {drop_rate}.")
