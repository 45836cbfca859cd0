"""What a server asks of a client in a round, and what it expects back.

An order holds the download of the client's bucket, without the leaves that hardly ever change (a
frozen backbone, public data) where the client has them from an earlier order.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfm.federated.algorithm import Algorithm, Bucket, ClientData, Known, Profile
from jaxfm.federated.client import client_key, send
from jaxfm.federated.remote.checking import Expected
from jaxfm.federated.remote.site import Shapes, first_program, shapes_of_client
from jaxfm.federated.remote.standalone import FIRST, NEVER, Arrays, Leaf, digest
from jaxfm.federated.remote.trees import flat, leaves_of, names_of
from jaxfm.federated.rounds import RunState
from jaxfm.model import PyTree, Variables

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
    def server(self) -> PyTree:
        """The algorithm's server state."""
        return self.run.server

    @property
    def text(self) -> str:
        """The name of the run as text."""
        return bytes(np.asarray(self.name, np.uint8)).hex()


class Side(NamedTuple):
    """One bucket's share of a round.

    Attributes:
      b, bucket: which one.
      download: what its clients get.
      arrays: its leaves by name.
      constants: digests of the leaves that hardly ever change, by name.
      shapes: of all that its clients get, keep and send.
      upload, info: leaves of a reply, by name.
    """

    b: int
    bucket: Bucket
    download: PyTree
    arrays: Arrays
    constants: dict[str, str]
    shapes: Shapes
    upload: dict[str, Leaf]
    info: dict[str, Leaf]


def side_of(remote: Remote, state: RemoteState, b: int) -> Side:
    """Bucket b in the coming round."""
    bucket, server = remote.algorithm.buckets[b], state.run.server
    download = send(bucket, server, remote.public)
    arrays = flat("download", download)
    shapes = shapes_of_client(bucket, server, remote.public, remote.like)
    return Side(
        b=b,
        bucket=bucket,
        download=download,
        arrays=arrays,
        constants={name: digest(arrays[name]) for name in _constant(download)},
        shapes=shapes,
        upload=leaves_of("upload", shapes.upload),
        info=leaves_of("info", shapes.info),
    )


def order_of(
    remote: Remote, state: RemoteState, side: Side, client: int, held: Mapping[str, str]
) -> Order:
    """What a client is asked for, given the digests of the constants that it holds, by name."""
    number, key = int(state.run.round), state.run.key
    has = {name: mark for name, mark in side.constants.items() if held.get(name) == mark}
    keep = {name: mark for name, mark in side.constants.items() if name not in has}
    config = {
        "run": state.text, "round": number, "client": client, "bucket": side.b,
        "nonce": secrets.token_hex(16), "counted": int(state.counted[client]),
        "held_names": [*has], "held_digests": [*has.values()],
        "keep_names": [*keep], "keep_digests": [*keep.values()],
    }  # fmt: skip
    arrays = {name: x for name, x in side.arrays.items() if name not in has}
    arrays |= flat("key", client_key(key, client, number))
    if config["counted"] == NEVER:
        first = flat("key", client_key(key, client, None)) | _early(remote, state, side)
        arrays |= {FIRST + name: x for name, x in first.items()}
    return Order(config, arrays)


def _early(remote: Remote, state: RemoteState, side: Side) -> Arrays:
    """Leaves of the first download of the run that a client's first memory is made of, where they
    are not what is sent now."""
    if int(state.run.round) == 0:
        return {}
    used = first_program(side.bucket, side.shapes).module_kept_var_idx
    early = flat("download", send(side.bucket, state.first, remote.public))
    return {
        name: x
        for place, (name, x) in enumerate(early.items())
        if place in used and digest(x) != digest(side.arrays[name])
    }


def expected_of(remote: Remote, side: Side, order: Order) -> Expected:
    """What an answer to the order must look like."""
    client = order.config["client"]
    most = lambda column: np.inf if column is None else float(column[client])
    return Expected(
        config={name: order.config[name] for name in ("run", "round", "client", "nonce")},
        upload=side.upload,
        info=side.info,
        most_examples=most(remote.most_examples),
        most_steps=most(remote.most_steps),
    )


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
