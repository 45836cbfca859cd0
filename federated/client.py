"""One client outside the engine: send -> client -> receive, on host arrays and without a mesh.

The plainest description of a round, the debug backend, and what a real client process runs:

    download = send(bucket, state.server, public)                    # on the server
    answer = run_client(bucket, download, memory, data, profile, key)  # on the client
    sums = receive(bucket, state.server, public, answer.upload)      # on the server

`python_round` plays a whole round in this way, one client after another, and says which client,
stage and leaf went wrong. It computes what `compile_rounds` computes, slowly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.federated.algorithm import Algorithm, Bucket, ClientData, Info, Profile, added
from jaxfm.federated.client_steps import wide
from jaxfm.federated.cohort import cohorts_of, draw, round_keys
from jaxfm.federated.population import Population
from jaxfm.federated.rounds import RunState
from jaxfm.model import Key, PyTree


class Answer(NamedTuple):
    """What a client sends back, and what it keeps.

    Attributes:
      upload: as of `Bucket.client`.
      memory: for its next round.
      info: its report.
    """

    upload: PyTree
    memory: PyTree
    info: Info


class Problem(NamedTuple):
    """A number that is not finite.

    Attributes:
      client: i, who.
      stage: "upload", "memory" or "received".
      leaf: path of the array, and how many of its entries are not finite.
    """

    client: int
    stage: str
    leaf: str

    def __str__(self) -> str:
        return f"client {self.client}, {self.stage}: {self.leaf}"


def send(bucket: Bucket, server: PyTree, public: PyTree = None) -> PyTree:
    """What the server sends to every client of a bucket; host arrays."""
    return jax.device_get(bucket.send(server, public))


def first_memory(
    bucket: Bucket, download: PyTree, data: ClientData, profile: Profile, key: Key
) -> PyTree:
    """What a client keeps before its first round; host arrays.

    Args:
      key: the client's own, `client_key(run_key, client, None)`.
    """
    return jax.device_get(jax.jit(bucket.init_client)(download, data, profile, key))


def run_client(
    bucket: Bucket, download: PyTree, memory: PyTree, data: ClientData, profile: Profile, key: Key
) -> Answer:
    """Runs one round of one client; host arrays in and out, compiled once a shape.

    Args:
      bucket: that it belongs to.
      download: of `send`.
      memory: of `first_memory`, or of its last answer.
      data: its own rows; see `client_data`.
      profile: of its machine; scalars.
      key: `client_key(run_key, client, round)`.
    """
    run = jax.jit(bucket.client)  # compiled once for each shape of data
    return Answer(*jax.device_get(run(download, memory, data, profile, key)))


def receive(bucket: Bucket, server: PyTree, public: PyTree, upload: PyTree) -> PyTree:
    """What the server makes of one upload, in 32 bits or more; host arrays."""
    return jax.device_get(jax.tree.map(wide, bucket.receive(server, public, upload)))


def client_data(population: Population, client: int) -> tuple[ClientData, Profile]:
    """One client's own rows, and nobody else's, with its profile; host arrays.

    Tables of rows stay as long as the population's, so that a client shuffles as in the engine.
    """
    examples, tables = population.federation.examples, [population.federation]
    if population.local_validation is not None:
        tables.append(population.local_validation)
    counts = [int(table.count[client]) for table in tables]
    rows = [table.rows_of(client) for table in tables]
    some = np.concatenate(rows) if sum(counts) else np.zeros(1, np.int32)  # a row to point at
    own, first, parts = {name: np.asarray(leaf)[some] for name, leaf in examples.items()}, 0, []
    for table, count in zip(tables, counts, strict=True):
        index = np.zeros(table.index.longest, np.int32)
        index[:count] = np.arange(first, first + count)
        parts += [index, np.int32(count)]
        first += count
    data: Any = ClientData(own, *parts)  # type: ignore[arg-type]  # host arrays
    return data, jax.tree.map(lambda x: x[client], population.profiles)


def client_key(run_key: Key, client: int, number: int | None) -> Key:
    """The key of a client in a round (the first is 0), or of its first memory (None)."""
    key = (
        jax.random.fold_in(run_key, 2**32 - 1) if number is None else round_keys(run_key, number)[2]
    )
    return jax.random.fold_in(key, client)


def problems(client: int, **stages: PyTree) -> list[Problem]:
    """Everything that is not finite in what one client sent, kept, or was read to mean."""
    found = []
    for stage, tree in stages.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not jnp.issubdtype(leaf.dtype, jnp.inexact):
                continue
            bad = int((~np.isfinite(np.asarray(leaf, np.float64))).sum())
            if bad:
                where = jax.tree_util.keystr(path)
                text = f"{where} has {bad} of {np.size(leaf)} entries that are not finite"
                found.append(Problem(client, stage, text))
    return found


def python_round(
    algorithm: Algorithm,
    population: Population,
    state: RunState,
    memories: dict[int, PyTree],
    *,
    cohort_size: int,
    drop_rate: float = 0.0,
    public: PyTree = None,
) -> tuple[RunState, dict[int, PyTree], list[Problem]]:
    """Plays one round, client by client: what `compile_rounds` compiles.

    Args:
      algorithm, population, cohort_size, drop_rate, public: as in `compile_rounds`.
      state: as of `Rounds.init`; its memories are not looked at.
      memories: by client, of those that took part before; others start anew.
    Returns:
      The state after the round, the memories, and what was not finite. A client with a problem in
      its upload or memory counts for nothing.
    """
    number, bucket_of = int(state.round), np.asarray(population.bucket)
    places, rate = cohorts_of(algorithm, len(bucket_of), cohort_size)
    drawn, reports = draw(state.key, number, len(bucket_of), places, drop_rate, rate)
    memories, found, totals = dict(memories), [], None
    for b, bucket in enumerate(algorithm.buckets):
        if not (bucket_of == b).any():
            continue
        download, received = send(bucket, state.server, public), []
        present = [int(i) for i in drawn if i >= 0 and bucket_of[i] == b and reports[i]]
        for client in present:
            data, profile = client_data(population, client)
            if not data.count:
                continue
            first = client_key(state.key, client, None)
            memory = (
                memories[client]
                if client in memories
                else first_memory(bucket, download, data, profile, first)
            )
            key = client_key(state.key, client, number)
            answer = run_client(bucket, download, memory, data, profile, key)
            own = problems(client, upload=answer.upload, memory=answer.memory)
            if not own:
                sums = receive(bucket, state.server, public, answer.upload)
                own = problems(client, received=sums)
                received.append(sums)
                memories[client] = answer.memory
            found += own
        like = client_data(population, int(np.argmax(bucket_of == b)))
        sums = combined(bucket, state.server, public, download, like, received)
        lifted = bucket.lift(state.server, sums)
        totals = lifted if totals is None else added(totals, lifted)
    server, _ = algorithm.server(state.server, totals, public, round_keys(state.key, number)[3])
    return state._replace(server=server, round=state.round + 1), memories, found


def combined(
    bucket: Bucket, server: PyTree, public: PyTree, download: PyTree,
    like: tuple[ClientData, Profile], received: Sequence[PyTree],
) -> PyTree:  # fmt: skip
    """The sums of what was received; zeros in the right shapes where nothing was.

    Args:
      like: a client of the bucket, or its shapes.
    """
    if not received:
        key = jax.random.key(0)

        def shapes(download, data: ClientData, profile: Profile) -> Any:
            memory = bucket.init_client(download, data, profile, key)
            upload, _, _ = bucket.client(download, memory, data, profile, key)
            return jax.tree.map(wide, bucket.receive(server, public, upload))

        shape = jax.eval_shape(shapes, download, *like)
        received = [jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shape)]
        counted = np.zeros(1, bool)
    else:
        counted = np.ones(len(received), bool)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *received)
    if bucket.combine is not None:
        return bucket.combine(server, stacked, jnp.asarray(counted))
    return jax.tree.map(lambda x: x.sum(0), stacked)
