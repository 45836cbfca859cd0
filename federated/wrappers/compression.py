"""Compressed uploads, around any algorithm: its clients send fewer or narrower numbers.

    p = u + e_i;   sent = C(p);   e_i <- p - sent

with u what the algorithm uploads and e_i what the client remembers of the rest (error feedback):
all that it has sent plus e_i is the sum of its uploads. C keeps the largest entries of a leaf
(`top_k`) or of each of its chunks (`sparse`), or rounds at random to few bits (`quantised`),
unbiased and without a memory:

    Q(x) = s floor(x / s + U[0, 1)),   s = max |x| / (2^(bits - 1) - 1),   E Q(x) = x

The server restores each upload before it is added up. Downloads travel as they are, or rounded to
the nearest of few levels (`down`): a client starts, and measures its movement, from what it got.
Sources: Stich et al. 2018 (Sparsified SGD with Memory), algorithm 1; Alistarh et al. 2017 (QSGD),
section 3.1, with the largest entry in the place of the norm.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfm.cost import num_bytes
from jaxfm.federated.algorithm import (
    Algorithm,
    Bucket,
    ClientData,
    Exact,
    Known,
    Profile,
    wire_bytes,
)
from jaxfm.federated.wrappers.methods import Method, quantised, top_k
from jaxfm.federated.wrappers.sparse_codes import sparse
from jaxfm.model import Array, Key, PyTree, Variables


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A compressed leaf: the payload travels; shape and dtype are known to both sides."""

    payload: PyTree
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})


class CompressMemory(NamedTuple):
    """The algorithm's memory; e_i of compressed leaves in order, 32 bits or more, or ()."""

    own: PyTree
    residual: tuple[Array, ...]


def with_compression(
    algorithm: Algorithm, method: Method | None, *, down: int | None = None, block: int = 256
) -> Algorithm:
    """The algorithm with compressed uploads; server and personal parts stay the same.

    Floating leaves are compressed one by one, where that makes them smaller; scalars, integers and
    what the algorithm marks as `Exact` (weights, statistics) travel exactly. A client without data
    sends zeros and keeps its residual. `Spent.bytes_up` counts what now travels: with feedback all
    that was packed, whichever entries it holds; else, of a leaf that the algorithm sends in part
    (`Bucket.travels`), that part.

    Args:
      algorithm: any; clients draw the same random numbers as without compression. With feedback
        its uploads should be movements: what is left out comes later.
      method: `top_k`, `sparse` or `quantised`; None: uploads stay the same.
      down: 8 or 4, bits of downloaded values; what clients know already and what is exact is left
        alone. None: downloads stay the same.
      block: values of a download that share a step.
    Raises:
      ValueError: other bits; block below 1; feedback for uploads of predictions, of another part of
        the model in every round, or of a private algorithm; rounding of noise that clients add.
    """
    if method and method.feedback and any(bucket.sends_predictions for bucket in algorithm.buckets):
        raise ValueError(
            "This algorithm uploads predictions, whose small entries matter as much as the others; "
            "top_k, which sends them later, is for movements. Use quantised, or no method."
        )
    if method and method.feedback and any(bucket.changes_places for bucket in algorithm.buckets):
        raise ValueError(
            "This algorithm uploads another part of the model in every round; top_k and sparse, "
            "which send what they leave out with the next upload, would add it to the wrong part. "
            "Use quantised, or no method."
        )
    _check_privacy(algorithm, method)
    buckets = algorithm.buckets
    if method is not None:
        buckets = tuple(_compressed(b, method) for b in buckets)
    if down is not None:
        buckets = tuple(_narrow(b, quantised(down, block)) for b in buckets)
    return algorithm._replace(buckets=buckets)


def _check_privacy(algorithm: Algorithm, method: Method | None) -> None:
    for bucket in algorithm.buckets:
        if method and bucket.privacy and method.feedback:
            raise ValueError(
                "top_k sends later what it left out of an upload, and so tells who was drawn "
                "before; uploads of a private algorithm can be rounded (quantised), or stay."
            )
        if method and bucket.privacy == "clients":
            raise ValueError(
                "Rounding an upload after its client has added noise would change the noise of the "
                "sum; leave noise to the server, or uploads as they are."
            )


def named_compression(
    algorithm: Algorithm, *, upload: str = "full", download: str = "full", top_share: float = 0.1
) -> Algorithm:
    """Compression by name, as scripts take it.

    Args:
      algorithm: any.
      upload: "full", "8bit", "4bit", "2bit"; "top_k": only the largest entries, in 8 bits; or
        "sparse": only the largest entries of each chunk, in 2 bits (`sparse`).
      download: "full", "8bit" or "4bit".
      top_share: the share of entries that "top_k" and "sparse" send.
    """
    bits = {"full": None, "8bit": 8, "4bit": 4, "2bit": 2}
    if upload == download == "full":
        return algorithm
    if upload == "top_k":
        method: Method | None = top_k(top_share, bits=8)
    elif upload == "sparse":
        method = sparse(top_share)
    else:
        width = bits[upload]
        method = None if width is None else quantised(width, block=256)
    return with_compression(algorithm, method, down=bits[download])


def _compressed(bucket: Bucket, method: Method) -> Bucket:
    def init_client(download, data: ClientData, profile: Profile, key: Key) -> CompressMemory:
        own = bucket.init_client(download, data, profile, key)
        upload, _, _ = jax.eval_shape(bucket.client, download, own, data, profile, key)
        leaves = jax.tree.leaves(upload, is_leaf=_is_exact)
        chosen = [leaves[i] for i in _chosen(method, upload)] if method.feedback else []
        return CompressMemory(own, tuple(jnp.zeros(x.shape, _wide(x)) for x in chosen))

    def client(download, memory: CompressMemory, data: ClientData, profile: Profile, key: Key):
        upload, own, info = bucket.client(download, memory.own, data, profile, key)
        (leaves, tree), residual = jax.tree.flatten(upload, is_leaf=_is_exact), []
        key = jax.random.fold_in(key, 2**32 - 1)  # no algorithm counts so far
        for number, i in enumerate(_chosen(method, upload)):
            x = leaves[i]
            left = memory.residual[number] if method.feedback else jnp.zeros((), _wide(x))
            whole = jnp.where(data.count > 0, x.astype(_wide(x)) + method.decay * left, 0)
            payload = method.pack(whole.reshape(-1), x.dtype, jax.random.fold_in(key, i))
            leaves[i] = Packed(payload, x.shape, x.dtype)
            if method.feedback:
                error = whole - _restored(method, leaves[i]).astype(whole.dtype)
                residual.append(jnp.where(data.count > 0, error, left))
        packed = jax.tree.unflatten(tree, leaves)
        sent = None if travels is None else wire_bytes(packed, travels(packed))
        return packed, CompressMemory(own, tuple(residual)), info.measured(bytes_up=sent)

    def receive(server, public, upload):
        return bucket.receive(server, public, _whole(method, upload))

    def shares(upload: PyTree) -> PyTree:
        assert bucket.travels is not None
        alike = lambda x, share: jax.tree.map(lambda _: 1.0 if method.feedback else share, x)
        split = lambda x, share: alike(x, share) if _is_packed(x) else share
        own = bucket.travels(_whole(method, upload))
        return jax.tree.map(split, upload, own, is_leaf=_is_packed)

    travels = None if bucket.travels is None else shares
    personal = None
    if bucket.personal is not None:
        personal = lambda server, memory: bucket.personal(server, memory.own)
    return bucket._replace(
        client=client, init_client=init_client, receive=receive, travels=travels, personal=personal
    )


def _narrow(bucket: Bucket, method: Method) -> Bucket:
    """The bucket with rounded downloads: parameters, and floats of the algorithm's own."""

    def narrow(x: Any) -> Any:
        if isinstance(x, Variables):  # statistics travel exactly, and structure not at all
            return x._replace(params=jax.tree.map(narrow, x.params))
        if isinstance(x, Known | Exact) or not _is_float(x) or not x.size:
            return x
        payload = method.pack(x.astype(_wide(x)).reshape(-1), x.dtype, None)
        return Packed(payload, x.shape, x.dtype) if num_bytes(payload) < num_bytes(x) else x

    wide = lambda download: _whole(method, download)

    def send(server, public):
        is_part = lambda x: isinstance(x, Variables | Known | Exact)
        return jax.tree.map(narrow, bucket.send(server, public), is_leaf=is_part)

    return bucket._replace(
        send=send,
        client=lambda download, *rest: bucket.client(wide(download), *rest),
        init_client=lambda download, *rest: bucket.init_client(wide(download), *rest),
    )


def _chosen(method: Method, upload: PyTree) -> list[int]:
    """Which leaves of an upload, arrays or shapes, are compressed."""

    def is_chosen(x) -> bool:
        if _is_exact(x) or not _is_float(x) or not x.ndim or not x.size:
            return False
        packed = lambda: method.pack(jnp.zeros(x.size, _wide(x)), x.dtype, jax.random.key(0))
        return num_bytes(jax.eval_shape(packed)) < num_bytes(x)

    leaves = jax.tree.leaves(upload, is_leaf=_is_exact)
    return [i for i, leaf in enumerate(leaves) if is_chosen(leaf)]


def _is_exact(x: Any) -> bool:
    return isinstance(x, Exact)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _is_packed(x: Any) -> bool:
    return isinstance(x, Packed)


def _whole(method: Method, tree: PyTree) -> PyTree:
    """The tree with packed leaves restored."""
    restored = lambda x: _restored(method, x) if _is_packed(x) else x
    return jax.tree.map(restored, tree, is_leaf=_is_packed)


def _wide(x: Any) -> Any:
    return jnp.float32 if x.dtype.itemsize < 4 else x.dtype


def _restored(method: Method, packed: Packed) -> Array:
    flat = method.unpack(packed.payload, math.prod(packed.shape))
    return flat.astype(packed.dtype).reshape(packed.shape)
