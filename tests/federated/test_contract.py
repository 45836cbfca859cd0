"""The laws that every federated algorithm keeps, on one tiny classifier.

Populations differ in numbers and not in shapes, so that most laws of an algorithm share one
compiled program.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxfm.checkpoint import Checkpointer
from jaxfm.data.federation import Federation, federate
from jaxfm.federated.accounting.resources import profiles
from jaxfm.federated.algorithms.adp import adp
from jaxfm.federated.algorithms.fed_avg import fed_avg
from jaxfm.federated.algorithms.fed_df import fed_df
from jaxfm.federated.algorithms.fed_dp import fed_dp
from jaxfm.federated.algorithms.fed_dyn import fed_dyn
from jaxfm.federated.algorithms.fed_kemf import fed_kemf
from jaxfm.federated.algorithms.fed_md import fed_md
from jaxfm.federated.algorithms.fed_nova import fed_nova
from jaxfm.federated.algorithms.fed_opt import fed_adam, fed_avg_m, fed_yogi
from jaxfm.federated.algorithms.fed_per import fed_per
from jaxfm.federated.algorithms.fed_prox import fed_prox
from jaxfm.federated.algorithms.fed_rolex import fed_rolex
from jaxfm.federated.algorithms.hetero_fl import hetero_fl
from jaxfm.federated.algorithms.lg_fed_avg import lg_fed_avg
from jaxfm.federated.algorithms.raffm import raffm
from jaxfm.federated.algorithms.rafl import rafl
from jaxfm.federated.algorithms.scaffold import scaffold
from jaxfm.federated.algorithms.spatl import spatl
from jaxfm.federated.local import Local
from jaxfm.federated.partition import under
from jaxfm.federated.parts.channel_selection import saliency
from jaxfm.federated.parts.ensemble import Distil
from jaxfm.federated.rounds import Population, rounds
from jaxfm.model import Model, Variables, from_nnx
from jaxfm.models.families.cnn import mlp
from jaxfm.parallel.mesh import make_mesh
from jaxfm.search.elastic.supernet import supernet
from jaxfm.search.strategies.project import Budget
from jaxfm.search.subnets import model_network
from jaxfm.subnet import Subnet, embed
from jaxfm.tasks import classification

MODEL = mlp((6, 8, 3))
TASK = classification(3, inputs="x")
LR = 0.1
TIERS = tuple(Subnet({"hidden1": np.arange(size)}) for size in (8, 4, 2))

DISTIL = Distil(optax.sgd(0.05), steps=3, batch_size=4)
PUBLIC = {"x": np.random.default_rng(1).normal(size=(5, 6)).astype(np.float32)}


def fixed(model: Model) -> Model:
    """Clients of the laws start alike."""
    return model._replace(init=lambda key: model.init(jax.random.key(7)))


def two_designs(model: Model, task, local: Local):
    """In the first bucket clients' own networks start from the knowledge network's weights, so
    that the first step of mutual learning is each one's own."""
    own = fixed(mlp((6, 5, 3)))
    dtype = jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)).params)[0].dtype
    cast = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
    own = own._replace(init=lambda key, init=own.init: cast(init(key)))
    return fed_kemf(model, [fixed(model), own, own], task, local, DISTIL)


def padded_member(model: Model, task, local: Local):
    """A member of 16 channels, of which the first 8 are the model's, the others zeros."""
    wide = mlp((6, 32, 3))
    small = fixed(model).init(jax.random.key(0))
    like = jax.eval_shape(wide.init, jax.random.key(0))
    variables = embed(small, wide.axes, TIERS[0], like)
    in_order = lambda params, axes, name: -jnp.arange(32.0)
    net = supernet(wide, variables, ("hidden1",), importance=in_order)
    budgets = [Budget("channels", lambda counts: counts.sum(), np.array([16.0]))]
    search = lambda budgets, clients: np.array([16])
    return rafl(net, wide, task, local, DISTIL, budgets, search=search).algorithm


def pruned_by_data(model: Model, task, local: Local, gates: str = "personal"):
    like = jax.eval_shape(model.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((1, 6), jax.tree.leaves(like.params)[0].dtype)
    return adp(model_network(model, like, x), model, task, local, rounds=2, gates=gates).algorithm


def salient(model: Model, task, local: Local):
    like = jax.eval_shape(model.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((1, 6), jax.tree.leaves(like.params)[0].dtype)
    select = saliency(model_network(model, like, x), {"macs": 0.6})
    return spatl(model, task, local, select, num_clients=6, is_personal=under("dense2"))


ALGORITHMS = {
    "fed_avg": fed_avg,
    "fed_prox": functools.partial(fed_prox, mu=0.1),
    "fed_adam": fed_adam,
    "fed_yogi": fed_yogi,
    "fed_avg_m": fed_avg_m,
    "scaffold": functools.partial(scaffold, num_clients=6),
    "fed_nova": fed_nova,
    "fed_dyn": functools.partial(fed_dyn, num_clients=6, alpha=0.1),
    "fed_per": functools.partial(fed_per, is_personal=under("dense2")),
    "lg_fed_avg": functools.partial(lg_fed_avg, is_shared=under("dense2")),
    "fed_rolex_3": lambda model, task, local: fed_rolex(model, task, local, TIERS),
    "hetero_fl_1": lambda model, task, local: hetero_fl(model, task, local, [Subnet({})]),
    "hetero_fl_3": lambda model, task, local: hetero_fl(model, task, local, TIERS),
    "raffm_3": lambda model, task, local: raffm(
        model, task, local, TIERS, reorder_every=1, distil=0.5
    ),
    "fed_df": lambda model, task, local: fed_df(model, task, local, DISTIL),
    "fed_md": lambda model, task, local: fed_md([fixed(model)], task, local, local, (5, 3)),
    "fed_kemf": two_designs,
    "rafl": padded_member,
    "adp": pruned_by_data,
    "adp_federated": functools.partial(pruned_by_data, gates="federated"),
    "fed_dp": fed_dp,
    "spatl": salient,
}
VARIANTS = ("adp_federated", "fed_dp", "fed_yogi", "fed_avg_m")  # slow: of the same parts as others
every_algorithm = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in VARIANTS else n for n in ALGORITHMS],
)
# Laws that compile a program of their own: the others are built of the same parts, and slow.
CORE = (
    "fed_avg",
    "fed_adam",
    "scaffold",
    "fed_per",
    "hetero_fl_3",
    "fed_kemf",
    "rafl",
    "adp",
    "spatl",
)


def mostly(names):
    slow = lambda name: pytest.param(name, marks=pytest.mark.slow)
    return pytest.mark.parametrize("name", [n if n in CORE else slow(n) for n in names])


# The server divides by all six clients, absent ones too (laws of their own: test_baselines.py).
COUNT_EVERYBODY = ("scaffold", "fed_dyn", "spatl")
# What stays with the clients.
PERSONAL = {"fed_per": "dense2", "lg_fed_avg": "dense1", "spatl": "dense2"}


def make(name: str, batch_size: int = 4, epochs: int = 2, model: Model = MODEL, task=TASK):
    return ALGORITHMS[name](model, task, Local(optax.sgd(LR), batch_size, epochs))


def examples(num: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, num).astype(np.int32)
    x = rng.normal(size=(num, 6)) + label[:, None]
    return {"x": x.astype(np.float32), "label": label}


def federation(counts=(6, 1, 4, 3, 5, 2)) -> Federation:
    """Clients with the next counts[i] rows each, whatever the count the same 24 rows and width."""
    ends = np.cumsum(counts)
    parts = [np.arange(end - count, end) for count, end in zip(counts, ends)]
    data = federate(examples(24), parts)
    return data._replace(index=np.pad(data.index, ((0, 0), (0, 6 - data.index.shape[1]))))


def population(name: str, data: Federation, **profile) -> Population:
    num_clients = len(data.count)
    num_buckets = len(make(name).buckets)
    return Population(data, profiles(num_clients, **profile), np.arange(num_clients) % num_buckets)


def start(dtype=jnp.float32):
    variables = MODEL.init(jax.random.key(7))
    return jax.tree.map(lambda x: x.astype(dtype), variables)


@functools.cache
def engine(name: str, **options):
    """Six clients; calls give it populations with other numbers."""
    options = {"cohort_size": 6, "public": PUBLIC} | options
    return rounds(make(name), population(name, federation()), **options)


def run(name: str, people: Population, calls: int = 1, **options):
    """(final state, the infos of all rounds joined), everybody in the cohort if not said."""
    return advance(engine(name, **options), people, calls)


def run_new(algorithm, people: Population, calls: int = 1, variables=None, **options):
    """As `run`, for an algorithm or a population of its own."""
    options = {"cohort_size": len(people.federation.count), "public": PUBLIC} | options
    return advance(rounds(algorithm, people, **options), people, calls, variables)


def advance(engine, people: Population, calls: int, variables=None):
    state = engine.init(start() if variables is None else variables, jax.random.key(3))
    infos = []
    for _ in range(calls):
        state, info = engine.run(state, people)
        infos.append(jax.tree.map(np.asarray, info))
    return state, jax.tree.map(lambda *x: np.concatenate(x), *infos)


@functools.cache
def two_rounds(name: str):
    """The reference of several laws: three of six clients a round, some of them slow."""
    return run(name, slow_and_fast(name), calls=2, cohort_size=3)


def slow_and_fast(name: str) -> Population:
    return population(name, federation(), max_steps=np.array([2, 9, 1, 9, 3, 9]))


def assert_same(a, b, tolerance: float = 1e-6):
    chex.assert_trees_all_close(a.server, b.server, rtol=tolerance, atol=tolerance)


def loss_gradient(params: dict, rows: dict) -> dict:
    """The gradient of the mean loss over some rows, in NumPy."""
    k1, b1, k2, b2 = (params[a][b] for a in ("dense1", "dense2") for b in ("kernel", "bias"))
    x, num = rows["x"], len(rows["x"])
    hidden = np.maximum(x @ k1 + b1, 0)
    odds = np.exp(hidden @ k2 + b2)
    error = (odds / odds.sum(-1, keepdims=True) - np.eye(3)[rows["label"]]) / num
    back = error @ k2.T * (hidden > 0)
    return {
        "dense1": {"kernel": x.T @ back, "bias": back.sum(0)},
        "dense2": {"kernel": hidden.T @ error, "bias": error.sum(0)},
    }


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name not in COUNT_EVERYBODY])
def test_identical_clients_equal_one_client(name):
    data = federation()
    data = data._replace(index=np.tile(np.arange(6, dtype=np.int32), (6, 1)))
    once, twice = np.array([4, 4, 4, 0, 0, 0]), np.full(6, 4)
    one, _ = run(name, population(name, data._replace(count=once)))
    many, _ = run(name, population(name, data._replace(count=twice)))
    assert_same(one, many)


@pytest.mark.parametrize("name", ["scaffold", "fed_kemf", "adp", "raffm_3"])
def test_resumed_from_a_checkpoint_it_ends_with_the_same_bits(name, tmp_path):
    engine_, people = engine(name), population(name, federation())
    whole, _ = advance(engine_, people, 2)
    half, _ = advance(engine_, people, 1)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, half)
        _, state = checkpoints.restore(like=engine_.init(start(), jax.random.key(9)))
    state, _ = engine_.run(state, people)
    chex.assert_trees_all_equal(state.server, whole.server)
    chex.assert_trees_all_equal(state.memories, whole.memories)


@every_algorithm
def test_an_empty_client_equals_an_absent_one(name):
    there, _ = run(name, population(name, federation((6, 5, 4, 0, 0, 0))))
    absent, info = run_new(make(name), population(name, federation((6, 5, 4))))
    assert_same(there, absent)
    assert info["clients"].sum() == 3


@every_algorithm
def test_a_dropped_client_equals_an_empty_one(name):
    people = population(name, federation())
    dropped, info = run(name, people, drop_rate=0.5)
    assert 0 < info["clients"].sum() < 6 == info["selected"].sum()
    sizes = people.federation.count
    # Which of them dropped out: the only set of clients with these sums.
    fits = []
    for reported in np.ndindex(*[2] * 6):
        counts = np.where(reported, sizes, 0)
        clients = np.bincount(people.bucket, reported, len(make(name).buckets))
        if counts.sum() == info["examples"] and (clients == info["clients"][0]).all():
            fits.append(counts)
    states = [
        run(name, people._replace(federation=people.federation._replace(count=count)))[0]
        for count in fits
    ]
    gaps = [
        max(
            float(abs(a - b).max())
            for a, b in zip(*map(jax.tree.leaves, (s.server, dropped.server)))
        )
        for s in states
    ]
    assert min(gaps) == 0


@every_algorithm
def test_the_order_of_clients_does_not_matter(name):
    people = population(name, federation((4, 1, 4, 3, 2, 2)))  # whole batches: no shuffling
    order = np.array([3, 4, 2, 0, 1, 5])  # nobody changes the bucket
    data = people.federation._replace(
        index=people.federation.index[order], count=people.federation.count[order]
    )
    shuffled = people._replace(federation=data, bucket=people.bucket[order])
    assert_same(run(name, people)[0], run(name, shuffled)[0])


def server_step(name: str, x, d):
    """What each server makes of its first mean movement d."""
    if name == "fed_dyn":
        return x + d + d / 6  # - h / alpha
    if name not in ("fed_adam", "fed_yogi"):
        return x + d
    b1, b2, tau, rate = 0.9, 0.99, 1e-3, 0.01
    v = tau**2
    if name == "fed_adam":
        v = b2 * v + (1 - b2) * d**2
    else:
        v = v - (1 - b2) * d**2 * np.sign(v - d**2)
    return x + rate * (1 - b1) * d / (np.sqrt(v) + tau)


# Distillation adds a term, and the model is in an order of its own (test_raffm.py).
ONE_STEP = [name for name in ALGORITHMS if name not in ("fed_md", "raffm_3", "spatl")]


@pytest.mark.parametrize("name", ONE_STEP)
def test_one_client_and_one_step_is_a_gradient_step(name):
    people = population(name, federation((4, 0, 0, 0, 0, 0)), max_steps=1)
    state, info = run(name, people)
    before = jax.tree.map(np.asarray, start().params)
    rows = {key: value[:4] for key, value in examples(24).items()}
    gradient = loss_gradient(before, rows)
    if name in PERSONAL:
        gradient[PERSONAL[name]] = jax.tree.map(np.zeros_like, gradient[PERSONAL[name]])
    expected = jax.tree.map(lambda x, g: server_step(name, x, -LR * g), before, gradient)
    chex.assert_trees_all_close(state.server.variables.params, expected, rtol=1e-5, atol=1e-6)
    assert info["steps"].sum() == 1 and info["examples"].sum() == 4


@every_algorithm
def test_new_cohorts_counts_and_steps_do_not_compile(name):
    traces = []

    def prepare(batch, key):
        traces.append(name)
        return TASK.prepare(batch, key)

    people = slow_and_fast(name)
    algorithm = make(name, task=TASK._replace(prepare=prepare))
    engine = rounds(algorithm, people, cohort_size=3, drop_rate=0.3, public=PUBLIC)
    state, info = engine.run(engine.init(start(), jax.random.key(0)))
    jax.block_until_ready(info)
    others = population(name, federation((1, 6, 2, 5, 0, 4)), max_steps=np.arange(1, 7))
    traced, compiled, seen = len(traces), [], set()
    watch = lambda event, seconds, **_: compiled.append(event) if "compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(watch)
    try:
        for people in (None, None, None, others, others, others):
            state, info = engine.run(state, people)
            info = jax.device_get(info)
            seen.add((float(info["steps"].sum()), float(info["examples"][0])))
    finally:
        jax.monitoring.unregister_event_duration_listener(watch)
    assert len(seen) > 2, "the rounds did not differ"
    assert len(traces) == traced and compiled == []


@mostly(ALGORITHMS)
def test_dtypes_stay(name):
    half = jnp.bfloat16
    task = classification(3, inputs="x", transform=lambda x, key: x.astype(half))
    model = MODEL._replace(init=lambda key: start(half))
    algorithm = make(name, model=model, task=task)
    state, _ = run_new(algorithm, slow_and_fast(name), 2, start(half), cohort_size=3)
    before = jax.eval_shape(algorithm.init, start(half))
    chex.assert_trees_all_equal_shapes_and_dtypes(before, state.server)
    reference, _ = two_rounds(name)
    single = jax.eval_shape(make(name).init, start())
    chex.assert_trees_all_equal_shapes_and_dtypes(single, reference.server)
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x.astype(jnp.float32), state.server.variables),
        reference.server.variables,
        atol=0.05,
    )


def test_sums_of_bfloat16_are_taken_in_32_bits():
    """600 clients with the same row: in bfloat16 a sum stands still at 256 of its terms."""
    half = jnp.bfloat16
    task = classification(3, inputs="x", transform=lambda x, key: x.astype(half))
    algorithm = make("fed_avg", task=task)
    rows = [np.array([0])] * 600
    many, one = (
        run_new(algorithm, population("fed_avg", federate(examples(24), rows[:n])), 1, start(half))
        for n in (600, 1)
    )
    chex.assert_trees_all_close(
        *(s.server.variables.params["dense2"]["bias"].astype(jnp.float32) for s, _ in (many, one)),
        rtol=0.02,
    )


@every_algorithm
def test_a_non_finite_update_is_left_out_and_counted(name):
    people = population(name, federation())
    data = people.federation
    sick = data._replace(examples=data.examples | {"x": data.examples["x"].copy()})
    sick.examples["x"][data.index[1, 0]] = np.nan  # the one row of client 1
    left, info = run(name, people._replace(federation=sick))
    without = data._replace(count=np.where(np.arange(6) == 1, 0, data.count))
    absent, other = run(name, people._replace(federation=without))
    assert info["non_finite"].sum() == 1 and info["clients"].sum() == 5
    for field in ("loss_total", "examples"):
        np.testing.assert_allclose(info[field], other[field])
    assert (info["steps"] > other["steps"]).any()  # its work is done, for nothing
    assert_same(left, absent)


@every_algorithm
@pytest.mark.parametrize("why", ["all empty", "all non-finite"])
def test_a_round_without_reports_changes_nothing(name, why):
    data = federation()
    if why == "all empty":
        data = data._replace(count=0 * data.count)
    if why == "all non-finite":
        data = data._replace(examples=data.examples | {"x": data.examples["x"] * np.inf})
    state, info = run(name, population(name, data))
    assert info["clients"].sum() == 0 and info["selected"].sum() == 6
    chex.assert_trees_all_equal(state.server, make(name).init(start()))
    assert int(state.round) == 1


@every_algorithm
def test_the_state_is_donated_and_the_callers_variables_are_not(name):
    runner = engine(name, cohort_size=3)
    variables, key = start(), jax.random.key(3)
    state = runner.init(variables, key)
    after, _ = runner.run(state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((variables, key, after)))
    again, _ = runner.run(runner.init(variables, key))
    chex.assert_trees_all_equal(after.server, again.server)


@mostly(ALGORITHMS)
@pytest.mark.parametrize(
    "options",
    [{"width": 100, "num_rounds": 2}, {"mesh": 1, "width": 2}],
    ids=lambda options: "-".join(f"{k}{v}" for k, v in options.items()),
)
def test_devices_widths_and_rounds_a_call_do_not_matter(name, options):
    if "mesh" in options:
        options = options | {"mesh": make_mesh(clients=1)}
    calls = 2 // options.get("num_rounds", 1)
    state, info = run(name, slow_and_fast(name), calls, cohort_size=3, **options)
    reference, expected = two_rounds(name)
    assert_same(state, reference, 1e-5)
    chex.assert_trees_all_close(info, expected, rtol=1e-5, atol=1e-6)
    assert int(state.round) == 2


def batch_norm_model() -> Model:
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(6, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
            self.last = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.last(jax.nn.relu(self.norm(self.first(x))))

    return from_nnx(Net)


BATCH_NORM = batch_norm_model()


@functools.cache
def batch_norm_step():
    """(variables, statistics averaged over clients that own rows 0-3 and 4-5)."""
    variables = jax.jit(BATCH_NORM.init)(jax.random.key(0))
    stats = jax.jit(lambda x: BATCH_NORM.apply(variables, x, train=True)[1])
    x = examples(24)["x"]
    # A batch is filled up with the client's own rows.
    first, second = stats(x[:4]), stats(x[[4, 5, 4, 5]])
    return variables, jax.tree.map(lambda a, b: (4 * a + 2 * b) / 6, first, second)


# Others name axes or parts that this model does not have, or share no statistics.
OTHERS = ("hetero_fl_3", "fed_rolex_3", "raffm_3", "fed_md", "rafl", *PERSONAL)
SHARE_ALL = [name for name in ALGORITHMS if name not in OTHERS]


@mostly(SHARE_ALL)
def test_batch_norm_statistics_are_averaged(name):
    variables, expected = batch_norm_step()
    algorithm = make(name, epochs=1, model=BATCH_NORM)
    people = population(name, federation((4, 2)))
    state, _ = run_new(algorithm, people, variables=variables)
    chex.assert_trees_all_close(state.server.variables.stats, expected, rtol=1e-5, atol=1e-6)


# What single algorithms are.


def assert_is_fed_avg(algorithm, tolerance: float):
    state, _ = run_new(algorithm, slow_and_fast("fed_avg"), 2, cohort_size=3)
    reference, _ = two_rounds("fed_avg")
    chex.assert_trees_all_close(
        state.server.variables, reference.server.variables, rtol=tolerance, atol=tolerance
    )


LOCAL = Local(optax.sgd(LR), 4, 2)  # as in `make`


def test_fed_prox_without_mu_is_fed_avg():
    assert_is_fed_avg(fed_prox(MODEL, TASK, LOCAL, mu=0.0), 0)


def test_server_momentum_zero_is_fed_avg():
    assert_is_fed_avg(fed_avg_m(MODEL, TASK, LOCAL, learning_rate=1.0, momentum=0.0), 1e-7)


def test_one_full_tier_is_fed_avg():
    assert_is_fed_avg(hetero_fl(MODEL, TASK, LOCAL, [TIERS[0]]), 1e-7)


def test_server_momentum_accumulates():
    """d1, then d2 + 0.9 d1: with the same gradient twice (a linear loss) 1 and 1.9 steps."""
    task = TASK._replace(loss=lambda out, targets, weight: (jnp.sum(out), jnp.sum(weight)))
    bias = lambda state: np.asarray(state.server.variables.params["dense2"]["bias"])
    people = population("fed_avg", federation((4, 4)))
    algorithm = fed_avg_m(MODEL, task, Local(optax.sgd(LR), 4), momentum=0.9)
    once, _ = run_new(algorithm, people)
    twice, _ = run_new(algorithm, people, calls=2)
    before = np.asarray(start().params["dense2"]["bias"])
    np.testing.assert_allclose(bias(once) - before, -LR, rtol=1e-5)
    np.testing.assert_allclose(bias(twice) - bias(once), -1.9 * LR, rtol=1e-5)


def test_the_proximal_term_of_a_quadratic():
    """min (a/2)|y - t|² + (mu/2)|y - x|²: after K steps at rate r the error shrank K times by
    1 - r (a + mu)."""
    mu, rate, steps = 0.5, 0.1, 7
    variables, target, data = quadratic([3.0])
    algorithm = fed_prox(QUADRATIC, SQUARES, Local(optax.sgd(rate), 1, steps), mu=mu)
    state, _ = run_new(algorithm, population("fed_avg", data), variables=variables)
    x = 1.0
    fixed = (target[0] + mu * x) / (1 + mu)
    expected = fixed + (x - fixed) * (1 - rate * (1 + mu)) ** steps
    np.testing.assert_allclose(state.server.variables.params["y"], expected, rtol=1e-5)


def quadratic_model() -> Model:
    init = lambda key: Variables({"y": jnp.ones(())}, {}, {})
    apply = lambda variables, x, train=False, key=None: (variables.params["y"] + 0 * x, {})
    return Model(init, apply, Variables({"y": ()}, {}, {}))


def _half_square(outputs, targets, weight):
    return jnp.sum(0.5 * weight * jnp.square(outputs - targets)), jnp.sum(weight)


QUADRATIC = quadratic_model()
SQUARES = TASK._replace(
    prepare=lambda batch, key: (batch["t"], batch["t"], jnp.ones_like(batch["t"])),
    loss=_half_square,
    metrics=lambda *args: {"loss": _half_square(*args)},
)


def quadratic(targets):
    """Clients that own one number each, and pull y towards it."""
    targets = np.asarray(targets, np.float32)
    data = federate({"t": targets}, [np.array([i]) for i in range(len(targets))])
    return QUADRATIC.init(jax.random.key(0)), targets, data


def test_each_coordinate_is_averaged_over_those_who_cover_it():
    people = population("hetero_fl_3", federation())
    state, _ = run_new(make("hetero_fl_3", batch_size=6, epochs=1), people)
    full = jax.tree.map(np.asarray, start().params)
    num = jax.tree.map(np.zeros_like, full)
    den = jax.tree.map(np.zeros_like, full)
    data = people.federation
    for client, (count, bucket) in enumerate(zip(data.count, people.bucket)):
        h = (8, 4, 2)[bucket]
        window = lambda tree, h=h: [
            tree["dense1"]["kernel"][:, :h], tree["dense1"]["bias"][:h],
            tree["dense2"]["kernel"][:h], tree["dense2"]["bias"][:],
        ]  # fmt: skip
        k1, b1, k2, b2 = window(full)
        own = {"dense1": {"kernel": k1, "bias": b1}, "dense2": {"kernel": k2, "bias": b2}}
        rows = {n: x[data.index[client, :count]] for n, x in data.examples.items()}
        gradient = loss_gradient(own, rows)
        for total, weight, g in zip(window(num), window(den), window(gradient)):
            total += count * -LR * g
            weight += count
    expected = jax.tree.map(lambda x, n, d: x + n / np.maximum(d, 1), full, num, den)
    chex.assert_trees_all_close(state.server.variables.params, expected, rtol=1e-5, atol=1e-6)


def test_with_the_scaler_half_of_equal_units_are_the_whole():
    variables = MODEL.init(jax.random.key(0))
    first = jax.tree.map(lambda x: jnp.repeat(x[..., :4], 2, -1), variables.params["dense1"])
    second = variables.params["dense2"]
    second = second | {"kernel": jnp.repeat(second["kernel"][:4], 2, 0)}
    variables = variables._replace(params={"dense1": first, "dense2": second})
    half = Subnet({"hidden1": np.arange(0, 8, 2)})
    algorithm = hetero_fl(MODEL, TASK, LOCAL, [half], scaler=True)
    (bucket,) = algorithm.buckets
    small = bucket.personal(algorithm.init(variables), ())
    x = jnp.ones((2, 6))
    there = bucket.model.apply(small, x)[0]
    np.testing.assert_allclose(there, MODEL.apply(variables, x)[0], rtol=1e-5)
    assert not np.allclose(there, MODEL.apply(small, x)[0])


def test_a_coordinate_that_nobody_covers_does_not_move():
    algorithm = hetero_fl(MODEL, TASK, LOCAL, TIERS[1:], optax.adam(0.1))
    people = population("fed_avg", federation())._replace(bucket=np.arange(6) % 2)
    state, _ = run_new(algorithm, people, calls=2)
    before, after = start().params, state.server.variables.params
    moved = jax.tree.map(lambda a, b: np.asarray(a != b), before, after)
    assert not moved["dense1"]["kernel"][:, 4:].any() and moved["dense1"]["kernel"][:, :4].any()
    assert not moved["dense2"]["kernel"][4:].any() and moved["dense2"]["kernel"][:4].any()


# What is refused.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cohort_size": 7}, "cohort_size=7 must be from 1 to the number of clients, 6"),
        ({"cohort_size": 0}, "cohort_size=0 must be from 1"),
        ({"num_rounds": 0}, "num_rounds must be at least 1, got 0"),
        ({"drop_rate": 1.0}, r"drop_rate must be in \[0, 1\), got 1.0"),
        ({"drop_rate": float("nan")}, "drop_rate must be in"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"mesh": jax.make_mesh((1,), ("data",))}, "needs an axis 'clients'; it has {'data': 1}"),
    ],
)
def test_bad_options_raise(change, message):
    options = {"cohort_size": 2} | change
    with pytest.raises(ValueError, match=message):
        rounds(make("fed_avg"), population("fed_avg", federation()), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bucket": np.full(6, 1)}, "bucket has values from 1 to 1; .* has buckets 0 to 0"),
        ({"bucket": np.full(6, -1)}, "bucket has values from -1"),
        ({"bucket": np.zeros(5, int)}, "has 6 clients, but leading sizes are {'bucket': 5}"),
        ({"profiles": profiles(4)}, "has 6 clients, but leading sizes are {'profiles.max_steps'"),
        (
            {"federation": federation()._replace(index=np.zeros((5, 6), np.int32))},
            "leading sizes are {'index': 5}",
        ),
        (
            {"federation": federation()._replace(count=np.full(6, 7, np.int32))},
            "count has values from 7 to 7; .* 6 rows",
        ),
        (
            {"federation": federation()._replace(index=np.full((6, 6), 24, np.int32))},
            "index has values from 24 to 24; there are 24 examples",
        ),
    ],
)
def test_a_population_that_does_not_fit_raises(change, message):
    people = population("fed_avg", federation())._replace(**change)
    with pytest.raises(ValueError, match=message):
        rounds(make("fed_avg"), people, cohort_size=2)


def test_a_population_of_another_kind_raises():
    people = population("hetero_fl_3", federation())
    runner = engine("hetero_fl_3")
    state = runner.init(start(), jax.random.key(0))
    with pytest.raises(ValueError, match="cannot change their bucket between calls"):
        runner.run(state, people._replace(bucket=people.bucket[::-1]))
    with pytest.raises(ValueError, match=r"leading sizes are \{'bucket': 5\}"):
        runner.run(state, people._replace(bucket=people.bucket[:5]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make("fed_avg", batch_size=0), "batch_size and epochs must be at least 1, got 0"),
        (lambda: make("fed_avg", epochs=0), "batch_size and epochs must be at least 1"),
        (lambda: fed_prox(MODEL, TASK, LOCAL, mu=-1.0), "mu must not be negative, got -1.0"),
        (lambda: hetero_fl(MODEL, TASK, LOCAL, []), "at least one tier"),
        (
            lambda: hetero_fl(MODEL, TASK, LOCAL, [Subnet({"hiden1": np.arange(2)})]),
            "Tier 0 names the axis 'hiden1'; the model has .*'hidden1'",
        ),
        (
            lambda: hetero_fl(MODEL, TASK, LOCAL, [Subnet({"hidden1": np.arange(9)})]),
            "indices from 0 to 8; the axis has size 8",
        ),
    ],
)
def test_bad_hyperparameters_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()
