"""Rounds whose clients are processes of their own, over any transport.

    remote = Remote(algorithm, bucket_of, like, cohort_size=8)
    state = start(remote, variables, jax.random.key(1))
    state, report = play_round(remote, state, exchange, Held())

`exchange` carries orders to clients and yields their replies, in any order, until it has waited
long enough. Cohorts, keys and sums are those of `compile_rounds`: what the clients' machines
compute is what a simulation computes.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.federated.algorithm import (
    Algorithm, ClientData, Info, Known, Profile, added,
)  # fmt: skip
from jaxfm.federated.client import client_key, combined, receive, send
from jaxfm.federated.cohort import Report, RoundInfo, Slots, cohorts_of, draw, joined, round_keys
from jaxfm.federated.remote.checking import (
    Expected, Refused, Reply, as_tree, check_info, check_reply,
)  # fmt: skip
from jaxfm.federated.remote.site import Shapes, first_program, shapes_of_client
from jaxfm.federated.remote.standalone import FIRST, NEVER, Arrays, Refusal, digest, not_finite
from jaxfm.federated.remote.trees import flat, leaves_of, names_of, tree_of
from jaxfm.federated.rounds import RunState
from jaxfm.model import Key, PyTree, Variables

_SMALL = 1024  # bytes of a leaf that is not worth remembering


class Order(NamedTuple):
    """What the server asks of a client.

    Attributes:
      config: run, round, client, bucket, nonce; the round of the client that counted last; names
        and digests of constant leaves that the client holds, and of those that it shall keep.
      arrays: the leaves of the download that it does not hold, and its key.
    """

    config: dict[str, Any]
    arrays: Arrays


Exchange = Callable[[Mapping[int, Order]], Iterable[Reply]]


class Remote(NamedTuple):
    """A run with clients elsewhere.

    Attributes:
      algorithm: what clients and server do.
      bucket_of: i32[C], who trains what.
      like: (data, profile) of any client, or their shapes.
      cohort_size: clients drawn a round.
      public: the server's own data.
      most_examples: f64[C], rows (or their weights) that each client may count by; None: any.
      most_steps: i32[C], local steps of a round; None: any.
    """

    algorithm: Algorithm
    bucket_of: np.ndarray
    like: tuple[ClientData, Profile]
    cohort_size: int
    public: PyTree = None
    most_examples: np.ndarray | None = None
    most_steps: np.ndarray | None = None


class RemoteState(NamedTuple):
    """All that the server needs to go on; a checkpoint of it resumes the run.

    Attributes:
      run: server state, round and key, as of the engine; memories are with the clients.
      counted: i32[C], the last round of each client that counted; -1: none.
      first: the server's state before the first round, of which clients make their first memory.
      name: u8[16], of the run; clients keep its memories under it.
    """

    run: RunState
    counted: np.ndarray
    first: PyTree
    name: np.ndarray

    @property
    def text(self) -> str:
        """The name of the run as text."""
        return bytes(np.asarray(self.name, np.uint8)).hex()


Held = dict[int, dict[str, str]]  # by client: names and digests of constants that it has


def start(remote: Remote, variables: Variables, key: Key) -> RemoteState:
    """The state before the first round."""
    server = jax.jit(remote.algorithm.init)(variables)
    run = RunState(server, (), jnp.zeros((), jnp.int32), key)
    counted = np.full(len(remote.bucket_of), NEVER, np.int32)
    name = np.frombuffer(secrets.token_bytes(16), np.uint8)
    return RemoteState(run, counted, server, name)


def play_round(
    remote: Remote, state: RemoteState, exchange: Exchange, held: Held
) -> tuple[RemoteState, RoundInfo, list[Refused]]:
    """Plays one round: orders go out, replies are checked and added up in the cohort's order.

    Args:
      held: what clients are known to hold; brought up to date.
    Returns:
      The state after the round, its report (one round, as of the engine), and who was refused.
    """
    algorithm, (server, _, number, key) = remote.algorithm, state.run
    number = int(number)
    places, rate = cohorts_of(algorithm, len(remote.bucket_of), remote.cohort_size)
    drawn = np.asarray(draw(key, number, len(remote.bucket_of), places, 0.0, rate)[0])
    sides = {
        b: _Side(remote, state, b)
        for b in sorted({int(remote.bucket_of[i]) for i in drawn if i >= 0})
    }
    orders = {
        int(i): sides[int(remote.bucket_of[i])].order(int(i), held.get(int(i), {}))
        for i in drawn
        if i >= 0
    }
    taken, refused = _collect(remote, sides, orders, exchange(orders))
    for client, order in orders.items():
        if client in taken and taken[client].sums is not None:
            names, marks = order.config["keep_names"], order.config["keep_digests"]
            held[client] = {**held.get(client, {}), **dict(zip(names, marks, strict=True))}
        else:  # it may have lost what it had
            held.pop(client, None)
    totals = None
    for b, bucket in enumerate(algorithm.buckets):
        if not (remote.bucket_of == b).any():
            continue
        received = [
            taken[int(i)].sums
            for i in drawn
            if int(i) in taken and remote.bucket_of[i] == b and taken[int(i)].sums is not None
        ]
        download = sides[b].download if b in sides else send(bucket, server, remote.public)
        sums = combined(bucket, server, remote.public, download, remote.like, received)
        lifted = bucket.lift(server, sums)
        totals = lifted if totals is None else added(totals, lifted)
    after, figures = jax.jit(algorithm.server)(server, totals, remote.public, round_keys(key, number)[3])
    counted = state.counted.copy()
    for client, own in taken.items():
        counted[client] = number if own.sums is not None else counted[client]
    run = state.run._replace(server=after, round=state.run.round + 1)
    report = _report(remote, sides, drawn, taken, figures)
    return state._replace(run=run, counted=counted), report, refused


class _Own(NamedTuple):
    """What a client contributed: sums as of `Bucket.receive`, None where its numbers were not
    finite; its report."""

    sums: PyTree
    info: Info


class _Side:
    """One bucket's share of a round: its download, and what is expected back."""

    def __init__(self, remote: Remote, state: RemoteState, b: int):
        self.bucket, self.b = remote.algorithm.buckets[b], b
        self.remote, self.state = remote, state
        self.download = send(self.bucket, state.run.server, remote.public)
        self.arrays = flat("download", self.download)
        self.shapes = _shapes(self.bucket, remote, state)
        self.constants = {name: digest(self.arrays[name]) for name in _constant(self.download)}
        self.upload = leaves_of("upload", self.shapes.upload)
        self.info = leaves_of("info", self.shapes.info)

    def order(self, client: int, held: Mapping[str, str]) -> Order:
        """What the client is asked for, given the constants that it holds."""
        number, key = int(self.state.run.round), self.state.run.key
        has = {name: mark for name, mark in self.constants.items() if held.get(name) == mark}
        keep = {name: mark for name, mark in self.constants.items() if name not in has}
        config = {
            "run": self.state.text, "round": number, "client": client, "bucket": self.b,
            "nonce": secrets.token_hex(16), "counted": int(self.state.counted[client]),
            "held_names": [*has], "held_digests": [*has.values()],
            "keep_names": [*keep], "keep_digests": [*keep.values()],
        }  # fmt: skip
        arrays = {name: x for name, x in self.arrays.items() if name not in has}
        arrays |= flat("key", client_key(key, client, number))
        if config["counted"] == NEVER:
            arrays |= {FIRST + name: x for name, x in self._first(client).items()}
        return Order(config, arrays)

    def _first(self, client: int) -> Arrays:
        """What the client's first memory is made of, where it is not what is sent now."""
        found = flat("key", client_key(self.state.run.key, client, None))
        if int(self.state.run.round) == 0:
            return found
        used = first_program(self.bucket, self.shapes).module_kept_var_idx
        early = flat("download", send(self.bucket, self.state.first, self.remote.public))
        for place, name in enumerate(early):
            if place in used and digest(early[name]) != digest(self.arrays[name]):
                found[name] = early[name]
        return found

    def expected(self, order: Order) -> Expected:
        """What an answer to the order must look like."""
        client = order.config["client"]
        most = lambda column: np.inf if column is None else float(column[client])
        config = {name: order.config[name] for name in ("run", "round", "client", "nonce")}
        return Expected(
            config, self.upload, self.info, most(self.remote.most_examples),
            most(self.remote.most_steps),
        )  # fmt: skip

    def take(self, reply: Reply, order: Order) -> _Own:
        """What the server makes of a reply; raises Refusal."""
        expected = self.expected(order)
        upload, leaves, fault = check_reply(reply, expected)
        info: Info = as_tree(self.shapes.info, leaves)
        check_info(info, expected)
        if fault:
            return _Own(None, info)
        tree = tree_of(self.shapes.upload, upload)
        sums = receive(self.bucket, self.state.run.server, self.remote.public, tree)
        if sentence := not_finite(flat("received", sums)):
            raise Refusal(sentence)
        return _Own(sums, info)


def _collect(
    remote: Remote, sides: Mapping[int, _Side], orders: Mapping[int, Order],
    replies: Iterable[Reply],
) -> tuple[dict[int, _Own], list[Refused]]:  # fmt: skip
    """The replies that are in order, by client, and the others with their reasons."""
    taken: dict[int, _Own] = {}
    refused: list[Refused] = []
    for reply in replies:
        client = reply.client
        try:
            if client not in orders:
                raise Refusal("It was not asked for anything in this round.")
            if client in taken:
                raise Refusal("It has already answered in this round.")
            side = sides[int(remote.bucket_of[client])]
            taken[client] = side.take(reply, orders[client])
        except Refusal as error:
            refused.append(Refused(client, str(error)))
    return taken, refused


def _constant(download: PyTree) -> list[str]:
    """Names of the leaves that hardly ever change: frozen parameters and public data."""
    marked = (Variables, Known)

    def mark(part: Any) -> Any:
        if isinstance(part, Known):
            return jax.tree.map(lambda _: True, part)
        if isinstance(part, Variables):
            rest = jax.tree.map(lambda _: False, part)
            return rest._replace(frozen=jax.tree.map(lambda _: True, part.frozen))
        return False

    flags = jax.tree.map(mark, download, is_leaf=lambda x: isinstance(x, marked))
    names, leaves = names_of("download", download), jax.tree.leaves(download)
    return [
        name
        for name, is_constant, leaf in zip(names, jax.tree.leaves(flags), leaves, strict=True)
        if is_constant and np.asarray(leaf).nbytes >= _SMALL
    ]


def _shapes(bucket: Any, remote: Remote, state: RemoteState) -> Shapes:
    return shapes_of_client(bucket, state.run.server, remote.public, remote.like)


def _report(
    remote: Remote, sides: Mapping[int, _Side], drawn: np.ndarray, taken: Mapping[int, _Own],
    figures: Mapping,
) -> RoundInfo:  # fmt: skip
    """The report of a round as the engine makes it, with a leading axis of one round."""
    slots: list[Slots | None] = [None] * len(remote.algorithm.buckets)
    reports: list[Report | None] = [None] * len(remote.algorithm.buckets)
    for b, side in sides.items():
        place = np.asarray([p for p, i in enumerate(drawn) if i >= 0 and remote.bucket_of[i] == b])
        nothing = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), side.shapes.info)
        columns = []
        for client in drawn[place]:
            own = taken.get(int(client))
            counts, fails = own is not None and own.sums is not None, own is not None and own.sums is None
            info = nothing if own is None else own.info
            if fails:
                info = nothing._replace(spent=info.spent)
            columns.append(Report(np.float32(counts), np.float32(fails), info))
        reports[b] = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *columns)
        zeros = np.zeros(len(place), np.int32)
        own_slots = Slots(drawn[place], zeros == 0, place.astype(np.int32), zeros, zeros)
        slots[b] = jax.tree.map(jnp.asarray, own_slots)
    info = joined(jnp.asarray(drawn, jnp.int32), slots, reports, dict(figures))
    return jax.tree.map(lambda x: np.asarray(x)[None], jax.device_get(info))
