"""Secure sums, around any algorithm: the server learns what clients upload together, not apart.

A client writes each number as a multiple of a step, in a word modulo 2^32; the words of all clients
are added up modulo 2^32, and the server reads their sum back:

    w_i = round(x_i / step) mod 2^32;    sum_i x_i ~ step * signed(sum_i w_i mod 2^32)

with the smallest step at which the sum cannot wrap (`jaxfm.federated.wrappers.fixed_point` derives
it and bounds the error). Masks that add up to zero modulo 2^32 change nothing of this, so that the
compiled round leaves them out; `jaxfm.federated.secure` is the protocol with which real clients add
them, and its sums are the same words bit for bit.

The order of wrappers is: clip, then noise or encode, then mask, then aggregate. What is clipped or
noised stands inside (`with_secure_sums(private(algorithm))`), where numbers are still readable.
Sources: Bonawitz et al. 2017 (Practical secure aggregation), section 4; the reports of clients
(`Info`: examples, losses) are figures of a run and stay readable.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.federated.algorithm import (
    Algorithm,
    Bucket,
    ClientData,
    Exact,
    Profile,
)
from jaxfm.federated.wrappers.compression import Packed
from jaxfm.federated.wrappers.fixed_point import decode, encode, word_bits
from jaxfm.model import Array, Key, PyTree

_FIRST_LIMIT = 2.0**14
_SPAN = (-24, 40)  # powers of two that limits follow
_MARGIN = 2  # of them, between the largest number of a round and the limit of the next
_DECAY = 3  # of them, by which a limit falls in a round at most


class SecureState(NamedTuple):
    """The algorithm's state, and the limit of the next round's numbers, f32[], a power of two."""

    own: PyTree
    limit: Array

    @property
    def variables(self):
        """The global model."""
        return self.own.variables

    @property
    def released(self):
        """Rounds whose noisy sum has moved the model, of a private algorithm."""
        return self.own.released


class SecureUpload(NamedTuple):
    """What one client sends; all of it is added up modulo 2^32.

    Attributes:
      words: what the server would have received, with `Words` for leaves.
      clipped: u32[], entries beyond the limit.
      clients: u32[], one.
      sizes: u32[64], one at the power of two above the client's largest number, where limits
        follow the uploads; else u32[0].
    """

    words: PyTree
    clipped: Array
    clients: Array
    sizes: Array


class SecureMemory(NamedTuple):
    """The algorithm's memory, and f32[] zero.

    A client that has computed a NaN must not send it, and words cannot show it: it puts a NaN here,
    and the engine leaves it out as any other client with a number that is not finite.
    """

    own: PyTree
    fault: Array


class SecureTotals(NamedTuple):
    """The algorithm's totals; f32[], clipped entries and buckets that fell short; u32[64]."""

    own: PyTree
    clipped: Array
    lost: Array
    sizes: Array


class _Origin(NamedTuple):
    """What of the server's state and public data a download holds unchanged.

    Attributes:
      tree: the structure of (server state, public data).
      shapes: of its leaves.
      places: for each leaf, its place among the leaves of the download; None: it is not there.
    """

    tree: Any
    shapes: tuple[jax.ShapeDtypeStruct, ...]
    places: tuple[int | None, ...]


class _Coding(NamedTuple):
    """How uploads are encoded.

    Attributes:
      most: clients whose sum does not wrap.
      threshold: as given.
      follows: whether the limit follows the uploads.
      cut: whether numbers are cut towards zero.
    """

    most: int
    threshold: int
    follows: bool
    cut: bool

    @property
    def bits(self) -> int:
        """Bits of a word without its sign."""
        return word_bits(self.most)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Sent:
    """A download, the limit f32[] of numbers in an upload, and where the download comes from."""

    own: PyTree
    limit: Exact
    origin: _Origin = dataclasses.field(metadata={"static": True})


def with_secure_sums(
    algorithm: Algorithm, cohort_size: int, *, limit: float | None = None, threshold: int = 2
) -> Algorithm:
    """The algorithm whose uploads are summed as words modulo 2^32; its server sees only sums.

    What the server makes of one upload (`Bucket.receive`), the client makes itself before it
    encodes. Clients of one bucket are summed together. A bucket of which fewer than `threshold`
    report is lost for the round, as if nobody in it had reported. Uploads are four bytes an entry,
    and the figures of a round tell of `secure_clipped` entries and `secure_lost` buckets.

    Numbers beyond the limit are clipped, and steps grow with it. It follows the uploads, four times
    the largest number of the last round or more: with its words a client sends a vector that counts
    it at the power of two of its largest number, and the server reads how many clients are where.
    That is no secret of one client, but nor is it private: differential privacy asks for a limit.
    Its numbers are cut towards zero, so that none leaves the norm that it was clipped to.

    Args:
      algorithm: one whose uploads are added up.
      cohort_size: n, the most clients that report in one round.
      limit: of one client's summands (weight * movement, say), in magnitude, raised to a power of
        two; under differential privacy the clipping norm, plus some deviations of the noise where
        clients add it. None: it follows the uploads.
      threshold: the fewest clients of a bucket whose sum is read.
    Raises:
      ValueError: a setting out of range; an algorithm whose server needs more of uploads than
        their sum. One that needs more of an upload to receive it raises when it is first traced.
    """
    _check_settings(algorithm, cohort_size, limit, threshold)
    for number, bucket in enumerate(algorithm.buckets):
        _check(bucket, number)
    # Poisson sampling may draw more clients than its average.
    places = 0 if algorithm.privacy is None else algorithm.privacy.sampling.places
    coding = _Coding(
        most=max(cohort_size, places),
        threshold=threshold,
        follows=limit is None,
        cut=algorithm.privacy is not None,
    )
    first = _FIRST_LIMIT if limit is None else 2.0 ** math.ceil(math.log2(limit))

    def init(variables) -> SecureState:
        return SecureState(algorithm.init(variables), jnp.float32(first))

    def server(state: SecureState, totals: SecureTotals, public, key: Key):
        own, figures = algorithm.server(state.own, totals.own, public, key)
        limit = _next_limit(state.limit, totals.sizes) if coding.follows else state.limit
        counts = {"secure_clipped": totals.clipped, "secure_lost": totals.lost}
        return SecureState(own, limit), figures | counts

    buckets = tuple(_secure(bucket, coding) for bucket in algorithm.buckets)
    return algorithm._replace(init=init, buckets=buckets, server=server)


def flat_words(upload: SecureUpload) -> np.ndarray:
    """u32[m]: all words of an upload one after another, as real clients mask them; on the host."""
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.device_get(upload))])


def upload_of(words: np.ndarray, like: SecureUpload) -> SecureUpload:
    """The inverse of `flat_words`, also of sums, for `Bucket.lift`.

    Args:
      words: u32[m].
      like: arrays or shapes of one upload.
    Raises:
      ValueError: m is another number.
    """
    leaves, tree = jax.tree.flatten(like)
    ends = np.cumsum([math.prod(x.shape) for x in leaves])
    if words.shape != (ends[-1],):
        raise ValueError(f"An upload has {ends[-1]} words; there are {list(words.shape)}.")
    parts = np.split(words, ends[:-1])
    return jax.tree.unflatten(tree, [part.reshape(x.shape) for part, x in zip(parts, leaves)])


def _secure(bucket: Bucket, coding: _Coding) -> Bucket:
    def send(server: SecureState, public) -> _Sent:
        origin = _origin(bucket, server.own, public)
        return _Sent(bucket.send(server.own, public), Exact(server.limit), origin)

    def init_client(download: _Sent, *rest) -> SecureMemory:
        return SecureMemory(bucket.init_client(download.own, *rest), jnp.zeros(()))

    def client(download: _Sent, memory: SecureMemory, data: ClientData, profile: Profile, key: Key):
        upload, own, info = bucket.client(download.own, memory.own, data, profile, key)
        received = _received(bucket, download, upload)
        words, clipped, largest = encode(received, download.limit.value, coding.bits, coding.cut)
        floats = [x for x in jax.tree.leaves(received) if jnp.issubdtype(x.dtype, jnp.inexact)]
        finite = jnp.array([jnp.isfinite(x).all() for x in floats]).all()
        sizes = _size_of(largest) if coding.follows else jnp.zeros(0, jnp.uint32)
        sent = SecureUpload(words, clipped, jnp.ones((), jnp.uint32), sizes)
        fault = jnp.where(finite, 0.0, jnp.nan)
        return sent, SecureMemory(own, fault), info.measured(bytes_up=None)

    def lift(server: SecureState, sums: SecureUpload) -> SecureTotals:
        enough = (sums.clients >= coding.threshold) & (sums.clients <= coding.most)
        read = lambda x: jnp.where(enough, x, jnp.zeros((), x.dtype))
        own = jax.tree.map(read, decode(sums.words, server.limit, coding.bits))
        lost = (sums.clients > 0) & ~enough
        return SecureTotals(
            own=bucket.lift(server.own, own),
            clipped=read(sums.clipped).astype(jnp.float32),
            lost=lost.astype(jnp.float32),
            sizes=read(sums.sizes),
        )

    personal = bucket.personal
    return bucket._replace(
        send=send,
        client=client,
        init_client=init_client,
        receive=Bucket._field_defaults["receive"],
        lift=lift,
        shared=lambda server: bucket.shared(server.own),
        personal=personal and (lambda server, memory: personal(server.own, memory.own)),
    )


def _size_of(largest: Array) -> Array:
    """u32[64]: one at the least power of two above a number f32[]."""
    least, most = _SPAN
    power = jnp.where(largest > 0, jnp.frexp(largest)[1], least)
    return (jnp.arange(least, most) == jnp.clip(power, least, most - 1)).astype(jnp.uint32)


def _next_limit(limit: Array, sizes: Array) -> Array:
    """f32[]: a margin above the largest number of a round, or not far below the last limit."""
    powers = jnp.arange(*_SPAN)
    largest = jnp.where(sizes > 0, powers, _SPAN[0]).max()
    new = jnp.maximum(jnp.ldexp(jnp.float32(1), largest + _MARGIN), limit * 2.0**-_DECAY)
    return jnp.where(sizes.any(), new, limit)


def _check_settings(
    algorithm: Algorithm, cohort_size: int, limit: float | None, threshold: int
) -> None:
    if not 1 <= threshold <= cohort_size:
        raise ValueError(
            f"threshold={threshold} must be at least 1 and at most cohort_size={cohort_size}; "
            "with more, no round would ever be read."
        )
    word_bits(cohort_size)
    if limit is None and algorithm.privacy is not None:
        raise ValueError(
            "Secure sums of a private algorithm need limit, such as twice its clipping norm: one "
            "that follows the uploads would tell of them."
        )
    if limit is not None and not 2.0**-40 <= limit <= 2.0**40:
        raise ValueError(
            f"limit={limit} must be a number from 2^-40 to 2^40, above what a client uploads."
        )


def _check(bucket: Bucket, number: int) -> None:
    """Raises ValueError where the server does more with uploads than add them up."""
    why = None
    if bucket.combine is not None:
        why = (
            "sets uploads side by side (Bucket.combine), as a median or a vote does, and secure "
            "sums hide all but their sum; use an aggregation that adds up"
        )
    elif bucket.travels is not None:
        why = (
            "sends another part of its upload from each client (Bucket.travels), and masks cover "
            "all entries or none; use an algorithm whose clients all send the same entries"
        )
    if why is not None:
        raise ValueError(f"Secure sums do not fit: bucket {number} of this algorithm {why}.")


def _origin(bucket: Bucket, server: PyTree, public: PyTree) -> _Origin:
    jaxpr = jax.make_jaxpr(bucket.send)(server, public).jaxpr
    places = {id(x): place for place, x in enumerate(jaxpr.outvars)}
    shapes, tree = jax.tree.flatten(jax.eval_shape(lambda *x: x, server, public))
    return _Origin(tree, tuple(shapes), tuple(places.get(id(x)) for x in jaxpr.invars))


def _received(bucket: Bucket, download: _Sent, upload: PyTree) -> PyTree:
    """What the server would receive, as the client itself makes it, from what it downloaded."""
    if any(isinstance(x, Packed) for x in jax.tree.leaves(upload, is_leaf=_is_packed)):
        raise ValueError(
            "Secure sums do not fit compressed uploads: codes of clients with steps or places of "
            "their own cannot be added up before they are restored; leave uploads whole."
        )
    if bucket.receive is Bucket._field_defaults["receive"]:
        return upload
    origin, leaves = download.origin, jax.tree.leaves(download.own)
    # A rounded download has other leaves; their places are the same.
    known = [
        jnp.zeros(shape.shape, shape.dtype) if place is None else leaves[place]
        for place, shape in zip(origin.places, origin.shapes, strict=True)
    ]
    server, public = jax.tree.unflatten(origin.tree, known)
    needed = _needed(jax.make_jaxpr(bucket.receive)(server, public, upload).jaxpr)
    paths = jax.tree_util.tree_leaves_with_path((server, public))
    for (path, _), place, is_needed in zip(paths, origin.places, needed):
        if is_needed and place is None:
            what = "the public data" if path[0].idx else "its state"
            raise ValueError(
                f"Secure sums do not fit: the server needs {what} "
                f"({jax.tree_util.keystr(path[1:]) or 'all'}), which clients do not have, to read "
                "each upload by itself (Bucket.receive), as where it predicts with every client's "
                "model; use an algorithm that only adds uploads up."
            )
    return bucket.receive(server, public, upload)


def _needed(jaxpr: Any) -> list[bool]:
    """Which inputs of a jaxpr its outputs depend on."""
    wanted = {id(x) for x in jaxpr.outvars}
    for equation in reversed(jaxpr.eqns):
        if any(id(x) in wanted for x in equation.outvars):
            wanted |= {id(x) for x in equation.invars}
    return [id(x) in wanted for x in jaxpr.invars]


def _is_packed(x: Any) -> bool:
    return isinstance(x, Packed)
