"""Aggregation of low-rank adapters, held to averaging the full products in NumPy."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import ADAPTED, LOCAL, MODEL, TASK, examples, federation, loss_gradient, run_new, start

from jaxfm.adapters import bottleneck, merge, pairs
from jaxfm.federated import (
    Exact,
    Mean,
    Movement,
    Population,
    client_costs,
    fed_avg,
    fed_ex_lora,
    fed_lora,
    fed_sb,
    ffa_lora,
    flex_lora,
    flora,
    het_lora,
    profiles,
    ra_flora,
    ro_lora,
)
from jaxfm.federated.algorithm import added
from jaxfm.federated.algorithms.fed_sb import gradient_basis
from jaxfm.subnet import Subnet, extract
from jaxfm.trees import split_tree

SCALE = ADAPTED.adapter.config.scale(2)
STACKING = (fed_lora, fed_ex_lora, flora, flex_lora, ra_flora, het_lora)
EXACT = (fed_ex_lora, flora)
begin = functools.partial(start, name="fed_lora")
make = lambda factory, **options: factory(ADAPTED, TASK, LOCAL, **options)


def products(variables):
    """s A B by site, in NumPy."""
    return {path[0]: SCALE * np.asarray(a) @ b for path, (a, b) in pairs(variables.params).items()}


def kernels(variables):
    """The merged kernels, in 64 bits."""
    params = merge(ADAPTED, variables)[1].params
    return {name: np.asarray(own["kernel"], np.float64) for name, own in params.items()}


def movements(algorithm, state, weights, seed=0, size=0.3):
    """Random uploads of clients by bucket (a weight of 0: absent), and their products s A_i B_i."""
    rng, received, ended = np.random.default_rng(seed), [], []
    for bucket, counts in zip(algorithm.buckets, weights, strict=True):
        there, parts = bucket.shared(state), []
        for count in counts:
            draw = lambda x: size * rng.normal(size=x.shape).astype(np.float32)
            step = jax.tree.map(draw, there.params)
            own = jax.tree.map(lambda x, d: np.asarray(x) + d, there.params, step)
            ended.append((count, products(there._replace(params=own))))
            parts.append(jax.tree.map(lambda d, n=count: np.float32(n) * d, step))
        num = Movement(jax.tree.map(lambda *x: np.stack(x), *parts), Exact({}))
        received.append(Mean(num, Exact(np.array(counts, np.float32))))
    total = sum(count for count, _ in ended)
    names = ended[0][1]
    return received, {n: sum(count * own[n] for count, own in ended) / total for n in names}


def compiled(algorithm):
    """One step of the server, from what clients have uploaded."""

    def step(state, received):
        totals = None
        for bucket, own in zip(algorithm.buckets, received, strict=True):
            sums = bucket.lift(state, bucket.combine(state, own, own.den.value > 0))
            totals = sums if totals is None else added(totals, sums)
        return algorithm.server(state, totals, None, jax.random.key(5))

    return jax.jit(step)


def aggregate(algorithm, state, received):
    return compiled(algorithm)(state, received)


def distance(one, other):
    gap = sum(np.square(one[name] - other[name]).sum() for name in one)
    return np.sqrt(gap / sum(np.square(x).sum() for x in other.values()))


@pytest.mark.parametrize("ranks", [(), (2, 1)], ids=["equal", "unequal"])
@pytest.mark.parametrize("factory", STACKING, ids=lambda factory: factory.__name__)
def test_the_error_is_the_distance_to_the_mean_of_full_products(factory, ranks):
    algorithm = make(factory, ranks=ranks)
    state = algorithm.init(begin())
    before = {n: kernels(state.variables)[n] - p for n, p in products(state.variables).items()}
    weights = [(3.0, 1.0, 0.0)] if not ranks else [(3.0, 0.0), (1.0, 2.0)]
    received, wanted = movements(algorithm, state, weights)
    after, figures = aggregate(algorithm, state, received)
    applied = {name: kernel - before[name] for name, kernel in kernels(after.variables).items()}
    error = distance(applied, wanted)
    np.testing.assert_allclose(figures["aggregation_error"], error, rtol=1e-4, atol=2e-6)
    if factory in EXACT:
        full = {name: before[name] + wanted[name] for name in before}
        assert distance(kernels(after.variables), full) < 1e-6 and error < 1e-5
    else:
        assert error > 0.02
    if factory is flex_lora:
        kept = {n: np.linalg.svd(m) for n, m in wanted.items()}
        best = {n: u[:, :2] * s[:2] @ v[:2] for n, (u, s, v) in kept.items()}
        assert distance(applied, best) < 1e-5


def test_means_of_factors_may_lose_all_of_it():
    """Two clients that differ in the sign of A and B have the same product; their means are 0."""
    algorithm = make(fed_lora)
    state = algorithm.init(begin())
    received, _ = movements(algorithm, state, [(1.0, 1.0)])
    signs = np.array([1.0, -1.0], np.float32)
    ends = jax.tree.map(
        lambda x: signs.reshape(-1, *[1] * x.ndim) - np.asarray(x), state.variables.params
    )
    received = [received[0]._replace(num=Movement(ends, Exact({})))]
    after, figures = aggregate(algorithm, state, received)
    np.testing.assert_allclose(figures["aggregation_error"], 1, rtol=1e-5)
    assert max(np.abs(p).max() for p in products(after.variables).values()) < 1e-6
    _, figures = aggregate(make(fed_ex_lora), make(fed_ex_lora).init(begin()), received)
    assert figures["aggregation_error"] < 1e-6


def test_apart_is_what_fed_avg_does():
    plain, algorithm = fed_avg(ADAPTED, TASK, LOCAL), make(fed_lora)
    state = algorithm.init(begin())
    received, _ = movements(algorithm, state, [(3.0, 1.0, 0.0)])
    sums = jax.tree.map(lambda x: x.sum(0), received[0])
    expected, _ = plain.server(plain.init(begin()), sums, None, jax.random.key(0))
    after, _ = aggregate(algorithm, state, received)
    chex.assert_trees_all_close(after.variables, expected.variables, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(after.variables.frozen, begin().frozen)


@pytest.mark.parametrize("rank", [3, 1])
def test_a_remainder_is_the_closest_of_its_rank(rank):
    """The rest of two clients' means is of rank 2 at most, so that a rank of 3 holds all of it."""
    algorithm = make(fed_ex_lora, remainder=rank)
    state = algorithm.init(begin())
    chex.assert_trees_all_equal(kernels(state.variables), kernels(begin()))
    received, wanted = movements(algorithm, state, [(1.0, 1.0)])
    after, figures = aggregate(algorithm, state, received)
    own, base = products(after.variables), kernels(begin())
    applied = {n: kernels(after.variables)[n] - base[n] + products(begin())[n] for n in own}
    np.testing.assert_allclose(
        figures["aggregation_error"], distance(applied, wanted), rtol=1e-3, atol=2e-6
    )
    rest = {n: np.linalg.svd(wanted[n] - own[n]) for n in own}
    best = {n: own[n] + u[:, :rank] * s[:rank] @ v[:rank] for n, (u, s, v) in rest.items()}
    assert distance(applied, best) < 1e-5
    assert (figures["aggregation_error"] < 1e-5) == (rank == 3)


def test_mixed_ranks_collapse_where_missing_columns_count_as_zeros():
    """Nobody trains, yet what only client 0 of rank 2 holds is halved in every round."""

    def second_values(factory):
        algorithm = make(factory, ranks=(2, 1))
        state, step, values = algorithm.init(begin()), compiled(algorithm), []
        for _ in range(4):
            received, _ = movements(algorithm, state, [(1.0,), (1.0,)], size=0.0)
            state, _ = step(state, received)
            product = products(state.variables)["dense1"]
            values.append(np.linalg.svd(product, compute_uv=False)[1])
        return np.array(values)

    first = second_values(flex_lora)
    np.testing.assert_allclose(first[1:] / first[:-1], 0.5, rtol=1e-4)
    held = second_values(ra_flora)
    np.testing.assert_allclose(held / held[0], 1, rtol=1e-4)


def test_norms_weigh_and_columns_that_nobody_has_stay():
    algorithm = make(het_lora, ranks=(2, 1))
    state = algorithm.init(begin())
    received, _ = movements(algorithm, state, [(0.0,), (1.0, 4.0)])
    after, _ = aggregate(algorithm, state, received)
    step = jax.tree.map(
        lambda x: x / np.array([1.0, 4.0]).reshape(-1, 1, 1), received[1].num.params
    )
    for path, (a, b) in pairs(after.variables.params).items():
        old_a, old_b = pairs(state.variables.params)[path]
        moves = pairs(step)[path]
        ends = [(old_a[:, :1] + moves[0][i], old_b[:1] + moves[1][i]) for i in range(2)]
        norm = np.array([np.linalg.norm(x @ y) for x, y in ends])
        share = norm / norm.sum()
        np.testing.assert_allclose(
            a[:, :1], sum(p * x for p, (x, _) in zip(share, ends)), rtol=1e-4, atol=1e-5
        )
        np.testing.assert_array_equal(a[:, 1:], old_a[:, 1:])
        np.testing.assert_array_equal(b[1:], old_b[1:])


def test_small_steps_add_up_in_kernels_of_16_bits():
    half = begin()
    half = half._replace(frozen=jax.tree.map(lambda x: x.astype(jnp.bfloat16), half.frozen))
    algorithm = make(flora)
    state, step = algorithm.init(half), compiled(algorithm)
    first = state
    total = dict.fromkeys(products(half), 0.0)
    for _ in range(3):
        received, wanted = movements(algorithm, state, [(1.0,)], seed=0, size=0.02)
        state, _ = step(state, received)
        total = {name: total[name] + wanted[name] for name in total}
    for name, kernel in state.masters.items():
        np.testing.assert_allclose(kernel - first.masters[name], total[name], rtol=1e-2, atol=1e-7)
        now = state.variables.frozen[name]["kernel"]
        np.testing.assert_array_equal(now, kernel.astype(jnp.bfloat16))


def costs(factory, **options):
    algorithm = make(factory, **options)
    buckets = np.arange(6) % len(algorithm.buckets)
    people = Population(federation(), profiles(6), buckets)
    return client_costs(algorithm, people, begin())


FACTORS = 4 * ((6 * 2 + 2 * 8) + (8 * 2 + 2 * 3))
KERNELS, REST = 4 * (6 * 8 + 8 * 3), 4 * (8 + 3)
ONLY_B = 4 * (2 * 8 + 2 * 3)


@pytest.mark.parametrize(
    ("factory", "options", "up", "down", "once"),
    [
        (fed_lora, {}, FACTORS, FACTORS, KERNELS + REST),
        (flex_lora, {}, FACTORS, FACTORS, KERNELS + REST),
        (fed_ex_lora, {}, FACTORS, FACTORS + KERNELS, REST),
        (fed_ex_lora, {"remainder": 1}, FACTORS, FACTORS + FACTORS // 2, KERNELS + REST),
        (flora, {}, FACTORS, KERNELS, REST),
        (ffa_lora, {}, ONLY_B, ONLY_B, KERNELS + REST + FACTORS - ONLY_B),
        (fed_sb, {}, 4 * 8, 4 * 8, KERNELS + REST + FACTORS),
    ],
)
def test_bytes_are_those_of_what_travels(factory, options, up, down, once):
    (cost,) = costs(factory, **options)
    assert (cost.bytes_up - 4, cost.bytes_down, cost.bytes_once) == (up, down, once)


@pytest.mark.parametrize("factory", STACKING, ids=lambda factory: factory.__name__)
def test_a_client_of_low_rank_holds_no_more(factory):
    large, small = costs(factory, ranks=(1, 2))
    assert 2 * (small.bytes_up - 4) == large.bytes_up - 4 == FACTORS
    assert 2 * small.parameters == large.parameters == FACTORS // 4
    assert small.memory_bytes < large.memory_bytes
    algorithm = make(factory, ranks=(2, 1))
    state = algorithm.init(begin())
    first = Subnet({"rank": np.arange(1)})
    own = extract(state.variables.params, ADAPTED.axes.params, first)
    chex.assert_trees_all_equal(algorithm.buckets[1].shared(state).params, own)


def people():
    return Population(federation(), profiles(6), np.zeros(6, int))


def test_a_and_b_take_turns_and_only_the_trained_half_is_sent():
    variables = begin()
    ends = []
    for calls in (1, 2):
        state, info = run_new(make(ro_lora), people(), calls, variables)
        ends.append(state.server.variables)
    (a0, b0), (a1, b1), (a2, b2) = (
        split_tree(v.params, lambda path: path[-1] == "b") for v in (variables, *ends)
    )
    chex.assert_trees_all_equal(a1, a0)
    chex.assert_trees_all_equal(b2, b1)
    moved = lambda x, y: all(map(np.any, jax.tree.leaves(jax.tree.map(np.not_equal, x, y))))
    assert moved(b1, b0) and moved(a2, a1)
    chex.assert_trees_all_equal(ends[1].frozen, variables.frozen)
    sent = info.spent.bytes_up[:, 0] / info.counted[:, 0]
    np.testing.assert_array_equal(sent, [4 + ONLY_B, 4 + FACTORS - ONLY_B])


def test_a_core_begins_at_zero_and_only_it_moves():
    variables = begin()
    rows = {name: x[:4] for name, x in examples(24).items()}
    basis = gradient_basis(ADAPTED, TASK, rows, jax.random.key(0))
    algorithm = make(fed_sb, basis=basis)
    first = jax.jit(algorithm.init)(variables)
    for name, kernel in kernels(variables).items():
        np.testing.assert_allclose(kernels(first.variables)[name], kernel, rtol=1e-6, atol=1e-6)
    whole = jax.tree.map(np.asarray, merge(ADAPTED, variables)[1].params)
    gradient = loss_gradient(whole, rows)
    for name in ("dense1", "dense2"):
        u, _, v = np.linalg.svd(gradient[name]["kernel"])
        a, right = first.variables.params[name]["lora"]["a"], first.rows[name][0]
        np.testing.assert_allclose(np.abs(a.T @ u[:, :2]), np.eye(2), atol=1e-3)
        np.testing.assert_allclose(np.abs(right @ v[:2].T), np.eye(2), atol=1e-3)
    state, _ = run_new(algorithm, people(), 2, variables)
    after = state.server
    chex.assert_trees_all_equal(after.rows, first.rows)
    chex.assert_trees_all_close(after.variables.frozen, first.variables.frozen, rtol=1e-6)
    for path, (a, b) in pairs(after.variables.params).items():
        np.testing.assert_allclose(a, pairs(first.variables.params)[path][0], rtol=1e-5, atol=1e-6)
        core = after.cores[path[0]][0]
        assert np.abs(core).max() > 1e-3
        np.testing.assert_allclose(b, core @ after.rows[path[0]][0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flora(MODEL, TASK, LOCAL), "flora aggregates low-rank adapters; put one around"),
        (
            lambda: ffa_lora(bottleneck(MODEL, targets="dense1"), TASK, LOCAL),
            "ffa_lora aggregates low-rank adapters",
        ),
        (lambda: make(het_lora, ranks=(2, 3)), r"ranks=\(2, 3\): give ranks from 1 to the adapter"),
        (lambda: make(flex_lora, ranks=(0,)), r"ranks=\(0,\): give ranks from 1"),
        (lambda: make(flora, ranks=(1, 1)), r"ranks=\(1, 1\) has a rank twice"),
        (lambda: make(fed_ex_lora, remainder=4), "remainder=4: give a rank from 0 to 3"),
        (lambda: make(fed_ex_lora, remainder=-1), "remainder=-1: give a rank"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
