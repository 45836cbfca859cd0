"""Models of 16 bits keep masters of 32: NumPy's rounds in float64, at the bytes of 16 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfm.data.federation import federate
from jaxfm.federated import (
    Local,
    Population,
    client_costs,
    compile_rounds,
    fed_adam,
    fed_avg,
    profiles,
    scaffold,
    wide_model,
    with_masters,
)
from jaxfm.model import Model, Variables
from jaxfm.parallel.mesh import make_mesh
from jaxfm.tasks import classification

HALF, LR, ROUNDS = jnp.bfloat16, 0.002, 20
RNG = np.random.default_rng(0)
START = RNG.normal(1, 0.1, (4, 3)).astype(HALF)
LABEL = RNG.integers(0, 3, 12).astype(np.int32)
X = (RNG.normal(size=(12, 4)) + LABEL[:, None]).astype(HALF)
PARTS = [np.arange(2), np.arange(2, 12)]


def linear(dtype) -> Model:
    init = lambda key: Variables({"w": jnp.asarray(START, dtype)}, {}, {})
    axes = Variables({"w": ("features", "classes")}, {}, {})
    return Model(init, lambda v, x, *, train=False, key=None: (x @ v.params["w"], {}), axes)


def algorithm(factory, **options):
    def over(model: Model):
        return factory(model, classification(3, inputs="x"), Local(optax.sgd(LR), 12), **options)

    return over


def played(algorithm, variables):
    data = federate({"x": X, "label": LABEL}, PARTS)
    people = Population(data, profiles(2), np.zeros(2, np.int32))
    engine = compile_rounds(
        algorithm, people, cohort_size=2, num_rounds=ROUNDS, mesh=make_mesh(clients=1)
    )
    state, _ = engine.run(engine.init(variables, jax.random.key(0)))
    return state.server, client_costs(algorithm, people, variables)[0]


def gradient(w: np.ndarray) -> np.ndarray:
    """Of the mean loss of all rows, which is what clients of one batch average to."""
    x = X.astype(np.float64)
    logits = np.exp(x @ w)
    return x.T @ (logits / logits.sum(1, keepdims=True) - np.eye(3)[LABEL]) / len(x)


def averaged() -> np.ndarray:
    w = START.astype(np.float64)
    for _ in range(ROUNDS):
        w = w - LR * gradient(w)
    return w


def by_fed_adam(rate: float) -> np.ndarray:
    w = START.astype(np.float64)
    m, v = np.zeros_like(w), np.full_like(w, 1e-6)
    for _ in range(ROUNDS):
        d = -LR * gradient(w)
        m, v = 0.9 * m + 0.1 * d, 0.99 * v + 0.01 * d**2
        w = w + rate * m / (np.sqrt(v) + 1e-3)
    return w


@pytest.mark.parametrize(
    "over, expected",
    [
        (algorithm(fed_avg), averaged()),
        (algorithm(scaffold, total_examples=12), averaged()),
        (algorithm(fed_adam, learning_rate=2e-3), by_fed_adam(2e-3)),
    ],
    ids=["fed_avg", "scaffold", "fed_adam"],
)
def test_small_steps_of_halves_add_up_at_the_bytes_of_halves(over, expected):
    own = over(linear(HALF))
    variables = linear(HALF).init(None)
    kept, cost = played(with_masters(own, over(wide_model(linear(HALF)))), variables)
    lost, same = played(own, variables)
    assert (cost.bytes_down, cost.bytes_up) == (same.bytes_down, same.bytes_up)
    assert cost.bytes_down % 24 == 0  # 12 numbers of 2 bytes, twice with a variate
    before = START.astype(np.float64)
    far, off = np.abs(expected - before).max(), lambda w: np.abs(np.float64(w) - expected).max()
    assert off(kept.wide.variables.params["w"]) < 0.05 * far
    assert off(lost.variables.params["w"]) > 0.3 * far  # which is what masters are for
    np.testing.assert_array_equal(
        kept.variables.params["w"], kept.wide.variables.params["w"].astype(HALF)
    )


def test_a_model_of_32_bits_is_left_alone():
    model = wide_model(linear(jnp.float32))
    variables = model.init(None)
    assert variables.params["w"].dtype == jnp.float32
    np.testing.assert_array_equal(model.apply(variables, jnp.eye(4))[0], variables.params["w"])
