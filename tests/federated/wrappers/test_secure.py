"""Secure sums: decoded they are the plain sums but for rounding, and what is no sum is refused."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import (
    PUBLIC,
    advance,
    federation,
    make,
    population,
    run_new,
    slow_and_fast,
    start,
    two_rounds,
)

from jaxfm.federated import client_costs, compile_rounds, python_round, round_costs
from jaxfm.federated.algorithm import (
    Algorithm,
    Bucket,
    ClientData,
    Exact,
    Info,
    Mean,
    Spent,
    weighted,
)
from jaxfm.federated.wrappers.compression import named_compression, quantised, with_compression
from jaxfm.federated.wrappers.fixed_point import (
    EXACT_LIMIT,
    decode,
    encode,
    error_bound,
    fixed_point,
)
from jaxfm.federated.wrappers.secure import with_secure_sums
from jaxfm.model import Variables

slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)


def summed(fixed, stacked):
    """The decoded sum, modulo 2^32, of the encoded rows of a tree, and the clipped entries."""
    words, clipped = jax.jit(jax.vmap(lambda tree: encode(fixed, tree)))(stacked)
    return decode(fixed, jax.tree.map(lambda x: x.sum(0, dtype=x.dtype), words)), clipped.sum()


@pytest.mark.parametrize("num_clients", [1, 2, 7, 100, 1000])
@pytest.mark.parametrize("limit", [1.0, 1000.0, 2.0**14])
def test_a_decoded_sum_is_off_by_its_bound_at_most(num_clients, limit):
    rng = np.random.default_rng(num_clients)
    fixed = fixed_point(num_clients, limit)
    values = rng.uniform(-limit, limit, (num_clients, 50)).astype(np.float32)
    values[:, :3] = limit  # the largest sums there are: none wraps
    values[:, 3:5] = -limit
    counts = rng.integers(0, 2**24 // num_clients, num_clients).astype(np.float32)
    stats = rng.normal(size=(num_clients, 5)).astype(np.float32)
    got, clipped = summed(fixed, Mean(values, Exact((counts, stats))))
    assert clipped == 0
    total = values.astype(np.float64).sum(0)
    assert (np.abs(got.num - total) <= error_bound(fixed, num_clients, total)).all()
    total = stats.astype(np.float64).sum(0)
    bound = error_bound(fixed, num_clients, total, is_exact=True)
    assert (np.abs(got.den.value[1] - total) <= bound).all()
    assert bound.max() < 1e-6 * num_clients
    assert got.den.value[0] == counts.astype(np.float64).sum()  # whole numbers, exactly


def test_the_step_is_the_smallest_that_cannot_wrap():
    for num_clients in (1, 3, 8, 1000):
        fixed = fixed_point(num_clients, 100.0)
        assert 100.0 / fixed.step * num_clients < 2**31 <= 200.0 / fixed.step * num_clients + 200
        assert EXACT_LIMIT / fixed.exact_step <= fixed.most
        assert fixed.exact_step / fixed.rest_step <= 2 * fixed.most


def test_what_is_beyond_the_limit_is_clipped_and_counted():
    fixed = fixed_point(2, 8.0)
    x = np.array([7.0, 9.0, -100.0, 3e38, -8.0], np.float32)
    got, clipped = summed(fixed, np.stack([x, np.zeros(5, np.float32)]))
    assert clipped == 3
    np.testing.assert_array_equal(got, [7, 8, -8, 8, -8])
    got, clipped = summed(fixed, np.array([[3, -2, 2**31 - 1]] * 2, np.int32))
    assert clipped == 2 and got.dtype == jnp.int32
    np.testing.assert_array_equal(got, [6, -4, 2 * fixed.most])


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("fed_avg", 1e-5),
        ("scaffold", 1e-5),
        *(slow(name, 1e-5) for name in ("fed_dyn", "fed_nova", "hetero_fl", "raffm")),
        slow("fed_md", 1e-4),
    ],
)
def test_an_algorithm_ends_where_it_does_without(name, tolerance):
    secured = with_secure_sums(make(name), cohort_size=3, threshold=1)
    state, info = run_new(secured, slow_and_fast(name), 2, cohort_size=3)
    plain, reference = two_rounds(name)
    chex.assert_trees_all_close(state.server, plain.server, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(info.counted, reference.counted)
    assert not info.server["secure_clipped"].any() and not info.server["secure_lost"].any()
    moved = np.abs(
        state.server.variables.params["dense1"]["kernel"] - start().params["dense1"]["kernel"]
    )
    assert name == "fed_md" or moved.max() > 0.01


class Kept(NamedTuple):
    """The model, and the totals of the last round."""

    variables: Variables
    total: Mean


def adder(**parts) -> Algorithm:
    """A server that keeps what its clients sent: n_i times the first row of each."""

    def init(variables: Variables) -> Kept:
        return Kept(variables, Mean(jnp.zeros(6), Exact(jnp.zeros(()))))

    def client(download, memory, data: ClientData, profile, key):
        n = data.count.astype(jnp.float32)
        info = Info(Spent(n, bytes_up=1e9 * n), examples=n, loss_total=n, loss_count=n)
        return weighted(n, data.examples["x"][data.index[0]]), memory + 1, info

    def server(state: Kept, totals: Mean, public, key):
        return Kept(state.variables, totals), {}

    memory = lambda *args: jnp.zeros((), jnp.int32)
    bucket = Bucket(None, lambda state, public: state.variables, client, memory)._replace(**parts)
    return Algorithm(init, (bucket,), server)


def people(counts=(6, 1, 4, 0, 5, 2), sick=()):
    """Six clients, client 3 empty; those who are sick hold NaNs."""
    data = federation(counts)
    x = data.examples["x"].copy()
    for client in sick:
        x[data.rows_of(client)] = np.nan
    return population("fed_avg", data._replace(examples={"x": x}))


def expected(people, clients) -> tuple[np.ndarray, float]:
    data = people.federation
    rows = [
        data.count[i] * data.examples["x"][data.rows_of(i)[0]].astype(np.float64) for i in clients
    ]
    return np.sum(rows, axis=0), float(data.count[list(clients)].sum())


@functools.cache
def engine(threshold: int = 2):
    secured = with_secure_sums(adder(), cohort_size=6, threshold=threshold)
    return compile_rounds(secured, people(), cohort_size=6, clients_at_once=3)


def played(threshold: int, people):
    state, info = advance(engine(threshold), people, 1)
    return state, info


@pytest.mark.parametrize("sick", [(), (1,), (0, 4)])
def test_only_clients_with_finite_numbers_are_in_the_sum(sick):
    """A NaN cannot be seen in words, so the client itself has to stay away."""
    crowd = people(sick=sick)
    state, info = played(2, crowd)
    present = [i for i in (0, 1, 2, 4, 5) if i not in sick]
    num, den = expected(crowd, present)
    fixed = fixed_point(6, 2.0**14)
    assert (np.abs(state.server.total.num - num) <= error_bound(fixed, 6, num)).all()
    assert state.server.total.den.value == den
    assert info.non_finite.sum() == len(sick) and info.counted.sum() == len(present)
    (memory,) = state.memories
    np.testing.assert_array_equal(memory.own, [i in present for i in range(6)])
    np.testing.assert_array_equal(memory.fault, 0)


def test_fewer_clients_than_the_threshold_are_not_read():
    for counts, lost in [((6, 1, 0, 0, 0, 2), 0), ((6, 0, 0, 0, 0, 2), 1), ((0,) * 6, 0)]:
        state, info = played(3, people(counts))
        assert info.server["secure_lost"] == lost
        assert (float(state.server.total.den.value) > 0) == (sum(counts) == 9)
        assert np.asarray(state.server.total.num).any() == (sum(counts) == 9)


def test_the_ledger_counts_the_words():
    secured = with_secure_sums(adder(), cohort_size=6)
    (cost,) = client_costs(secured, people(), start())
    assert cost.bytes_up == 4 * (6 + 2 + 2)  # the vector, its weight twice, and two counters
    _, info = played(2, people())
    assert round_costs((cost,), info)["bytes_up"] == 5 * cost.bytes_up


def test_clipped_entries_are_reported():
    secured = with_secure_sums(adder(), cohort_size=6, limit=1e-3)
    state, info = run_new(secured, people())
    assert info.server["secure_clipped"] == 5 * 6  # entries of five clients
    assert (np.abs(state.server.total.num) < 5.001e-3).all()


def test_it_plays_outside_of_the_engine_too():
    secured = with_secure_sums(adder(), cohort_size=6)
    state = compile_rounds(secured, people(), cohort_size=6).init(start(), jax.random.key(3))
    slow_state, _, found = python_round(secured, people(sick=(1,)), state, {}, cohort_size=6)
    fast_state, _ = played(2, people(sick=(1,)))
    chex.assert_trees_all_equal(slow_state.server, fast_state.server)
    assert {problem.client for problem in found} == {1}


def test_16_bits_and_narrow_downloads_stay_possible():
    narrow = named_compression(make("fed_avg"), download="8bit")
    for algorithm in (with_secure_sums(narrow, 6), narrow_outside()):
        shapes = client_costs(algorithm, population("fed_avg", federation()), start())
        assert shapes[0].bytes_up == 4 * (83 + 2 + 2) and shapes[0].bytes_down < 300


def narrow_outside():
    return named_compression(with_secure_sums(make("fed_avg"), 6), download="8bit")


class TestRefusals:
    """One sentence each, before the first round."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"threshold": 7}, r"threshold=7 must be at least 1 and at most cohort_size=6"),
            ({"threshold": 0}, r"threshold=0 must be at least 1"),
            ({"limit": 0.0}, r"limit=0.0 must be a number from"),
            ({"limit": float("nan")}, r"limit=nan must be a number from"),
            ({"cohort_size": 2**21}, r"num_clients=2097152 must be from 1 to 1048576"),
        ],
    )
    def test_settings(self, options, message):
        with pytest.raises(ValueError, match=message):
            with_secure_sums(adder(), **({"cohort_size": 6} | options))

    def test_a_median(self):
        median = adder(combine=lambda server, received, counted: received)
        with pytest.raises(ValueError, match=r"side by side .* as a median or a vote does"):
            with_secure_sums(median, 6)

    def test_parts_of_their_own(self):
        parts = adder(travels=lambda upload: jax.tree.map(lambda _: 1.0, upload))
        with pytest.raises(ValueError, match="masks cover all entries or none"):
            with_secure_sums(parts, 6)

    def test_compressed_uploads(self):
        secured = with_secure_sums(with_compression(adder(), quantised(4)), 6)
        with pytest.raises(ValueError, match=r"codes of clients with steps .* leave uploads whole"):
            client_costs(secured, people(), start())

    def test_a_server_that_must_see_each_upload(self):
        def receive(server, public, upload):
            return jax.tree.map(lambda x: x * server.total.den.value, upload)

        with pytest.raises(
            ValueError, match=r"needs its state \(.total.den.value\), which clients"
        ):
            client_costs(with_secure_sums(adder(receive=receive), 6), people(), start())
        with_public = lambda server, public, upload: jax.tree.map(
            lambda x: x * public["x"].sum(), upload
        )
        with pytest.raises(ValueError, match=r"needs the public data \(\['x'\]\)"):
            secured = with_secure_sums(adder(receive=with_public), 6)
            client_costs(secured, people(), start(), PUBLIC)


def test_a_client_receives_by_what_it_downloaded():
    """What is not linear in the upload is made before it is encoded; all that it needs is there."""

    def receive(server, public, upload):
        squared = jnp.square(upload.num) + server.variables.params["dense2"]["bias"][0]
        return Mean(squared, upload.den)

    state, _ = run_new(with_secure_sums(adder(receive=receive), 6), people())
    plain, _ = run_new(adder(receive=receive), people())
    chex.assert_trees_all_close(state.server, plain.server, rtol=1e-5)
