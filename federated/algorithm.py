"""The contract of a federated algorithm: pure functions, hyper-parameters in the closure.

A server broadcasts, clients train, sums come back:

    download = bucket.send(server, public)
    upload, memory, info = bucket.client(download, memory, data, profile, key)    # many clients
    sums = sum of bucket.receive(server, public, upload) over clients             # one psum
    totals = sum of bucket.lift(server, sums) over buckets
    server, info = algorithm.server(server, totals, public, key)

What is added up is a pytree of *sums* (numerators and denominators: `Mean`), so that one all-reduce
aggregates and secure aggregation stays possible; narrow dtypes are summed in 32 bits. Clients of
one shape form a bucket, with one compiled program; buckets may hold slices of one network or
different architectures, as long as `lift` brings their sums to the same coordinates. A complete
algorithm, federated averaging of one number:

>>> import jax.numpy as jnp
>>> def client(download, memory, data, profile, key):
...     n = data.count.astype(jnp.float32)
...     own = data.examples["x"][data.index].mean()
...     return Mean(n * (own - download), n), memory, {}
>>> toy = Algorithm(
...     init=lambda variables: variables,
...     buckets=(Bucket(model=None, send=lambda server, public: server, client=client),),
...     server=lambda server, totals, public, key: (server + mean(totals), {}),
... )
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxfm.model import Array, Key, Model, PyTree, Variables


class Profile(NamedTuple):
    """What one client's machine can do; scalars, or arrays [C] for all clients.

    Attributes:
      max_steps: i32, local steps it has time for in a round.
      flops_per_s: f32, sustained.
      memory_bytes: f32, for parameters, gradients and optimizer state.
      up_bytes_per_s, down_bytes_per_s: f32, of its link.
    """

    max_steps: Array
    flops_per_s: Array
    memory_bytes: Array
    up_bytes_per_s: Array
    down_bytes_per_s: Array


class ClientData(NamedTuple):
    """One client's examples: rows of arrays that all clients of a device share.

    Attributes:
      examples: leaves [N, ...].
      index: i32[M], the client's rows; padded.
      count: i32[], how many of them are real; 0 for an empty or absent client.
      held_index, held_count: the same of rows that the client holds back from training, to select
        by; None where the population holds none back.
    """

    examples: Mapping[str, Array]
    # These two names hide methods of tuple that nobody needs here.
    index: Array  # type: ignore[assignment]
    count: Array  # type: ignore[assignment]
    held_index: Array | None = None
    held_count: Array | None = None


class Mean(NamedTuple):
    """A weighted mean as a ratio of sums.

    Attributes:
      num: a tree, the sum of weight * value.
      den: the sum of weights: f32[], or a tree like num where coordinates have weights of their
        own (coverage).
    """

    num: PyTree
    den: PyTree


class Known(NamedTuple):
    """A part of a download that its clients have already (public data): the ledger counts nothing.

    Attributes:
      value: what they have.
    """

    value: PyTree


def mean(sums: Mean) -> PyTree:
    """num / den, and zero where den is zero: a coordinate nobody covered does not move."""

    def ratio(num, den):
        den = den.astype(num.dtype)
        return jnp.where(den > 0, num / jnp.where(den > 0, den, 1), 0)

    if jax.tree_util.all_leaves([sums.den]):
        return jax.tree.map(lambda num: ratio(num, sums.den), sums.num)
    return jax.tree.map(ratio, sums.num, sums.den)


def scaled(weight: Array, tree: PyTree) -> PyTree:
    """weight * tree, in the dtypes of the tree; only the product is rounded to them."""

    def times(x):
        narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
        wide = jnp.float32 if narrow else x.dtype
        return (weight.astype(wide) * x.astype(wide)).astype(x.dtype)

    return jax.tree.map(times, tree)


class Bucket(NamedTuple):
    """Clients that run the same program.

    Attributes:
      model: what these clients train; its `apply` evaluates `personal`.
      send: `(server_state, public) -> download`: all that a client gets to see.
      client: `(download, memory, data: ClientData, profile: Profile, key)
        -> (upload, memory, info)`. `upload` is a tree of sums, weights included. `info` is a dict
        of f32 scalars, summed over clients; "bytes_up" in it replaces the size of the upload in
        the ledger (for uploads whose length depends on the data), "flops" the operations of the
        whole call. Every client reports "steps", "loss_total" and "loss_count" (`local_fit` does),
        for the ledger and for logs.
      init_client: `(download, data, profile, key) -> memory`: what a client keeps between rounds.
      receive: `(server_state, public, upload) -> sums`: what the server makes of one upload before
        it is added up (decompression, scattering, predictions on public data). The ledger counts
        the upload, its length in bytes by shape.
      lift: `(server_state, sum of what was received) -> sum in the coordinates of all buckets`.
      personal: `(server_state, memory) -> Variables` with which such a client predicts.
      travels: `(upload) -> tree like it of f32[]`: the share of each leaf's bytes that a wire
        needs, where a mask in the upload leaves some out; None: all of it.
    """

    model: Model | None
    send: Callable[[PyTree, PyTree], PyTree]
    client: Callable[..., tuple[PyTree, PyTree, dict[str, Array]]]
    init_client: Callable[..., PyTree] = lambda download, data, profile, key: ()
    receive: Callable[[PyTree, PyTree, PyTree], PyTree] = lambda server, public, upload: upload
    lift: Callable[[PyTree, PyTree], PyTree] = lambda server, sums: sums
    personal: Callable[[PyTree, PyTree], Variables] = lambda server, memory: server.variables
    travels: Callable[[PyTree], PyTree] | None = None


def wire_bytes(upload: PyTree, shares: PyTree) -> Array:
    """f32[]: bytes of an upload (arrays or shapes), each leaf by its share of `Bucket.travels`."""
    bits = jax.tree.map(lambda x, share: share * (x.size * x.dtype.itemsize), upload, shares)
    return jnp.asarray(sum(jax.tree.leaves(bits)), jnp.float32)


class Algorithm(NamedTuple):
    """A federated algorithm.

    Attributes:
      init: `(variables) -> server_state`, a NamedTuple with a field `variables`: the global model.
      buckets: the kinds of client, one compiled program each.
      server: `(server_state, totals, public, key) -> (server_state, info)`, with `totals` the sum
        of all lifted uploads; all zeros when nobody took part.
      model: the network of the global model, to evaluate it by.
    """

    init: Callable[[Variables], PyTree]
    buckets: tuple[Bucket, ...]
    server: Callable[[PyTree, PyTree, PyTree, Key], tuple[PyTree, dict[str, Array]]]
    model: Model | None = None
