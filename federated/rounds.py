"""The round engine: whole rounds, many of them, as one compiled program on a device mesh.

`shard_map` over the mesh axis "clients"; on each device a loop over its clients, `width` of them at
a time under `vmap`; one psum of the sums of each bucket. Who takes part, how many steps and how
much data are arrays, so a new cohort never compiles anew.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxfm.data.federation import Federation
from jaxfm.federated.algorithm import Algorithm, Bucket, ClientData, Profile
from jaxfm.model import Array, Key, PyTree, Variables
from jaxfm.parallel.mesh import make_mesh, put

# What a client reports of its work, which counts though its update may not.
SPENT = ("steps", "bytes_up", "flops")


class Population(NamedTuple):
    """Everybody who might take part.

    Attributes:
      federation: the clients' training data.
      profiles: their machines, leaves [C].
      bucket: i32[C], which bucket of the algorithm each client belongs to.
      held: rows that clients hold back from training and may select by, over the same examples;
        None: none.
    """

    federation: Federation
    profiles: Profile
    bucket: np.ndarray
    held: Federation | None = None


class RunState(NamedTuple):
    """All that a run needs to go on; saving it resumes the run exactly.

    Attributes:
      server: the algorithm's server state.
      memories: per bucket, what its clients keep between rounds; leaves [its clients, ...].
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
      run: `(state, population=None) -> (state, info)`: `num_rounds` rounds; the given state is
        donated. A population with other numbers (data, counts, profiles) in the same shapes and
        buckets may take the place of the first one; nothing compiles anew. `info` is a dict of
        arrays with a leading axis of rounds: the algorithm's own sums over clients, and
        f32[R, buckets] "selected", "clients" (whose update counted), "non_finite" (left out) and
        "steps", of these too.
    """

    init: Callable[[Variables, Key], RunState]
    run: Callable[..., tuple[RunState, dict[str, Array]]]


def default_width() -> int | None:
    """Clients at a time on one device: 1 on a CPU, all of them on an accelerator.

    A product batched over clients with weights of their own runs slower on a CPU than the same
    products one after another (docs/results/rounds.md); an accelerator wants the parallelism.
    """
    return 1 if jax.default_backend() == "cpu" else None


def rounds(
    algorithm: Algorithm,
    population: Population,
    *,
    cohort_size: int,
    num_rounds: int = 1,
    drop_rate: float = 0.0,
    public: PyTree = None,
    mesh: Mesh | None = None,
    width: int | None = None,
) -> Rounds:
    """Compiles `num_rounds` rounds of an algorithm into one function.

    Each round draws `cohort_size` clients without replacement. A client that drops out, has no
    data or comes back with a non-finite upload counts for nothing, and its memory stays as it was.

    Args:
      algorithm: what is run.
      population: who there is.
      cohort_size: clients drawn a round, at most the population.
      num_rounds: rounds per call of `run`.
      drop_rate: probability with which a drawn client fails to report.
      public: data of the server's own, handed to `send` and `server`.
      mesh: with an axis "clients"; None: all devices.
      width: clients at a time on one device; None: `default_width()`.
    Raises:
      ValueError: the cohort exceeds the population, arrays disagree on the number of clients, or a
        bucket, a row of a client or an example does not exist.
    """
    bucket_of = np.asarray(population.bucket)
    num_clients = _check(algorithm, population, cohort_size, num_rounds, drop_rate, width)
    mesh = make_mesh(clients=len(jax.devices())) if mesh is None else mesh
    if "clients" not in mesh.shape:
        raise ValueError(f"The mesh needs an axis 'clients'; it has {dict(mesh.shape)}.")
    devices = mesh.shape["clients"]
    width = default_width() if width is None else width
    members = [np.flatnonzero(bucket_of == b) for b in range(len(algorithm.buckets))]
    everywhere = NamedSharding(mesh, P())
    place = lambda tree: jax.tree.map(lambda x: put(x, everywhere), tree)
    # The place of each client among the memories of its bucket.
    row = np.zeros(num_clients, np.int32)
    for ids in members:
        row[ids] = np.arange(len(ids))
    numbers = lambda people: place(
        (people.federation, people.profiles, people.held and people.held[1:])
    )
    given = numbers(population)
    fixed = place((public, bucket_of, row, np.float32(drop_rate)))
    slots = [_slots(min(cohort_size, len(ids)), devices, width) for ids in members]

    def one_round(state: RunState, constants) -> tuple[RunState, dict[str, Array]]:
        people, (public, bucket_of, row, drop_rate) = constants
        _, _, client_key, server_key = _round_keys(state.key, state.round)
        drawn, reports = draw(state.key, state.round, num_clients, cohort_size, drop_rate)

        def of_bucket(b: int, bucket: Bucket):
            """The sums, new memories and info of one bucket's part of the cohort."""
            ids, taken = _deal(drawn, bucket_of[drawn] == b, slots[b][0], devices, turn=b)
            # Empty slots point past the end: read clipped, written nowhere.
            at = jnp.where(taken, row[ids], len(members[b]))
            read = lambda x: jnp.take(x, at, axis=0, mode="clip")
            write = lambda x, new: x.at[at].set(new, mode="drop")
            present = (taken & reports[ids]).astype(jnp.float32)
            sums, info, cohort = _spread(bucket, mesh, slots[b][1])(
                state.server, public, people,
                jax.tree.map(read, state.memories[b]), ids, taken, present, client_key,
            )  # fmt: skip
            info["selected"] = taken.sum(dtype=jnp.float32)
            return (
                bucket.lift(state.server, sums),
                jax.tree.map(write, state.memories[b], cohort),
                info,
            )

        totals, memories = None, list(state.memories)
        infos: list[dict[str, Array]] = [{} for _ in algorithm.buckets]
        for b, bucket in enumerate(algorithm.buckets):
            if len(members[b]):
                sums, memories[b], infos[b] = of_bucket(b, bucket)
                totals = sums if totals is None else jax.tree.map(jnp.add, totals, sums)
        server, info = algorithm.server(state.server, totals, public, server_key)
        return RunState(server, tuple(memories), state.round + 1, state.key), _merge(infos) | info

    def many_rounds(state: RunState, constants):
        if num_rounds == 1:
            state, info = one_round(state, constants)
            return state, jax.tree.map(lambda x: x[None], info)
        return lax.scan(lambda s, _: one_round(s, constants), state, length=num_rounds)

    compiled = jax.jit(many_rounds, donate_argnums=0, out_shardings=everywhere)

    @jax.jit
    def first(variables: Variables, key: Key, given, fixed) -> RunState:
        server = algorithm.init(variables)
        own = functools.partial(_first_memories, server, fixed[0], given, key)
        memories = tuple(map(own, algorithm.buckets, members))
        return RunState(server, memories, jnp.zeros((), jnp.int32), key)

    def init(variables: Variables, key: Key) -> RunState:
        return place(first(variables, key, given, fixed))

    def run(state: RunState, people: Population | None = None):
        if people is None:
            return compiled(state, (given, fixed))
        _check(algorithm, people, cohort_size, num_rounds, drop_rate, width)
        if not np.array_equal(people.bucket, bucket_of):
            raise ValueError("Clients cannot change their bucket between calls; call rounds anew.")
        return compiled(state, (numbers(people), fixed))

    return Rounds(init, run)


def draw(
    key: Key, number: Array | int, num_clients: int, cohort_size: int, drop_rate: Array | float
) -> tuple[Array, Array]:
    """Who takes part in a round, as a function of the run's key: what a log says of it, too.

    Args:
      key: of the run, as given to `Rounds.init`.
      number: i32[], of the round; the first is 0.
    Returns:
      The clients drawn, i32[cohort_size], and bool[num_clients], who reports if drawn (and has
      data).
    """
    choose_key, report_key, _, _ = _round_keys(key, number)
    reports = jax.random.bernoulli(report_key, 1 - drop_rate, (num_clients,))
    return lax.top_k(jax.random.bits(choose_key, (num_clients,)), cohort_size)[1], reports


def _round_keys(key: Key, number: Array | int) -> Array:
    """Keys of the choice, of failures, of clients and of the server."""
    return jax.random.split(jax.random.fold_in(key, number), 4)


def _deal(drawn: Array, mine: Array, count: int, devices: int, turn: int) -> tuple[Array, Array]:
    """Client ids i32[count] of one bucket's slots and whether each is taken, device by device.

    Taken slots come first on every device; buckets begin from either end in turn.
    """
    first = jnp.argsort(~mine, stable=True)[:count]
    pad = (0, count - first.shape[0])
    spread = lambda x: jnp.pad(x, pad).reshape(-1, devices)[:, :: (-1) ** turn].T.reshape(-1)
    return spread(drawn[first]), spread(mine[first])


def _first_memories(
    server: PyTree, public: PyTree, people, key: Key, bucket: Bucket, ids: np.ndarray
) -> PyTree:
    """What the clients of a bucket start from, leaves [len(ids), ...]."""
    if not len(ids):
        return ()
    init_key = jax.random.fold_in(key, 2**32 - 1)  # no round has this number
    download = bucket.send(server, public)

    def one(client_id: Array) -> PyTree:
        own = jax.random.fold_in(init_key, client_id)
        return bucket.init_client(download, *_client_of(people, client_id), own)

    return jax.vmap(one)(jnp.asarray(ids, jnp.int32))


def _spread(bucket: Bucket, mesh: Mesh, width: int) -> Callable:
    """The part of a round that is spread over devices, for one bucket."""

    def run_one(download, server, public, people, key, client_id, present, memory):
        data, profile = _client_of(people, client_id)
        count = jnp.where(present > 0, data.count, 0)
        data = data._replace(count=count)
        upload, new, info = bucket.client(
            download, memory, data, profile, jax.random.fold_in(key, client_id)
        )
        finite = jnp.array([jnp.isfinite(x).all() for x in _floats((upload, new))]).all()
        counted = finite & (count > 0)
        keep = lambda x, otherwise: jnp.where(counted, x, otherwise)
        sums = bucket.receive(server, public, upload)
        sums = jax.tree.map(lambda x: keep(_wide(x), 0), sums)
        memory = jax.tree.map(keep, new, memory)
        spend = lambda x: jnp.where((count > 0) & jnp.isfinite(x), x, 0)
        spent = {name: spend(info[name]) for name in SPENT if name in info}
        info = jax.tree.map(lambda x: keep(x, 0), info) | spent
        info["clients"] = counted.astype(jnp.float32)
        info["non_finite"] = ((count > 0) & ~finite).astype(jnp.float32)
        return sums, memory, info

    def on_device(server, public, people, memories, ids, taken, present, key):
        download = bucket.send(server, public)
        one = lambda *slot: run_one(download, server, public, people, key, *slot)
        one = jax.jit(one, inline=True)  # traced once, for its shapes and in the loop
        shapes = jax.eval_shape(one, ids[0], present[0], jax.tree.map(lambda x: x[0], memories))
        sums_shape, _, info_shape = shapes
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (sums_shape, info_shape))

        def step(i, carry):
            sums, memories = carry
            slot = jax.tree.map(lambda x: x[i], (ids, present, memories))
            if width == 1:
                own, memory, info = one(*slot)
            else:
                own, memory, info = jax.vmap(one)(*slot)
                own, info = jax.tree.map(lambda x: x.sum(0), (own, info))
            write = lambda x, new: lax.dynamic_update_index_in_dim(x, new, i, 0)
            return jax.tree.map(jnp.add, sums, (own, info)), jax.tree.map(write, memories, memory)

        # Taken slots come first, so empty groups are never run.
        groups = (taken.sum(dtype=jnp.int32) + width - 1) // width
        if width > 1:
            ids, present, memories = jax.tree.map(
                lambda x: x.reshape(-1, width, *x.shape[1:]), (ids, present, memories)
            )
        sums, memories = lax.fori_loop(0, groups, step, (zeros, memories))
        if width > 1:
            memories = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), memories)
        return *lax.psum(sums, "clients"), memories

    spread = P("clients")
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(P(), P(), P(), spread, spread, spread, spread, P()),
        out_specs=(P(), P(), spread),
        check_vma=False,
    )


def _client_of(people, client_id: Array) -> tuple[ClientData, Profile]:
    """One client's part of (federation, profiles, index and count of what is held back)."""
    federation, profiles, held = people
    rows = jax.tree.map(lambda x: x[client_id], (federation[1:], held or ()))
    data = ClientData(federation.examples, *rows[0], *rows[1])
    return data, jax.tree.map(lambda x: x[client_id], profiles)


def _check_range(name: str, values, limit: int, why: str) -> None:
    low, high = int(np.min(values)), int(np.max(values))
    if low < 0 or high >= limit:
        raise ValueError(f"{name} has values from {low} to {high}; {why}.")


def _floats(tree: PyTree) -> list[Array]:
    """The leaves that may be infinite; not keys, nor integers."""
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]


def _wide(x: Array) -> Array:
    """What a sum is taken in: bfloat16 forgets small terms, int8 overflows."""
    if x.dtype.itemsize >= 4:
        return x
    return x.astype(jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.int32)


def _slots(most: int, devices: int, width: int | None) -> tuple[int, int]:
    """(slots of a bucket in all, clients at a time): whole groups on every device."""
    per_device = max(1, math.ceil(most / devices))
    width = per_device if width is None else min(width, per_device)
    return math.ceil(per_device / width) * width * devices, width


def _merge(infos: list[dict[str, Array]]) -> dict[str, Array]:
    """Sums over buckets; what the ledger needs stays apart, [buckets]."""
    apart = ("selected", "clients", "non_finite", "steps", "bytes_up", "flops")
    names = {name for info in infos for name in info}
    zero = jnp.zeros((), jnp.float32)
    column = {name: [info.get(name, zero) for info in infos] for name in sorted(names)}
    return {n: jnp.stack(c) if n in apart else sum(c[1:], c[0]) for n, c in column.items()}


def _check(algorithm, population, cohort_size, num_rounds, drop_rate, width) -> int:
    num_clients = population.federation.count.shape[0]
    held = population.held
    bucket_of = np.asarray(population.bucket)
    sizes = {"bucket": bucket_of.shape[0], "index": population.federation.index.shape[0]}
    sizes |= {} if held is None else {"held": held.count.shape[0]}
    sizes |= {f"profiles.{n}": x.shape[0] for n, x in population.profiles._asdict().items()}
    wrong = {name: size for name, size in sizes.items() if size != num_clients}
    if wrong:
        raise ValueError(
            f"The federation has {num_clients} clients, but leading sizes are {wrong}."
        )
    if not 1 <= cohort_size <= num_clients:
        raise ValueError(
            f"cohort_size={cohort_size} must be from 1 to the number of clients, {num_clients}."
        )
    last = len(algorithm.buckets) - 1
    if bucket_of.min() < 0 or bucket_of.max() > last:
        raise ValueError(
            f"bucket has values from {bucket_of.min()} to {bucket_of.max()}; the algorithm has "
            f"buckets 0 to {last}."
        )
    index, count = population.federation.index, population.federation.count
    num_examples = jax.tree.leaves(population.federation.examples)[0].shape[0]
    _check_range(
        "count", count, index.shape[1] + 1, f"the index has {index.shape[1]} rows a client"
    )
    _check_range("index", index, num_examples, f"there are {num_examples} examples")
    if num_rounds < 1:
        raise ValueError(f"num_rounds must be at least 1, got {num_rounds}.")
    if not 0 <= drop_rate < 1:
        raise ValueError(f"drop_rate must be in [0, 1), got {drop_rate}.")
    if width is not None and width < 1:
        raise ValueError(f"width must be at least 1, got {width}.")
    return num_clients
