"""SCAFFOLD, FedNova and FedDyn against their equations in NumPy; what a partition keeps at home."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from laws import (
    BATCH_NORM,
    batch_norm_step,
    federation,
    one_step,
    population,
    run_new,
)

from jaxfm.data.federation import federate
from jaxfm.federated.accounting.resources import profiles
from jaxfm.federated.algorithm import ClientData
from jaxfm.federated.algorithms.fed_avg import fed_avg
from jaxfm.federated.algorithms.fed_dp import fed_dp
from jaxfm.federated.algorithms.fed_dyn import fed_dyn
from jaxfm.federated.algorithms.fed_nova import fed_nova
from jaxfm.federated.algorithms.fed_per import fed_per
from jaxfm.federated.algorithms.fed_rolex import fed_rolex
from jaxfm.federated.algorithms.hetero_fl import hetero_fl
from jaxfm.federated.algorithms.lg_fed_avg import lg_fed_avg
from jaxfm.federated.algorithms.scaffold import scaffold, scaffold_published
from jaxfm.federated.local import Local
from jaxfm.federated.partition import either, statistics, under
from jaxfm.federated.parts.sgd import accumulated, sgd_of
from jaxfm.federated.population import Population
from jaxfm.federated.rounds import compile_rounds
from jaxfm.model import Model, Variables
from jaxfm.models.families.cnn import mlp
from jaxfm.subnet import Subnet
from jaxfm.tasks import Task, classification

# Client i pulls x towards t_i with strength a_i: (a_i / 2) |x - t_i|², one example a client.
CLIENTS, LR, STEPS = 4, 0.1, 5
PULL = np.array([0.5, 1.0, 2.0, 3.0], np.float32)
AIM = np.random.default_rng(0).normal(size=(CLIENTS, 2)).astype(np.float32)
OPTIMUM = (PULL[:, None] * AIM).sum(0) / PULL.sum()


def springs() -> tuple[Model, Task]:
    """The network and the task of the pulls."""
    init = lambda key: Variables({"x": jnp.zeros(2)}, {}, {})
    apply = lambda variables, inputs, train=False, key=None: (
        jnp.broadcast_to(variables.params["x"], inputs.shape), variables.stats,
    )  # fmt: skip

    def prepare(batch, key):
        return batch["aim"], batch, jnp.ones(len(batch["pull"]))

    def loss(output, targets, weight):
        gap = ((output - targets["aim"]) ** 2).sum(-1)
        return (0.5 * targets["pull"] * gap * weight).sum(), weight.sum()

    model = mlp((2, 2))._replace(init=init, apply=apply)
    return model, classification(2)._replace(prepare=prepare, loss=loss)


def people(steps=STEPS) -> Population:
    data = federate({"aim": AIM, "pull": PULL}, [np.array([i]) for i in range(CLIENTS)])
    return Population(data, profiles(CLIENTS, max_steps=steps), np.zeros(CLIENTS, int))


def play(make, num_rounds: int, cohort: int = CLIENTS, momentum: float = 0.0, steps=STEPS):
    """(x after every round, the last state)."""
    model, task = springs()
    algorithm = make(model, task, Local(optax.sgd(LR, momentum=momentum), 1, STEPS))
    engine = compile_rounds(algorithm, people(steps), cohort_size=cohort)
    state, path = engine.init(model.init(None), jax.random.key(1)), []
    for _ in range(num_rounds):
        state, _ = engine.run(state)
        path.append(np.asarray(state.server.variables.params["x"]))
    return np.array(path), state


def descend(x, bend, momentum: float = 0.0, steps=STEPS):
    """Where all clients end, f32[C, 2], after K_i steps along pull (y - aim) + bend(y)."""
    y, speed = np.tile(x, (CLIENTS, 1)), np.zeros((CLIENTS, 2))
    for step in range(STEPS):
        speed = momentum * speed + PULL[:, None] * (y - AIM) + bend(y)
        y = np.where(step < np.broadcast_to(steps, CLIENTS)[:, None], y - LR * speed, y)
    return y


def sum_of_speeds(momentum: float) -> float:
    """How far STEPS steps of rate one go along a gradient of one."""
    speed = way = 0.0
    for _ in range(STEPS):
        speed = momentum * speed + 1
        way += speed
    return way


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_scaffold_follows_its_equations(momentum):
    x, c, own = np.zeros(2, np.float32), np.zeros(2), np.zeros((CLIENTS, 2))
    expected = []
    for _ in range(6):
        shift = c - own
        ends = descend(x, lambda y, shift=shift: shift, momentum)
        new = own - c + (x - ends) / (LR * sum_of_speeds(momentum))
        x, c, own = ends.mean(0), c + (new - own).mean(0), new
        expected.append(x)
    found, _ = play(lambda *a: scaffold(*a, total_examples=CLIENTS), 6, momentum=momentum)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_scaffold_and_fed_dyn_end_where_the_sum_of_losses_is_least_and_fed_avg_does_not():
    gap = {}
    for name, make in {
        "fed_avg": fed_avg,
        "scaffold": lambda *a: scaffold(*a, total_examples=CLIENTS),
        "fed_dyn": lambda *a: fed_dyn(*a, num_clients=CLIENTS, alpha=1.0),
    }.items():
        path, _ = play(make, 60)
        gap[name] = float(np.abs(path[-1] - OPTIMUM).max())
    assert gap["fed_avg"] > 0.02
    assert max(gap["scaffold"], gap["fed_dyn"]) < 1e-3, gap


def test_the_servers_variate_is_the_mean_of_the_clients():
    _, state = play(lambda *a: scaffold(*a, total_examples=CLIENTS), 5, cohort=2)
    (memory,) = state.memories
    mean = np.asarray(memory["x"]).mean(0)
    assert np.abs(mean).max() > 1e-3
    np.testing.assert_allclose(state.server.variate["x"], mean, rtol=1e-5, atol=1e-6)


# Sizes of twelve clients, drawn anew in every case, from one row to a hundred.
MANY, ROWS = 12, 100


def uneven(seed: int, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sizes, pulls, aims [MANY, 2]) of clients that pull x towards a point of their own."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(0, np.log(ROWS), MANY)).round().astype(int)
    if kind == "one large":
        sizes = np.where(np.arange(MANY) == rng.integers(MANY), ROWS, 1)
    return sizes, rng.uniform(0.3, 1, MANY), rng.normal(size=(MANY, 2))


def scaffold_in_numpy(sizes, pull, aim, cohorts, steps: int, rate: float, alike: bool = False):
    """The paths x [R, E, 2] of E runs with cohorts [R, E, S], by the equations of the file."""
    runs = np.arange(len(sizes))[:, None]
    weight = np.ones(sizes.shape) if alike else sizes
    x, path = np.zeros((len(runs), 1, 2)), []
    c, own = x, np.zeros(aim.shape)
    for cohort in cohorts:
        here = (runs, cohort)
        y = np.repeat(x, cohort.shape[1], axis=1)
        for _ in range(steps):
            y = y - rate * (pull[here][..., None] * (y - aim[here]) - own[here] + c)
        new = own[here] - c + (x - y) / (steps * rate)
        part = weight[here][..., None]
        x = x + (part * (y - x)).sum(1, keepdims=True) / part.sum(1, keepdims=True)
        gain = (part * (new - own[here])).sum(1, keepdims=True)
        c, own[here] = c + gain / weight.sum(1)[:, None, None], new
        path.append(x[:, 0])
    return np.array(path)


@pytest.mark.parametrize("size", [1, 3, MANY])
def test_scaffold_ends_where_fed_avgs_loss_is_least_for_any_sizes(size):
    """A law in NumPy; the next test holds the library to the same equations."""
    cases = [uneven(seed, kind) for seed in range(30) for kind in ("any", "one large")]
    sizes, pull, aim = map(np.stack, zip(*cases))
    rng = np.random.default_rng(0)
    cohorts = rng.permuted(np.tile(np.arange(MANY), (1500, len(cases), 1)), axis=-1)[..., :size]
    for alike in (False, True):
        path = scaffold_in_numpy(sizes, pull, aim, cohorts, steps=3, rate=0.06, alike=alike)
        strength = pull if alike else sizes * pull  # the published form ends elsewhere
        least = (strength[..., None] * aim).sum(1) / strength.sum(1)[:, None]
        np.testing.assert_allclose(path[-1], least, atol=1e-6)
        assert np.abs(path).max() < 20  # nor has it grown on its way


@pytest.mark.parametrize(
    "name", ["scaffold", pytest.param("scaffold_published", marks=pytest.mark.slow)]
)
def test_scaffold_of_unequal_clients_follows_numpy(name):
    model, task = springs()
    sizes, pull, aim = uneven(5, "one large")
    owner = np.repeat(np.arange(MANY), sizes)
    examples = {"aim": aim[owner].astype(np.float32), "pull": pull[owner].astype(np.float32)}
    data = federate(examples, [np.flatnonzero(owner == i) for i in range(MANY)])
    local, alike = Local(optax.sgd(0.05), ROWS, 3), name != "scaffold"
    make = (
        functools.partial(scaffold_published, num_clients=MANY)
        if alike
        else functools.partial(scaffold, total_examples=sizes.sum())
    )
    everybody = Population(data, profiles(MANY), np.zeros(MANY, int))
    engine = compile_rounds(make(model, task, local), everybody, cohort_size=4, num_rounds=30)
    state, info = engine.run(engine.init(model.init(None), jax.random.key(2)))
    cohorts = np.asarray(info.cohort.client)[:, None]
    path = scaffold_in_numpy(sizes[None], pull[None], aim[None], cohorts, 3, 0.05, alike)
    found = state.server.variables.params["x"]
    np.testing.assert_allclose(found, path[-1, 0], rtol=1e-4, atol=1e-5)


def test_before_there_are_variates_scaffold_is_federated_averaging():
    once, _ = play(lambda *a: scaffold(*a, total_examples=CLIENTS), 1)
    plain, _ = play(fed_avg, 1)
    np.testing.assert_allclose(once, plain, rtol=1e-6)


def test_with_its_variates_held_at_zero_scaffold_stays_federated_averaging():
    model, task = springs()
    ends = {}
    local = Local(optax.sgd(LR), 1, STEPS)
    plain, held = fed_avg(model, task, local), scaffold(model, task, local, total_examples=CLIENTS)
    for name, algorithm in (("plain", plain), ("held", held)):
        engine = compile_rounds(algorithm, people(), cohort_size=CLIENTS)
        state = engine.init(model.init(None), jax.random.key(1))
        for _ in range(4):
            if name == "held":
                nothing = jax.tree.map(jnp.zeros_like, (state.server.variate, state.memories))
                state = state._replace(
                    server=state.server._replace(variate=nothing[0]), memories=nothing[1]
                )
            state, _ = engine.run(state)
        ends[name] = state.server.variables.params["x"]
    np.testing.assert_allclose(ends["held"], ends["plain"], rtol=1e-6)


@pytest.mark.parametrize("momentum", [pytest.param(0.0, marks=pytest.mark.slow), 0.9])
def test_fed_nova_weighs_movements_by_their_steps(momentum):
    equal, _ = play(fed_nova, 3, momentum=momentum)
    plain, _ = play(fed_avg, 3, momentum=momentum)
    np.testing.assert_allclose(equal, plain, rtol=1e-5, atol=1e-7)
    steps = np.array([1, 2, 3, 5])
    found, _ = play(fed_nova, 1, momentum=momentum, steps=steps)
    moves = descend(np.zeros(2, np.float32), lambda y: 0, momentum, steps)
    a = np.array([sum(1 - momentum ** (k - j) for j in range(k)) / (1 - momentum) for k in steps])
    expected = a.mean() * (moves / a[:, None]).mean(0)
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)
    np.testing.assert_allclose(accumulated(jnp.asarray(steps, jnp.float32), momentum), a, rtol=1e-5)


def test_fed_dyn_follows_its_equations():
    alpha = 0.5
    x, h, own = np.zeros(2, np.float32), np.zeros(2), np.zeros((CLIENTS, 2))
    for _ in range(4):
        ends = descend(x, lambda y, own=own, x=x: alpha * (y - x) - own)
        own = own - alpha * (ends - x)
        h = h - alpha * (ends - x).mean(0)
        x = ends.mean(0) - h / alpha
    found, _ = play(lambda *a: fed_dyn(*a, num_clients=CLIENTS, alpha=alpha), 4)
    np.testing.assert_allclose(found[-1], x, rtol=1e-4)


def test_one_client_and_one_step_move_fed_dyn_by_the_gradient_and_the_drift():
    """x + d - h / alpha, with h = - (alpha / 6) d after the first report of one of six clients."""
    before, gradient, state = one_step("fed_dyn")
    expected = jax.tree.map(lambda x, g: x - LR * g - LR * g / 6, before, gradient)
    chex.assert_trees_all_close(state.server.variables.params, expected, rtol=1e-5, atol=1e-6)


def test_what_descent_does_is_measured():
    for given, momentum in ((optax.sgd(0.3), 0.0), (optax.sgd(0.3, momentum=0.9), 0.9)):
        found = sgd_of(given, "x")
        assert found == (pytest.approx(0.3), momentum)
    for wrong in (optax.adam(0.1), optax.sgd(0.1, momentum=0.9, nesterov=True)):
        with pytest.raises(ValueError, match="scaffold needs local steps of gradient descent"):
            sgd_of(wrong, "scaffold")


NET = mlp((6, 8, 3))
TASK = classification(3, inputs="x")
PLAIN = Local(optax.sgd(0.1), 4)


def sent_names(algorithm) -> set[str]:
    """The names of all that the first bucket's clients upload."""
    data = federate(
        {"x": np.zeros((4, 6), np.float32), "label": np.zeros(4, np.int32)}, [np.arange(4)]
    )
    server = algorithm.init(NET.init(jax.random.key(0)))
    bucket = algorithm.buckets[0]
    population = Population(data, profiles(1), np.zeros(1, int))
    engine = compile_rounds(algorithm, population, cohort_size=1)
    state = engine.init(NET.init(jax.random.key(0)), jax.random.key(0))
    memory = jax.tree.map(lambda x: x[0], state.memories[0])
    client = ClientData(data.examples, data.index.padded(0), data.count[0])
    profile = jax.tree.map(lambda x: x[0], population.profiles)
    upload, _, _ = jax.eval_shape(
        bucket.client, bucket.send(server, None), memory, client, profile, jax.random.key(0)
    )
    paths, _ = jax.tree_util.tree_flatten_with_path(upload)
    return {str(key.key) for path, _ in paths for key in path if hasattr(key, "key")}


def test_small_weights_are_zero_after_an_epoch():
    people = population("fed_avg", federation((6, 0, 4)))
    local = Local(optax.sgd(0.1), 4, 1)
    plain, _ = run_new(fed_avg(NET, TASK, local), people)
    none, info = run_new(fed_dp(NET, TASK, local, threshold=0.0), people)
    chex.assert_trees_all_close(none.server, plain.server, rtol=1e-5, atol=1e-6)
    assert info.spent.steps.sum() == 3 and info.examples.sum() == 10
    alone = population("fed_avg", federation((6,)))
    state, info = run_new(
        fed_dp(NET, TASK, Local(optax.sgd(0.1), 4, 2), threshold=0.3), alone, cohort_size=1
    )
    params = state.server.variables.params
    assert info.spent.steps.sum() == 4
    for name in ("dense1", "dense2"):
        kernel, bias = np.abs(params[name]["kernel"]), np.abs(params[name]["bias"])
        # A movement is added to where it started from, which rounds.
        assert ((kernel < 1e-6) | (kernel > 0.3 - 1e-6)).all() and (kernel < 1e-6).any()
        assert ((bias > 0) & (bias < 0.3)).any()


def test_statistics_may_stay_at_home():
    variables, _ = batch_norm_step()
    local = Local(optax.sgd(0.1), 4, 1)
    algorithm = fed_per(BATCH_NORM, TASK, local, is_personal=statistics)
    people = population("fed_avg", federation((4, 2)))
    state, _ = run_new(algorithm, people, variables=variables)
    plain, _ = run_new(fed_avg(BATCH_NORM, TASK, local), people, variables=variables)
    chex.assert_trees_all_close(
        state.server.variables.params, plain.server.variables.params, rtol=1e-6
    )
    chex.assert_trees_all_equal(state.server.variables.stats, variables.stats)
    first, second = (
        jax.tree.map(lambda x, i=i: np.asarray(x)[i], state.memories[0]).stats for i in (0, 1)
    )
    mixed = jax.tree.map(lambda a, b: (4 * a + 2 * b) / 6, first, second)
    chex.assert_trees_all_close(mixed, plain.server.variables.stats, rtol=1e-5, atol=1e-6)
    both = either(under("head"), statistics)
    assert both(("head", "bias")) and both(("norm", "mean")) and not both(("norm", "scale"))


def test_the_personal_part_is_in_no_upload():
    per = fed_per(NET, TASK, PLAIN, is_personal=under("dense2"))
    assert "dense1" in sent_names(per) and "dense2" not in sent_names(per)
    mirror = lg_fed_avg(NET, TASK, PLAIN, is_shared=under("dense2"))
    assert "dense2" in sent_names(mirror) and "dense1" not in sent_names(mirror)


def test_a_rolling_window_of_full_width_is_hetero_fl():
    rng = np.random.default_rng(0)
    rows = {"x": rng.normal(size=(12, 6)).astype(np.float32),
            "label": rng.integers(0, 3, 12).astype(np.int32)}  # fmt: skip
    data = federate(rows, [np.arange(6), np.arange(6, 12)])
    population = Population(data, profiles(2), np.array([0, 1]))
    ends = []
    tiers = [Subnet({}), Subnet({"hidden1": np.arange(8)})]
    for make in (fed_rolex, hetero_fl):
        engine = compile_rounds(
            make(NET, TASK, PLAIN, tiers), population, cohort_size=2, num_rounds=2
        )
        state, _ = engine.run(engine.init(NET.init(jax.random.key(0)), jax.random.key(0)))
        ends.append(state.server.variables)
    chex.assert_trees_all_close(*ends, rtol=1e-5, atol=1e-6)


def test_settings_out_of_range_are_refused():
    for call, message in (
        (lambda: scaffold(NET, TASK, PLAIN, total_examples=0), "total_examples=0 must be above 0"),
        (lambda: scaffold_published(NET, TASK, PLAIN, num_clients=0), "num_clients"),
        (lambda: scaffold(NET, TASK, Local(optax.adam(0.1), 4), total_examples=2), "optax.sgd"),
        (lambda: fed_dyn(NET, TASK, PLAIN, num_clients=2, alpha=0.0), "alpha"),
        (lambda: fed_per(NET, TASK, PLAIN, is_personal=under("nowhere")), "dense1"),
        (lambda: fed_rolex(NET, TASK, PLAIN, []), "at least one tier"),
        (lambda: fed_dp(NET, TASK, PLAIN, threshold=-1.0), "threshold"),
        (lambda: fed_avg(NET, TASK, PLAIN._replace(batch_size=0)), "at least 1, got 0"),
        (lambda: fed_avg(NET, TASK, PLAIN._replace(epochs=0)), "batch_size and epochs must be at"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
