"""Compressed uploads: what was sent and what was kept is what there was, and bytes are exact."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from laws import (
    BATCH_NORM,
    CASES,
    PUBLIC,
    TASK,
    VARIANTS,
    batch_norm_step,
    federation,
    make,
    population,
    run_new,
    slow_and_fast,
    start,
    two_rounds,
)

from jaxfm.cost import num_bytes
from jaxfm.federated.accounting.ledger import client_costs, round_costs
from jaxfm.federated.algorithm import (
    Algorithm,
    Bucket,
    ClientData,
    Exact,
    Info,
    Mean,
    Spent,
    client_variables,
)
from jaxfm.federated.algorithms.fed_avg import fed_avg
from jaxfm.federated.local import Local
from jaxfm.federated.parts.ensemble import PredictionUpload
from jaxfm.federated.wrappers.compression import quantised, top_k, with_compression
from jaxfm.model import Variables

METHODS = {
    "top 10%": top_k(0.1),
    "top 25% in 4 bits": top_k(0.25, bits=4),
    "8 bits": quantised(8),
    "4 bits in blocks": quantised(4, block=8),
}
slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


class Totals(NamedTuple):
    variables: Variables
    total: Mean


def adder(dtype=jnp.float32) -> Algorithm:
    """A server that adds up what clients draw: random vectors like its parameters."""

    def init(variables: Variables) -> Totals:
        zeros = jax.tree.map(jnp.zeros_like, variables.params)
        return Totals(variables, Mean(zeros, Exact(jnp.zeros(()))))

    def client(download: Totals, memory, data: ClientData, profile, key):
        n = data.count.astype(jnp.float32)
        x = n * data.examples["x"][data.index[0], 0]
        leaves, tree = jax.tree.flatten(download.variables.params)
        keys = jax.random.split(key, len(leaves))
        draw = lambda leaf, key: (x * jax.random.normal(key, leaf.shape)).astype(dtype)
        num = jax.tree.unflatten(tree, map(draw, leaves, keys))
        info = Info(Spent(n, bytes_up=1e9 * n), examples=n, loss_total=n, loss_count=n)
        return Mean(num, Exact(n)), memory + 1, info

    def server(state: Totals, totals: Mean, public, key):
        return state._replace(total=jax.tree.map(jnp.add, state.total, totals)), {}

    send = lambda state, public: state
    rounds_so_far = lambda *args: jnp.zeros((), jnp.int32)
    return Algorithm(init, (Bucket(None, send, client, rounds_so_far),), server)


VECTORS = Variables({"w": jnp.zeros((7, 9)), "b": jnp.zeros(5)}, {}, {})


def added(algorithm: Algorithm, **options):
    """Ten rounds of four out of six clients; client 3 is empty and client 1 always sick."""
    data = federation((6, 1, 4, 0, 5, 2))
    x = np.where(np.arange(24) == data.rows_of(1), np.nan, np.ones(24))[:, None]
    people = population("fed_avg", data._replace(examples={"x": x.astype(np.float32)}))
    options = {"cohort_size": 4, "drop_rate": 0.3, "num_rounds": 10} | options
    return run_new(algorithm, people, variables=VECTORS, **options)


@functools.cache
def added_by(name: str, dtype=jnp.float32):
    algorithm = adder(dtype)
    return added(with_compression(algorithm, METHODS[name]) if name in METHODS else algorithm)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("top 25% in 4 bits", jnp.float32),
        ("top 25% in 4 bits", jnp.bfloat16),
        ("top 10%", jnp.float32),
        slow("top 10%", jnp.bfloat16),
    ],
)
def test_what_is_sent_and_what_is_kept_are_all_there_was(name, dtype):
    state, info = added_by(name, dtype)
    expected, plain = added_by("plain", dtype)
    (memory,) = state.memories
    kept = dict(zip(("b", "w"), (x.sum(0) for x in memory.residual), strict=True))
    assert all(float(jnp.abs(x).max()) > 1 for x in kept.values())
    total = jax.tree.map(jnp.add, state.server.total.num, kept)
    chex.assert_trees_all_close(total, expected.server.total.num, rtol=1e-5, atol=1e-4)
    # Weights are exact; the sick and the empty have no part and keep what they had.
    assert state.server.total.den.value == expected.server.total.den.value > 0
    np.testing.assert_array_equal(memory.own, expected.memories[0])
    for residual in memory.residual:
        assert residual.dtype == jnp.float32
        moved = np.any(np.asarray(residual).reshape(6, -1) != 0, axis=1)
        np.testing.assert_array_equal(moved, [True, False, True, False, True, True])
    assert info.non_finite.sum() == plain.non_finite.sum() > 0


def test_clients_at_a_time_do_not_matter():
    name = "top 25% in 4 bits"
    many, _ = added(with_compression(adder(), METHODS[name]), clients_at_once=3)
    chex.assert_trees_all_close(many.server, added_by(name)[0].server, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("bits", "block"), [(8, None), (4, None), (4, 4), (2, 4)])
def test_rounding_is_unbiased(bits, block):
    """The mean of N draws lies within 5 standard deviations, each at most step / 2 / sqrt(N)."""
    method, draws = quantised(bits, block), 4096
    x = np.random.default_rng(0).normal(size=11).astype(np.float32)
    x[3], x[8:] = 0, x[8:] * 1e-4  # the last block is small

    def sent(key):
        return method.unpack(method.pack(jnp.asarray(x), x.dtype, key), x.size)

    values = np.asarray(jax.jit(jax.vmap(sent))(jax.random.split(jax.random.key(0), draws)))
    rows = np.pad(x, (0, 1)).reshape(-1, block or 12)
    step = np.repeat(np.abs(rows).max(1) / (2 ** (bits - 1) - 1), block or 12)[:11]
    assert (np.abs(values - x) <= step * 1.001).all()
    assert (np.abs(values.mean(0) - x) <= 5 * step / 2 / np.sqrt(draws) + 1e-6 * np.abs(x)).all()
    assert (values[:, 3] == 0).all() and values.std(0)[[0, 1]].min() > 0


def test_zeros_stay_zeros():
    method = METHODS["4 bits in blocks"]
    payload = jax.jit(method.pack, static_argnums=1)(jnp.zeros(9), jnp.float32, jax.random.key(0))
    np.testing.assert_array_equal(method.unpack(payload, 9), np.zeros(9))


def test_the_largest_magnitudes_are_kept():
    x = jnp.array([0.1, -4.0, 0.0, 3.0, -0.2, 2.0])
    for fraction, kept in ((0.01, 1), (0.5, 3), (1.0, 6)):
        method = top_k(fraction)
        values = method.unpack(method.pack(x, x.dtype, jax.random.key(0)), 6)
        smallest = np.sort(np.abs(x))[-kept]
        np.testing.assert_array_equal(values, np.where(np.abs(x) >= smallest, x, 0))


def test_all_entries_in_full_are_the_algorithm_itself():
    algorithm = with_compression(make("scaffold"), top_k(1.0))
    kept, _ = run_new(algorithm, slow_and_fast("scaffold"), 2, cohort_size=3)
    chex.assert_trees_all_equal(kept.server, two_rounds("scaffold")[0].server)


SIZES = (8, 48, 3, 24)  # leaves of the mlp


@pytest.mark.parametrize(
    ("method", "leaf"),
    [
        (quantised(8), lambda n: n + 4),
        (quantised(4), lambda n: -(-n // 2) + 4),
        (quantised(2), lambda n: -(-n // 4) + 4),
        (quantised(8, block=16), lambda n: n + 4 * -(-n // 16)),
        (top_k(0.1), lambda n: 8 * max(1, round(0.1 * n))),
        (top_k(0.1, bits=8), lambda n: 4 + 5 * max(1, round(0.1 * n))),
        (top_k(0.5), lambda n: 4 * n),  # as it is: values and places would not be less
    ],
)
def test_bytes_are_those_of_the_arrays_sent(method, leaf):
    algorithm = with_compression(make("fed_avg"), method)
    people = population("fed_avg", federation())
    (cost,) = client_costs(algorithm, people, start())
    expected = sum(min(leaf(n), 4 * n) for n in SIZES) + 4  # and the weight
    assert cost.bytes_up == expected


@pytest.mark.parametrize("method", [name if name == "top 10%" else slow(name) for name in METHODS])
def test_statistics_of_norms_travel_exactly(method):
    method, (variables, expected) = METHODS[method], batch_norm_step()
    local = Local(optax.sgd(0.1), 4, 1)
    algorithm = with_compression(fed_avg(BATCH_NORM, TASK, local), method, down=4)
    down = algorithm.buckets[0].send(algorithm.init(variables), None)
    chex.assert_trees_all_equal(down.stats, variables.stats)
    plain = with_compression(fed_avg(BATCH_NORM, TASK, local), method)
    people = population("fed_avg", federation((4, 2)))
    state, _ = run_new(plain, people, variables=variables)
    chex.assert_trees_all_close(state.server.variables.stats, expected, rtol=1e-5, atol=1e-6)


def test_bytes_that_clients_reported_give_way():
    _, info = added_by("top 10%")
    people = population("fed_avg", federation())
    costs = client_costs(with_compression(adder(), METHODS["top 10%"]), people, VECTORS)
    reported = info.counted.sum() + info.non_finite.sum()
    assert round_costs(costs, info)["bytes_up"] == reported * (6 * 8 + 1 * 8 + 4) > 0


def arguments(count: int = 4):
    """(data, profile, key) of the first client."""
    people = population("fed_avg", federation())
    first = lambda tree: jax.tree.map(lambda x: jnp.asarray(x)[0], tree)
    rows = jax.tree.map(jnp.asarray, dict(people.federation.examples))
    data = ClientData(rows, people.federation.index.padded(0), jnp.asarray(count, jnp.int32))
    return data, first(people.profiles), jax.random.key(1)


def one_client(algorithm: Algorithm, count: int, residual: float = 0.0):
    """(its sums, memory before, memory after) of the first client, outside of rounds."""
    (bucket,) = algorithm.buckets

    @jax.jit
    def one(variables: Variables, *rest):
        download = bucket.send(algorithm.init(variables), None)
        before = bucket.init_client(download, *rest)
        before = before._replace(residual=jax.tree.map(lambda x: x + residual, before.residual))
        upload, after, _ = bucket.client(download, before, *rest)
        return bucket.receive(None, None, upload), before, after

    return one(start(), *arguments(count))


@pytest.mark.parametrize(
    "name",
    [name if name in ("8 bits", "top 25% in 4 bits") else slow(name) for name in METHODS],
)
def test_an_empty_client_sends_zeros_and_keeps_its_residual(name):
    algorithm = with_compression(adder(), METHODS[name])
    sums, before, after = one_client(algorithm, count=0, residual=0.3)
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(sums))
    chex.assert_trees_all_equal(before.residual, after.residual)
    sums, before, after = one_client(algorithm, count=4, residual=0.3)
    assert sums.den.value == 4 and all((x != 0).any() for x in jax.tree.leaves(sums.num))
    for had, left in zip(before.residual, after.residual, strict=True):
        assert (had != left).any()


@functools.cache
def losses(name: str):
    """Mean training loss of each of 60 rounds."""
    algorithm = make("fed_avg")
    algorithm = with_compression(algorithm, METHODS[name]) if name in METHODS else algorithm
    people = population("fed_avg", federation())
    _, info = run_new(algorithm, people, cohort_size=4, num_rounds=60)
    return info.loss_total / info.loss_count


@pytest.mark.parametrize(("name", "slack"), [("8 bits", 0.02), slow("top 25% in 4 bits", 0.1)])
def test_training_comes_as_far(name, slack):
    plain, rounded = losses("plain"), losses(name)
    assert plain[-10:].mean() < 0.5 * plain[0]
    assert abs(rounded[-10:].mean() - plain[-10:].mean()) < slack * plain[0]


def shapes(algorithm: Algorithm, variables: Variables | None = None):
    """[(upload, its sums)] of one client of each bucket."""

    def one(bucket: Bucket, variables: Variables):
        state = algorithm.init(variables)
        download, rest = bucket.send(state, PUBLIC), arguments()
        upload, _, _ = bucket.client(download, bucket.init_client(download, *rest), *rest)
        return upload, bucket.lift(state, bucket.receive(state, PUBLIC, upload))

    variables = start() if variables is None else variables
    return [jax.eval_shape(functools.partial(one, b), variables) for b in algorithm.buckets]


@pytest.mark.parametrize("name", [slow(n) if n in VARIANTS else n for n in CASES])
def test_any_algorithm_can_be_wrapped(name):
    """By shapes alone: the server gets sums as before, of smaller uploads."""
    algorithm, method = make(name), top_k(0.1, bits=4)
    if algorithm.buckets[0].sends_predictions:
        with pytest.raises(ValueError, match="top_k, which sends them later, is for movements"):
            with_compression(algorithm, method)
        method = quantised(4)
    if algorithm.buckets[0].changes_places:
        with pytest.raises(ValueError, match="another part of the model in every round"):
            with_compression(algorithm, method)
        method = quantised(4)
    plain, small = shapes(algorithm), shapes(with_compression(algorithm, method))
    for (upload, sums), (small_upload, small_sums) in zip(plain, small, strict=True):
        chex.assert_trees_all_equal_shapes_and_dtypes(sums, small_sums)
        assert num_bytes(small_upload) < num_bytes(upload)


@pytest.mark.parametrize(
    ("method", "expected"), [(top_k(0.1), 7 * (2 + 4)), (quantised(8), 63 + 5 + 2 * 4)]
)
def test_bfloat16_stays(method, expected):
    ((upload, sums),) = shapes(with_compression(adder(jnp.bfloat16), method), VECTORS)
    assert num_bytes(upload) == expected + 4
    assert {x.dtype for x in jax.tree.leaves(sums.num)} == {jnp.dtype(jnp.bfloat16)}


@every_method
def test_weights_and_integers_travel_exactly(method):
    x = jax.random.normal(jax.random.key(0), (40,))
    prediction = PredictionUpload(x, Exact(x[0]), Exact(x))
    upload = (Mean(x, Exact(x)), prediction, (10 * x).astype(jnp.int32))
    info = Info(Spent(x[0]), x[0], x[0], x[0])
    client = lambda download, memory, *rest: (upload, memory, info)
    algorithm = Algorithm(None, (Bucket(None, None, client),), None)
    (bucket,) = with_compression(algorithm, method).buckets
    sent, _, _ = bucket.client(None, bucket.init_client(None, *arguments()), *arguments())
    weights = lambda tree: (tree[0].den, tree[1].examples, tree[1].known, tree[2])
    chex.assert_trees_all_equal(weights(sent), weights(upload))
    assert num_bytes((sent[0].num, sent[1].move)) < num_bytes((x, x))


@pytest.mark.parametrize("name", ["scaffold", slow("fed_per"), slow("hetero_fl")])
def test_eight_bits_go_where_full_floats_go(name):
    algorithm = with_compression(make(name), quantised(8))
    rounded, _ = run_new(algorithm, slow_and_fast(name), 2, cohort_size=3)
    plain, _ = two_rounds(name)
    distance = lambda a, b: optax.tree.norm(jax.tree.map(jnp.subtract, a, b))
    moved = distance(plain.server.variables.params, start().params)
    assert 0 < distance(rounded.server.variables, plain.server.variables) < 0.02 * moved
    # What clients keep, they keep at home and in full.
    for b, (bucket, inner) in enumerate(zip(algorithm.buckets, make(name).buckets, strict=True)):
        own = jax.tree.map(lambda x: x[0], (rounded.memories[b], plain.memories[b]))
        chex.assert_trees_all_close(
            client_variables(bucket, rounded.server, own[0]),
            client_variables(inner, plain.server, own[1]),
            atol=0.02,
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: top_k(0.0), r"fraction must be in \(0, 1\], got 0.0"),
        (lambda: top_k(1.5), r"fraction must be in \(0, 1\], got 1.5"),
        (lambda: top_k(float("nan")), "fraction must be in"),
        (lambda: top_k(0.1, bits=3), "bits must be 8, 4 or 2, got 3"),
        (lambda: quantised(16), "bits must be 8, 4 or 2, got 16"),
        (lambda: quantised(8, block=0), "block must be at least 1, .* got 0"),
    ],
)
def test_bad_settings_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "name", ["fed_avg", *map(slow, ("spatl", "scaffold", "fed_per", "hetero_fl"))]
)
def test_downloads_may_be_rounded(name):
    """Clients start from what they got, so nothing drifts; the ledger counts what travels."""
    people = slow_and_fast(name)
    plain = make(name)
    narrow = with_compression(plain, quantised(8), down=8, block=8)
    price = [
        sum(cost.bytes_down for cost in client_costs(algorithm, people, start()))
        for algorithm in (plain, narrow)
    ]
    assert price[1] < 0.5 * price[0]
    state, info = run_new(narrow, people, calls=2)
    exact, _ = run_new(plain, people, calls=2)
    assert info.non_finite.sum() == 0
    change = lambda s: jax.tree.map(jnp.subtract, s.server.variables.params, start().params)
    far = lambda a, b: float(optax.tree.norm(jax.tree.map(jnp.subtract, a, b)))
    assert far(change(state), change(exact)) < 0.1 * float(optax.tree.norm(change(exact)))


def test_what_a_client_knows_is_not_rounded():
    server = make("fed_per").init(start())
    bucket = with_compression(make("fed_per"), quantised(4), down=4).buckets[0]
    download = bucket.send(server, None)
    chex.assert_trees_all_equal(
        download.first.value.params["dense2"], server.variables.params["dense2"]
    )
