"""The largest entries of each chunk in 2 bits, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import federation, make, population, start

from jaxfm.cost import num_bytes
from jaxfm.federated.accounting.ledger import client_costs
from jaxfm.federated.algorithm import Info, Spent
from jaxfm.federated.client import client_data
from jaxfm.federated.wrappers.compression import with_compression
from jaxfm.federated.wrappers.sparse_codes import sparse


def expected(x: np.ndarray, fraction: float, chunk: int) -> np.ndarray:
    """What is sent, chunk by chunk."""
    chunk = min(chunk, x.size)
    rows, k = np.pad(x, (0, -x.size % chunk)).reshape(-1, chunk), max(1, round(fraction * chunk))
    sent = np.zeros_like(rows)
    for row, out in zip(rows, sent, strict=True):
        chosen = np.argsort(-np.abs(row), kind="stable")[:k]
        size = np.abs(row[chosen])
        large = size > size.mean()
        for half in (large, ~large):
            out[chosen[half]] = np.sign(row[chosen[half]]) * (
                size[half].mean() if half.any() else 0
            )
    return sent.reshape(-1)[: x.size]


@pytest.mark.parametrize(
    ("n", "fraction", "chunk"), [(5000, 0.02, 4096), (700, 0.1, 300), (31, 0.2, 16), (3, 0.01, 8)]
)
def test_it_sends_the_largest_of_each_chunk_at_two_levels(n, fraction, chunk):
    method, x = sparse(fraction, chunk=chunk), np.random.default_rng(n).normal(size=n)
    x = x.astype(np.float32)
    sent = jax.jit(lambda x: method.unpack(method.pack(x, x.dtype, None), n))(x)
    np.testing.assert_allclose(sent, expected(x, fraction, chunk), rtol=2**-8)


def test_a_chunk_of_4096_costs_116_bytes():
    method = sparse(1 / 64)
    shape = jax.eval_shape(lambda x: method.pack(x, x.dtype, None), jnp.zeros(2 * 4096))
    assert num_bytes(shape) == 2 * 116 == 2 * (64 * 12 // 8 + 64 * 2 // 8 + 4)


def test_zeros_and_short_chunks_send_zeros():
    method, x = sparse(0.5, chunk=4), jnp.zeros(6).at[0].set(-2.0)
    sent = method.unpack(method.pack(x, x.dtype, None), 6)
    np.testing.assert_array_equal(sent, x)


def test_what_is_left_out_is_sent_later_a_part_of_it():
    """e <- p - sent with p = u + 0.9 e; the same upload over and over comes through."""
    method, rng = sparse(0.25, chunk=8, decay=0.9), np.random.default_rng(0)
    u, left, total = rng.normal(size=8).astype(np.float32), np.zeros(8, np.float32), np.zeros(8)
    data, profile = client_data(population("fed_avg", federation()), 0)
    n = jnp.asarray(data.count, jnp.float32)
    upload, info, key = {"w": jnp.asarray(u)}, Info(Spent(n), n, n, n), jax.random.key(0)
    bucket = (
        make("fed_avg").buckets[0]._replace(client=lambda d, memory, *_: (upload, memory, info))
    )
    algorithm = make("fed_avg")._replace(buckets=(bucket,))
    (wrapped,) = with_compression(algorithm, method).buckets
    memory = wrapped.init_client(None, data, profile, key)
    for _ in range(12):
        packed, memory, _ = wrapped.client(None, memory, data, profile, key)
        sent = np.asarray(method.unpack(packed["w"].payload, 8))
        left = u + np.float32(0.9) * left - sent
        total += sent
        np.testing.assert_allclose(memory.residual[0], left, rtol=1e-4, atol=1e-5)
    assert (np.sign(total) == np.sign(u))[np.abs(u) > 0.3].all()


def test_its_bytes_are_those_of_the_arrays_sent():
    people = population("fed_avg", federation())
    (cost,) = client_costs(with_compression(make("fed_avg"), sparse(0.1)), people, start())
    k = lambda n: max(1, round(0.1 * n))
    assert cost.bytes_up == sum(k(n) + -(-k(n) // 4) + 4 for n in (8, 48, 3, 24)) + 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, r"fraction must be in \(0, 1\], got 0.0"),
        ({"fraction": 0.1, "chunk": 5000}, "chunk must be from 1 to 4096, got 5000"),
        ({"fraction": 0.1, "decay": 0.0}, r"decay must be in \(0, 1\], got 0.0"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sparse(**options)
