"""A quorum: a round counts only if enough clients have reported.

    x <- server(x, totals)   if at least q clients reported, else x as it was

The server counts the uploads that it adds up, so nothing more travels. What clients keep of a round
that did not count (control variates, the rest of a compressed upload) they keep all the same: they
cannot know.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfm.federated.algorithm import Algorithm, Bucket
from jaxfm.model import Array, Key, PyTree


class Counted(NamedTuple):
    """Received uploads, or their sums, and how many there are.

    Attributes:
      own: of the algorithm.
      reports: f32[].
    """

    own: PyTree
    reports: Array


def with_quorum(algorithm: Algorithm, least: int) -> Algorithm:
    """The algorithm whose server waits for `least` reports; else a round changes nothing there.

    The figures of a round hold "quorum": 1 where it counted, 0 where it did not.

    Args:
      algorithm: any, with or without other wrappers.
      least: reports that a round needs, at least 1.
    Raises:
      ValueError: least below 1; a private algorithm.
    """
    if least < 1:
        raise ValueError(f"quorum={least}: a round needs at least 1 report; give a number from 1.")
    if algorithm.privacy is not None:
        raise ValueError(
            f"quorum={least}: how many clients report depends on their data, so a private round "
            "counts whoever reports; leave the quorum out."
        )

    def server(state: PyTree, totals: Counted, public: PyTree, key: Key):
        new, figures = algorithm.server(state, totals.own, public, key)
        enough = totals.reports >= least
        kept = jax.tree.map(lambda a, b: jnp.where(enough, a, b), new, state)
        return kept, {**figures, "quorum": enough.astype(jnp.float32)}

    buckets = tuple(_counting(bucket) for bucket in algorithm.buckets)
    return algorithm._replace(buckets=buckets, server=server)


def _counting(bucket: Bucket) -> Bucket:
    def receive(server: PyTree, public: PyTree, upload: PyTree) -> Counted:
        return Counted(bucket.receive(server, public, upload), jnp.ones((), jnp.float32))

    def combine(server: PyTree, received: Counted, counted: Array) -> Counted:
        own: Any = bucket.combine
        return Counted(own(server, received.own, counted), counted.sum(dtype=jnp.float32))

    def lift(server: PyTree, sums: Counted) -> Counted:
        return sums._replace(own=bucket.lift(server, sums.own))

    return bucket._replace(
        receive=receive, combine=None if bucket.combine is None else combine, lift=lift
    )
