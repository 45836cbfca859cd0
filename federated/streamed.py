"""Rounds over a population too large to be held: only the clients of a round are in memory.

    with StreamedRounds(
        algorithm, fetch, num_clients=1_000_000, cohort_size=1_000, store=store
    ) as rounds:
        state = rounds.init(variables, key)
        for _ in range(100):
            state, info = rounds.run(state)

`fetch(clients)` gives the clients' data: `on_disk` reads rows of files, `derived` makes them of the
clients' numbers. The cohort of a round follows from the key of the run and the number of the round
alone, so that a thread fetches the next one while a round runs. One program serves all rounds; its
time and memory are those of a cohort. What clients keep is in a `ClientStore`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxfm.data.federation import Federation, RowIndex
from jaxfm.federated.accounting.resources import profiles
from jaxfm.federated.algorithm import Algorithm, Profile
from jaxfm.federated.client_steps import client_of
from jaxfm.federated.client_store import ClientStore
from jaxfm.federated.cohort import RoundInfo
from jaxfm.federated.population import Population
from jaxfm.federated.rounds import Rounds, RunState, compile_rounds
from jaxfm.model import Key, PyTree, Variables
from jaxfm.parallel.mesh import make_mesh, put


class Visit(NamedTuple):
    """The data of K clients.

    Attributes:
      examples: leaves [K, longest, ...]; what lies past a client's count is not read.
      count: i32[K], rows of each.
      profiles: of their machines; None: without limits.
    """

    examples: dict[str, np.ndarray]
    count: np.ndarray  # type: ignore[assignment]
    profiles: Profile | None = None


Fetch = Callable[[np.ndarray], Visit]


class StreamedRounds:
    """Rounds of an algorithm, a client's data and memory being fetched when it is drawn.

    The random numbers of a client are those of its place in the cohort, in the order of numbers;
    with a cohort of everybody the results are those of `compile_rounds`. A client begins when it is
    first drawn, from what the server has then.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        fetch: Fetch,
        *,
        num_clients: int,
        cohort_size: int,
        store: ClientStore | None = None,
        drop_rate: float = 0.0,
        public: PyTree = None,
        mesh: Mesh | None = None,
        clients_at_once: int | None = None,
    ):
        """Compiles nothing yet.

        Args:
          algorithm: of one bucket, without an account of privacy.
          fetch: `(clients i64[K]) -> Visit`, of the same shapes each time.
          num_clients: in all.
          cohort_size: K, clients drawn a round.
          store: for what clients keep; None where they keep nothing.
          drop_rate, public, mesh, clients_at_once: as in `compile_rounds`.
        Raises:
          ValueError: a cohort that exceeds the population, or an algorithm of another kind.
        """
        if not 1 <= cohort_size <= num_clients:
            raise ValueError(
                f"cohort_size={cohort_size} must be from 1 to the number of clients, {num_clients}."
            )
        if len(algorithm.buckets) != 1 or algorithm.privacy is not None:
            raise ValueError(
                "A streamed population needs an algorithm of one bucket and without differential "
                "privacy; use compile_rounds for others."
            )
        self.algorithm, self.public = algorithm, public
        self.num_clients, self.cohort_size = num_clients, cohort_size
        self._fetch, self._store = fetch, store
        self.mesh = make_mesh(clients=len(jax.devices())) if mesh is None else mesh
        self._options: dict[str, Any] = {
            "cohort_size": cohort_size, "drop_rate": drop_rate, "public": public,
            "mesh": self.mesh, "clients_at_once": clients_at_once,
        }  # fmt: skip
        self._thread = ThreadPoolExecutor(1, "fetch")
        self._ahead: dict[int, Future[Visit]] = {}
        self._engine: Rounds | None = None
        self._begin = jax.jit(self._beginners)

    def __enter__(self) -> StreamedRounds:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def init(self, variables: Variables, key: Key) -> RunState:
        """The state before the first round; its memories are those of the last cohort only.

        Raises:
          ValueError: clients keep something, and there is no store; data of a wrong shape.
        """
        people = self._population(self._fetch(draw_clients(key, 0, *self._sizes)))
        self._engine = compile_rounds(self.algorithm, people, **self._options)
        state = self._engine.init(variables, key)
        if jax.tree.leaves(state.memories) and self._store is None:
            raise ValueError("Clients of this algorithm keep something between rounds: give store.")
        return state

    def run(self, state: RunState) -> tuple[RunState, RoundInfo]:
        """One round; the given state is donated. `info.cohort.client` are the clients' numbers.

        Raises:
          ValueError: data of another shape than before; `init` was not called.
          Exception: what `fetch` raised.
        """
        if self._engine is None:
            raise ValueError("Call init before run: it compiles the rounds.")
        number, key = int(state.round), state.key
        clients = draw_clients(key, number, *self._sizes)
        ahead = self._ahead.pop(number, None)
        people = self._population(self._fetch(clients) if ahead is None else ahead.result())
        following = draw_clients(key, number + 1, *self._sizes)
        self._ahead = {number + 1: self._thread.submit(self._fetch, following)}
        if self._store is not None:
            state = state._replace(memories=self._memories(state, people, clients))
        state, info = self._engine.run(state, people)
        if self._store is not None:
            self._store.write(clients, number + 1, jax.device_get(state.memories[0]))
        places = np.asarray(info.cohort.client)
        return state, info._replace(cohort=info.cohort._replace(client=clients[places]))

    @property
    def _sizes(self) -> tuple[int, int]:
        return self.num_clients, self.cohort_size

    def _memories(self, state: RunState, people: Population, clients: np.ndarray) -> PyTree:
        """What the clients kept, or what they begin with."""
        assert self._store is not None
        found, seen = self._store.read(clients, int(state.round), state.memories[0])
        if not seen.all():
            fresh = jax.device_get(self._begin(state.server, people[:2], clients, state.key))
            pick = lambda old, new: np.where(seen.reshape(-1, *[1] * (old.ndim - 1)), old, new)
            found = jax.tree.map(pick, found, fresh)
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return (jax.tree.map(lambda leaf: put(leaf, everywhere), found),)

    def _beginners(self, server: PyTree, people: Any, clients: Any, key: Key) -> PyTree:
        """What each client of a cohort begins with, were it new."""
        (bucket,) = self.algorithm.buckets
        download = bucket.send(server, self.public)
        first = jax.random.fold_in(key, 2**32 - 1)  # as in `compile_rounds`

        def one(place, client):
            own = jax.random.fold_in(first, client)
            return bucket.init_client(download, *client_of((*people, None), place), own)

        return jax.vmap(one)(np.arange(self.cohort_size), clients)

    def _population(self, visit: Visit) -> Population:
        """A population of a cohort's clients alone."""
        k = self.cohort_size
        shapes = {name: np.shape(leaf)[:2] for name, leaf in visit.examples.items()}
        longest = next((shape[1] for shape in shapes.values() if len(shape) == 2), 0)
        wrong = {name: shape for name, shape in shapes.items() if shape != (k, longest)}
        if wrong or not longest or np.shape(visit.count) != (k,):
            raise ValueError(
                f"fetch gave count of shape {np.shape(visit.count)} and examples {shapes}; give "
                f"counts [{k}] and leaves [{k}, longest, ...]."
            )
        examples: dict[str, Any] = {
            name: np.asarray(x).reshape(-1, *np.shape(x)[2:]) for name, x in visit.examples.items()
        }
        start = np.arange(k, dtype=np.int32) * longest
        index = RowIndex(
            np.arange((k + 1) * longest, dtype=np.int32) % (k * longest), start,
            np.full(k, longest, np.int32), longest,
        )  # fmt: skip
        federation = Federation(examples, index, np.asarray(visit.count, np.int32))
        machines = profiles(k) if visit.profiles is None else visit.profiles
        return Population(federation, machines, np.zeros(k, np.int32))


def draw_clients(key: Key, number: int, num_clients: int, cohort_size: int) -> np.ndarray:
    """i64[cohort_size]: the clients of a round, distinct and in order; time as of the cohort."""
    words = np.asarray(jax.random.key_data(key)).ravel().tolist()
    generator = np.random.default_rng([*words, number])
    return np.sort(generator.choice(num_clients, cohort_size, replace=False, shuffle=False))


def on_disk(
    examples: Mapping[str, np.ndarray], start: np.ndarray, count: np.ndarray, longest: int
) -> Fetch:
    """Clients whose rows follow each other in arrays, as those of `np.load(mmap_mode="r")`.

    Args:
      examples: leaves [N, ...]; only the rows of a cohort are read.
      start, count: i[C], where each client's rows begin, and how many there are.
      longest: rows of a client, at most; further ones are left out.
    """
    last = len(next(iter(examples.values()))) - 1

    def fetch(clients: np.ndarray) -> Visit:
        rows = np.minimum(np.asarray(start)[clients, None] + np.arange(longest), last)
        own = np.minimum(np.asarray(count)[clients], longest)
        return Visit({name: leaf[rows] for name, leaf in examples.items()}, own)

    return fetch


def derived(make: Callable[[Key], tuple[dict[str, Any], Any]], key: Key) -> Fetch:
    """Clients whose data are made when they are drawn, the same each time.

    Args:
      make: `(key) -> (examples with leaves [longest, ...], count i32[])`, traceable.
      key: of the population; a client's is folded from it.
    """
    many = jax.jit(jax.vmap(lambda client: make(jax.random.fold_in(key, client))))

    def fetch(clients: np.ndarray) -> Visit:
        return Visit(*jax.device_get(many(clients.astype(np.uint32))))

    return fetch
