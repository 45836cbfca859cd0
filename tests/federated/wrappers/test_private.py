"""Private rounds: no client moves the sum by more than C, and its noise is what was promised."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import (
    BATCH_NORM,
    LOCAL,
    MODEL,
    TASK,
    advance,
    examples,
    federation,
    make,
    population,
    run_new,
    setting,
    start,
)

from jaxfm.federated import Population, compile_rounds, run_client
from jaxfm.federated.accounting.epsilon import Sampling
from jaxfm.federated.accounting.privacy import Privacy
from jaxfm.federated.algorithms.fed_avg import fed_avg
from jaxfm.federated.client import client_data, client_key
from jaxfm.federated.parts.clipping import clipped, global_norm
from jaxfm.federated.registry import find
from jaxfm.federated.registry import make as make_entry
from jaxfm.federated.wrappers.compression import quantised, top_k, with_compression
from jaxfm.federated.wrappers.private import with_privacy
from jaxfm.federated.wrappers.private_checks import Quantile, keeps_memories
from jaxfm.federated.wrappers.quorum import with_quorum
from jaxfm.federated.wrappers.robust import with_robust
from jaxfm.federated.wrappers.robust_rules import median
from jaxfm.federated.wrappers.secure import with_secure_sums

ALL = Sampling(6, 6)
CLIP = 0.05


def promise(noise: float = 0.0, rounds: int | None = None, sampling: Sampling = ALL) -> Privacy:
    return Privacy(noise, 1e-3, math.inf, rounds, sampling)


def private(noise: float = 0.0, name: str = "fed_avg", rounds=None, sampling=ALL, **options):
    options = {"clip": CLIP, "noise": options.pop("noise_of", "server")} | options
    return with_privacy(make(name), promise(noise, rounds, sampling), **options)


@functools.cache
def silent():
    """Rounds of all six clients, clipped and without noise."""
    return compile_rounds(private(), population("fed_avg", federation()), cohort_size=6)


def summed(people: Population, drop_rate: float = 0.0):
    """The sum of what clients sent in one round, as the model has moved by a sixth of it."""
    state, info = advance(silent(), people, 1, drop_rate=drop_rate)
    move = jax.tree.map(jnp.subtract, state.server.variables.params, start().params)
    return jax.tree.map(lambda x: 6 * np.asarray(x, np.float64), move), info


def people(count: int = 6, **own) -> Population:
    """Six clients; the last holds `count` rows, of values of its own."""
    data, rows = federation((1, 4, 3, 5, 2, count)), examples(24)
    for name, value in own.items():
        rows[name][15:21] = value
    return population("fed_avg", data._replace(examples=rows))


def sums_of_nobody(algorithm):
    """Zeros in the shapes of a round's sums."""
    shapes = jax.eval_shape(functools.partial(_upload, algorithm), jax.random.key(0))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _upload(algorithm, key):
    """What a client without time for a step uploads."""
    data, profile = jax.tree.map(jnp.asarray, client_data(people(), 5))
    bucket, state = algorithm.buckets[0], algorithm.init(start())
    profile = profile._replace(max_steps=jnp.int32(0))
    upload, _, _ = bucket.client(bucket.send(state, None), (), data, profile, key)
    return bucket.receive(state, None, upload)


def far(a, b) -> float:
    """The distance of two trees."""
    parts = jax.tree.map(lambda x, y: np.sum(np.square(np.subtract(x, y, dtype=float))), a, b)
    return math.sqrt(sum(jax.tree.leaves(parts)))


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"x": 1e4},
        {"x": -3.0, "label": 2},
        {"x": np.random.default_rng(3).normal(size=(6, 6)) * 100, "label": [0, 1, 2, 2, 1, 0]},
        {"count": 1, "x": -3.0, "label": 1},
        {"x": 1e38},
    ],
    ids=["as it is", "large", "one label", "random", "one row", "no finite update"],
)
def test_a_client_moves_the_sum_by_the_clipping_norm_at_most(own):
    """Beside the population in which it holds no data, whatever its rows and their number are."""
    without, _ = summed(people(0))
    there, info = summed(people(**own))
    lost = "x" in own and np.max(own["x"]) > 1e30
    assert info.non_finite.sum() == lost
    if lost:
        chex.assert_trees_all_equal(there, without)
    else:
        assert 0.9 * CLIP < far(there, without) <= CLIP * (1 + 1e-4)


def test_an_absent_client_is_an_empty_one():
    """Nobody, in the end: the model stays, though its divisor is the cohort."""
    sums, info = summed(people(), drop_rate=0.999999)
    assert info.counted.sum() == 0 and far(sums, jax.tree.map(np.zeros_like, sums)) == 0


def test_every_client_counts_alike():
    """The sum is that of each client's own movement, clipped, as NumPy has it."""
    crowd = people()
    sums, _ = summed(crowd)
    algorithm, download = make("fed_avg"), start()
    key, total = jax.random.key(3), jax.tree.map(lambda x: np.zeros(x.shape), download.params)
    norms = []
    for client in range(6):
        data, profile = client_data(crowd, client)
        answer = run_client(
            algorithm.buckets[0], download, (), data, profile, client_key(key, client, 0)
        )
        count = float(data.count)
        move = jax.tree.map(lambda x, n=count: x / n, answer.upload.num.params)
        norms.append(far(move, jax.tree.map(np.zeros_like, move)))
        total = jax.tree.map(lambda s, x: s + x * min(1, CLIP / norms[-1]), total, move)
    assert max(norms) > CLIP  # or nothing would be tested
    chex.assert_trees_all_close(sums, total, atol=2e-6)


def test_noise_of_the_server_is_as_large_as_promised():
    algorithm = private(noise=2.0)
    state = algorithm.init(start())
    zeros = sums_of_nobody(algorithm)

    @jax.jit
    @jax.vmap
    def moved(key):
        new, figures = algorithm.server(state, zeros, None, key)
        return new.variables.params, figures["private/deviation"]

    params, stated = moved(jax.random.split(jax.random.key(5), 200))
    drawn = [
        np.ravel(np.asarray(x) - np.asarray(y))
        for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(start().params), strict=True)
    ]
    assert abs(np.std(np.concatenate(drawn)) / float(stated[0]) - 1) < 0.02
    assert math.isclose(stated[0], 2.0 * CLIP / 6, rel_tol=1e-6)


def test_shares_of_the_clients_add_up_to_the_noise():
    """Of the fewest that may report; each draws a share of its own."""
    algorithm = private(noise=2.0, least_reports=4, noise_of="clients")
    keys = jax.random.split(jax.random.key(5), (100, 4))
    shares = jax.jit(jax.vmap(jax.vmap(functools.partial(_upload, algorithm))))(keys)
    sums = jax.tree.map(lambda x: x.sum(1), shares.own.num.params)
    drawn = np.concatenate([np.ravel(x) for x in jax.tree.leaves(sums)])
    assert abs(np.std(drawn) / (2.0 * CLIP) - 1) < 0.02
    assert math.isclose(np.std(jax.tree.leaves(shares.own.num.params)[0]), CLIP, rel_tol=0.02)


def test_a_round_with_too_few_shares_is_discarded():
    algorithm = private(noise=1.0, least_reports=6, noise_of="clients")
    state, _ = run_new(algorithm, people())
    assert state.server.released == 1
    state, _ = run_new(algorithm, people(0))
    chex.assert_trees_all_equal(state.server, algorithm.init(start()))


def test_no_round_is_released_past_the_budget():
    crowd = people()
    engine = compile_rounds(private(noise=1.0, rounds=2), crowd, cohort_size=6)
    two, _ = advance(engine, crowd, 2)
    four, _ = advance(engine, crowd, 4)
    assert two.server.released == four.server.released == 2 and four.round == 4
    chex.assert_trees_all_equal(four.server, two.server)


def test_the_norm_follows_a_quantile_of_the_clients_norms():
    """Without noise to speak of half of the movements are longer in the end."""
    adapt = Quantile(target=0.5, rate=0.5, noise=1e-6)
    slow = fed_avg(MODEL, TASK, LOCAL)._replace(server=lambda s, t, p, k: (s, {}))
    algorithm = with_privacy(slow, promise(1e-6), clip=1e-3, adapt=adapt)
    crowd = people()
    engine = compile_rounds(algorithm, crowd, cohort_size=6, num_rounds=30)
    state, info = advance(engine, crowd, 1)
    norms = sorted(_norm(make("fed_avg"), crowd, client) for client in range(6))
    assert info.server["private/clip"][0] == np.float32(1e-3)
    assert norms[1] < state.server.clip < norms[4]


def _norm(algorithm, crowd, client: int) -> float:
    data, profile = client_data(crowd, client)
    answer = run_client(algorithm.buckets[0], start(), (), data, profile, jax.random.key(client))
    return float(global_norm(answer.upload.num.params)) / float(data.count)


def test_noise_of_the_quantile_is_paid_for_by_the_sums():
    """One Gaussian of z is worth two of z' and 2 s, side by side."""
    adapt = Quantile(noise=0.2)
    algorithm = private(noise=1.5, adapt=adapt)
    zeros = sums_of_nobody(algorithm)
    _, figures = algorithm.server(algorithm.init(start()), zeros, None, jax.random.key(0))
    z = float(figures["private/deviation"]) * 6 / CLIP
    assert z > 1.5 and math.isclose(z**-2 + (2 * 0.2 * 6) ** -2, 1.5**-2, rel_tol=1e-5)


def test_rounded_uploads_are_clipped_again():
    """Rounding to few levels may lengthen what a client sends; the server's clipping bounds it."""
    algorithm = with_compression(private(), quantised(4))
    bucket, state = algorithm.buckets[0], algorithm.init(start())
    data, profile = jax.tree.map(jnp.asarray, client_data(people(x=30.0), 5))
    key = jax.random.key(1)
    memory = bucket.init_client(bucket.send(state, None), data, profile, key)
    run = jax.jit(
        lambda key: bucket.client(bucket.send(state, None), memory, data, profile, key)[0]
    )
    norms = [
        float(global_norm(bucket.receive(state, None, run(jax.random.key(i))).own.num))
        for i in range(5)
    ]
    assert max(norms) <= CLIP * (1 + 1e-6) and min(norms) > 0.8 * CLIP


def test_clipping_keeps_short_vectors_and_infinite_ones_are_no_update():
    short = {"a": jnp.array([3e-3, 4e-3])}
    chex.assert_trees_all_equal(clipped(short, jnp.float32(1.0)), short)
    assert np.isclose(global_norm(clipped(short, jnp.float32(1e-3))), 1e-3)
    assert not np.isfinite(clipped({"a": jnp.array([jnp.inf, 1.0])}, jnp.float32(1.0))["a"]).all()
    assert np.all(clipped({"a": jnp.zeros(2)}, jnp.float32(1.0))["a"] == 0)


@pytest.mark.parametrize("noise_of", ["server", "clients"])
def test_secure_sums_of_private_uploads_are_those_sums(noise_of):
    """The client clips what it encodes, and the noise is the same, whoever adds it."""
    algorithm = private(noise=1.0, noise_of=noise_of)
    secure = with_secure_sums(algorithm, 6, limit=1.0)
    options = {"clients_at_once": 3}
    plain, _ = run_new(algorithm, people(), **options)
    hidden, _ = run_new(secure, people(), **options)
    assert hidden.server.released == plain.server.released == 1
    chex.assert_trees_all_close(hidden.server.variables, plain.server.variables, atol=1e-7)


@pytest.mark.parametrize("name", ["fed_adam", "fed_prox", "fed_per"])
def test_any_mean_of_movements_can_be_private(name):
    known = ALL._replace(secret=not keeps_memories(make(name)))
    algorithm = private(noise=0.5, name=name, sampling=known)
    state, info = run_new(algorithm, people(), 2)
    assert info.counted.sum() == 12 and state.server.released == 2


def test_halves_are_clipped_in_full_width():
    cast = lambda variables, dtype: jax.tree.map(lambda x: x.astype(dtype), variables)
    half = MODEL._replace(
        init=lambda key: cast(MODEL.init(key), jnp.bfloat16),
        apply=lambda v, *rest, **options: MODEL.apply(cast(v, jnp.float32), *rest, **options),
    )
    algorithm = make_entry(find("fed_avg"), setting(half))
    algorithm = with_privacy(algorithm, promise(), clip=CLIP)
    crowd, variables = people(), cast(start(), jnp.bfloat16)
    state, _ = run_new(algorithm, crowd, variables=variables)
    assert jax.tree.leaves(state.server.variables)[0].dtype == jnp.bfloat16
    move = far(state.server.own.wide.variables.params, variables.params)
    assert 0.2 * CLIP < move <= CLIP * (1 + 1e-5)


SECRET = Sampling(6, 3)
REFUSED = {
    "scaffold": (lambda: run_new(private(name="scaffold"), people()), "more than means of"),
    "fed_nova": (lambda: run_new(private(name="fed_nova"), people()), "more than means of"),
    "spatl": (lambda: private(name="spatl"), "more than means of movements"),
    "fed_md": (lambda: private(name="fed_md"), "predictions on public rows"),
    "hetero_fl": (lambda: private(name="hetero_fl"), "unequal models"),
    "twice": (lambda: with_privacy(private(), promise()), "is private already"),
    "median": (
        lambda: with_privacy(
            make("fed_avg")._replace(
                buckets=(make("fed_avg").buckets[0]._replace(combine=lambda *x: x[1]),)
            ),
            promise(),
        ),
        "aggregation is no sum",
    ),
    "rule": (lambda: with_robust(private(), median), "bounds what a client adds to a sum"),
    "memories": (lambda: private(name="fed_per", sampling=SECRET), "keep memories that tell"),
    "top_k": (lambda: with_compression(private(), top_k(0.1)), "tells who was drawn"),
    "rounded shares": (
        lambda: with_compression(private(1.0, noise_of="clients"), quantised(8)),
        "would change the noise",
    ),
    "quorum": (lambda: with_quorum(private(), 3), "depends on their data"),
    "clip": (lambda: private(clip=0.0), "clip=0.0 must be a norm above 0"),
    "noise": (lambda: private(noise_of="nobody"), "noise='nobody': it is of the 'server'"),
    "least": (lambda: private(least_reports=2), "least_reports=2 is for noise of the clients"),
    "more": (
        lambda: private(noise_of="clients", least_reports=7),
        "least_reports=7 must be from 1 to the cohort, 6",
    ),
    "quantile": (
        lambda: private(5.0, adapt=Quantile(noise=0.1)), "alone would cost more than .* 5 allows"
    ),
    "target": (lambda: private(1.0, adapt=Quantile(target=1.0)), "target must be in"),
    "adapting shares": (
        lambda: private(1.0, adapt=Quantile(), noise_of="clients"), "leave noise to the server"
    ),
    "cohort": (
        lambda: compile_rounds(private(), people(), cohort_size=3),
        "draws 3 of 6 clients, but its privacy accounts for 6 of 6",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_private_is_refused(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_statistics_of_batch_norm_are_refused():
    algorithm = with_privacy(fed_avg(BATCH_NORM, TASK, LOCAL), promise())
    with pytest.raises(ValueError, match="statistics of batch norm cannot be private"):
        run_new(algorithm, people(), variables=BATCH_NORM.init(jax.random.key(0)))
