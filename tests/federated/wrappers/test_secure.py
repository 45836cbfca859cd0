"""Secure sums: decoded they are the plain sums but for rounding, and what is no sum is refused."""

import functools
import math
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

from jaxfm.checkpoint import Checkpointer
from jaxfm.federated import client_costs, compile_rounds, python_round, round_costs
from jaxfm.federated.accounting.privacy import Privacy, Sampling
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
from jaxfm.federated.wrappers.fixed_point import decode, encode, error_bound, word_bits
from jaxfm.federated.wrappers.private import PrivateUpload, with_privacy
from jaxfm.federated.wrappers.robust import named_robust
from jaxfm.federated.wrappers.secure import SecureUpload, with_secure_sums
from jaxfm.model import Variables

slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)


def summed(stacked, limit: float, bits: int, cut: bool = False):
    """The decoded sum, modulo 2^32, of the encoded rows of a tree, and the clipped entries."""
    code = jax.jit(jax.vmap(lambda tree, limit: encode(tree, limit, bits, cut), (0, None)))
    words, clipped, largest = code(stacked, jnp.float32(limit))
    total = jax.tree.map(lambda x: x.sum(0, dtype=x.dtype), words)
    return decode(total, limit, bits), clipped.sum(), largest.max()


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("num_clients", [1, 2, 7, 100, 1000])
def test_a_decoded_sum_is_off_by_its_bound_at_most(num_clients, cut):
    rng, bits = np.random.default_rng(num_clients), word_bits(num_clients)
    for limit in (2.0**-9, 1.0, 2.0**14):
        values = rng.uniform(-limit, limit, (num_clients, 50)).astype(np.float32)
        values[:, :3] = limit  # the largest sums there are: none wraps
        values[:, 3:5] = -limit
        counts = rng.integers(0, 2**24 // num_clients, num_clients).astype(np.float32)
        stats = rng.normal(size=(num_clients, 5)).astype(np.float32)
        rows = Mean(values, Exact((counts, stats)))
        got, clipped, largest = summed(rows, limit, bits, cut)
        assert clipped == 0 and largest == limit
        total = values.astype(np.float64).sum(0)
        bound = error_bound(total, num_clients, limit, bits, cut=cut)
        assert (np.abs(np.float64(got.num) - total) <= bound).all()
        # Two words: as exact as sums of float32 are.
        np.testing.assert_allclose(
            got.den.value[1], stats.astype(np.float64).sum(0), rtol=3e-7, atol=1e-7 * num_clients
        )
        assert got.den.value[0] == counts.astype(np.float64).sum()  # whole numbers, exactly


def test_the_step_is_the_smallest_that_cannot_wrap():
    for num_clients in (1, 2, 3, 8, 1000, 2**20):
        assert num_clients * 2 ** word_bits(num_clients) < 2**31
        assert num_clients * 2 ** (word_bits(num_clients) + 1) >= 2**31 - 1


def test_cut_numbers_never_grow():
    """So that a norm that they were clipped to holds for what is sent."""
    x = np.random.default_rng(0).normal(size=(1, 1000)).astype(np.float32)
    got, _, _ = summed(x, 8.0, 8, cut=True)
    assert (np.abs(got) <= np.abs(x[0])).all() and (np.sign(got) * np.sign(x[0]) >= 0).all()
    nearest, _, _ = summed(x, 8.0, 8)
    assert (np.abs(nearest) > np.abs(x[0])).any()


def test_what_is_beyond_the_limit_is_clipped_and_counted():
    x, bits = np.array([7.0, 9.0, -100.0, 3e38, -8.0], np.float32), word_bits(2)
    got, clipped, largest = summed(np.stack([x, np.zeros(5, np.float32)]), 8.0, bits)
    assert clipped == 3 and largest == np.float32(3e38)
    np.testing.assert_array_equal(got, [7, 8, -8, 8, -8])
    got, clipped, _ = summed(np.array([[3, -2, 2**31 - 1]] * 2, np.int32), 8.0, bits)
    assert clipped == 2 and got.dtype == jnp.int32
    np.testing.assert_array_equal(got, [6, -4, 2 * 2**bits])


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
    secured = with_secure_sums(make(name), cohort_size=3, threshold=1, limit=64.0)
    state, info = run_new(secured, slow_and_fast(name), 2, cohort_size=3)
    plain, reference = two_rounds(name)
    chex.assert_trees_all_close(state.server.own, plain.server, rtol=tolerance, atol=tolerance)
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
    bound = error_bound(num, 6, 2.0**14, word_bits(6))
    assert (np.abs(np.float64(state.server.own.total.num) - num) <= bound).all()
    assert state.server.own.total.den.value == den
    assert info.non_finite.sum() == len(sick) and info.counted.sum() == len(present)
    (memory,) = state.memories
    np.testing.assert_array_equal(memory.own, [i in present for i in range(6)])
    np.testing.assert_array_equal(memory.fault, 0)


def test_fewer_clients_than_the_threshold_are_not_read():
    for counts, lost in [((6, 1, 0, 0, 0, 2), 0), ((6, 0, 0, 0, 0, 2), 1), ((0,) * 6, 0)]:
        state, info = played(3, people(counts))
        assert info.server["secure_lost"] == lost
        assert (float(state.server.own.total.den.value) > 0) == (sum(counts) == 9)
        assert np.asarray(state.server.own.total.num).any() == (sum(counts) == 9)


def test_the_ledger_counts_the_words():
    secured = with_secure_sums(adder(), cohort_size=6)
    (cost,) = client_costs(secured, people(), start())
    # The vector, its weight twice, two counters and sizes.
    assert cost.bytes_up == 4 * (6 + 2 + 2 + 64)
    _, info = played(2, people())
    assert round_costs((cost,), info)["bytes_up"] == 5 * cost.bytes_up


def test_clipped_entries_are_reported():
    secured = with_secure_sums(adder(), cohort_size=6, limit=2.0**-10)
    state, info = run_new(secured, people())
    assert info.server["secure_clipped"] == 5 * 6  # entries of five clients
    assert (np.abs(state.server.own.total.num) <= 5 * 2.0**-10).all()


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
        assert shapes[0].bytes_up == 4 * (83 + 2 + 2 + 64) and shapes[0].bytes_down < 300


def narrow_outside():
    return named_compression(with_secure_sums(make("fed_avg"), 6), download="8bit")


def test_the_limit_follows_the_uploads():
    """It falls to four times the largest number there was, and rises when numbers were clipped."""
    crowd, rows = people(), people().federation
    large = crowd._replace(
        federation=rows._replace(examples={**rows.examples, "x": rows.examples["x"] * 2.0**20})
    )
    each = [expected(crowd, (i,))[0] for i in (0, 1, 2, 4, 5)]
    power = np.ceil(np.log2(np.abs(each).max()))
    limits, clipped, bound = [], [], None
    state = engine().init(start(), jax.random.key(3))
    for some in (crowd, crowd, crowd, crowd, crowd, large, large, crowd):
        state, info = engine().run(state, some)
        limits.append(float(state.server.limit))
        clipped.append(float(info.server["secure_clipped"].sum()) > 0)
        if len(limits) == 5:  # with the limit the step has fallen, and with it the error
            num = np.sum(each, axis=0)
            bound = error_bound(num, 6, limits[3], word_bits(6))
            assert (np.abs(np.float64(state.server.own.total.num) - num) <= bound).all()
            assert bound.max() < 1e-5
    low, high = 2 ** (power + 2), 2 ** (power + 22)
    assert limits == [2.0**11, 2.0**8, *[max(low, 2.0**5)], low, low, high, high, high / 8]
    assert clipped == [False] * 5 + [True] + [False] * 2


def test_another_cohort_compiles_nothing_anew():
    traced = []
    algorithm = adder()
    (bucket,) = algorithm.buckets
    count = lambda *args: (traced.append(1), bucket.client(*args))[1]
    algorithm = algorithm._replace(buckets=(bucket._replace(client=count),))
    compiled = compile_rounds(with_secure_sums(algorithm, 6), people(), cohort_size=3)
    state, _ = compiled.run(compiled.init(start(), jax.random.key(3)))
    once = len(traced)
    state, _ = compiled.run(state, people(sick=(1,)))
    compiled.run(state, people((1, 1, 1, 6, 5, 2)), 0.5)
    assert once == len(traced) > 0


def test_a_resumed_run_goes_on_with_the_same_bits(tmp_path):
    secured = engine()
    whole, _ = advance(secured, people(), 2)
    half, _ = advance(secured, people(), 1)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, half)
        _, state = checkpoints.restore(like=secured.init(start(), jax.random.key(9)))
    state, _ = secured.run(state, people())
    chex.assert_trees_all_equal(state.server, whole.server)
    chex.assert_trees_all_equal(state.memories, whole.memories)


@pytest.mark.parametrize("noise", ["server", "clients"])
def test_it_stands_around_clipping_and_noise(noise):
    """The client clips where the server would once more: the norm is in its download."""
    privacy = Privacy(0.5, 1e-3, math.inf, None, Sampling(6, 6))
    least = 5 if noise == "clients" else 0
    private = with_privacy(adder(), privacy, clip=0.5, noise=noise, least_reports=least)
    state, info = run_new(with_secure_sums(private, 6, limit=8.0), people())
    plain, _ = run_new(private, people())
    chex.assert_trees_all_close(state.server.own, plain.server, rtol=1e-5, atol=1e-5)
    assert not info.server["secure_clipped"].any() and state.server.own.released == 1


def test_words_have_room_for_the_largest_poisson_cohort():
    sampling = Sampling(1000, 20, "poisson", secret=False)
    private = with_privacy(adder(), Privacy(0.5, 1e-3, math.inf, None, sampling))
    secured = with_secure_sums(private, 20, limit=2.0)
    (bucket,), bits = secured.buckets, word_bits(sampling.places)
    zeros = PrivateUpload(Mean(jnp.zeros(6), Exact(jnp.zeros(()))), ())
    words, clipped, _ = encode(zeros, 2.0, bits)

    def lost(clients: int) -> float:
        sums = SecureUpload(words, clipped, jnp.uint32(clients), jnp.zeros(0, jnp.uint32))
        return float(bucket.lift(secured.init(start()), sums).lost)

    assert sampling.places > 20
    assert (lost(1), lost(2), lost(sampling.places), lost(sampling.places + 1)) == (1, 0, 0, 1)


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

    def test_a_private_algorithm_without_a_limit(self):
        privacy = Privacy(0.5, 1e-3, math.inf, None, Sampling(6, 6))
        with pytest.raises(ValueError, match="need limit, such as twice its clipping norm"):
            with_secure_sums(with_privacy(adder(), privacy), 6)

    def test_a_robust_rule(self):
        with pytest.raises(ValueError, match=r"as a median or a vote does, and secure sums hide"):
            with_secure_sums(named_robust(adder(), rule="median"), 6)
        with pytest.raises(ValueError, match=r"weighted means"):  # around them it sees no mean
            run_new(named_robust(with_secure_sums(adder(), 6), rule="median"), people())

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
    chex.assert_trees_all_close(state.server.own, plain.server, rtol=1e-3, atol=1e-3)
