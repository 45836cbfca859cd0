"""DiLoCo and its streaming form against the papers' algorithms in NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from laws import (
    LR,
    MODEL,
    QUADRATIC,
    SQUARES,
    TASK,
    assert_is_fed_avg,
    federation,
    population,
    quadratic,
    run_new,
    start,
)

from jaxfm.data.federation import federate
from jaxfm.federated import (
    Population,
    client_costs,
    client_work,
    compile_rounds,
    profiles,
    round_costs,
)
from jaxfm.federated.algorithms.diloco import diloco
from jaxfm.federated.algorithms.streaming_diloco import streaming_diloco
from jaxfm.federated.local import Local
from jaxfm.federated.parts.fragments import cut, joined
from jaxfm.model import Model, Variables, count_parameters
from jaxfm.tasks import causal_lm
from jaxfm.testing import tiny_decoder

LOCAL = Local(optax.sgd(LR), 4, 2)


def test_without_momentum_and_memory_it_is_fed_avg():
    assert_is_fed_avg(diloco(MODEL, TASK, LOCAL, learning_rate=1.0, momentum=0.0), 1e-6)


class Worker:
    """AdamW on half the squared distance to a target, in NumPy."""

    def __init__(self, target, rate, decay):
        self.target, self.rate, self.decay, self.m, self.v, self.t = target, rate, decay, 0, 0, 0

    def train(self, y, steps):
        for _ in range(steps):
            gradient, self.t = y - self.target, self.t + 1
            self.m = 0.9 * self.m + 0.1 * gradient
            self.v = 0.999 * self.v + 0.001 * gradient**2
            m, v = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
            y = y - self.rate * (m / (np.sqrt(v) + 1e-8) + self.decay * y)
        return y


def test_three_rounds_are_the_papers_algorithm():
    """Inner AdamW goes on over the rounds; the outer step is Nesterov's."""
    variables, targets, data = quadratic([3.0, -1.0, 2.0])
    inner = optax.adamw(0.1, weight_decay=0.1)
    algorithm = diloco(QUADRATIC, SQUARES, Local(inner, 1, 4))
    people = Population(data, profiles(3), np.zeros(3, np.int32))
    state, _ = run_new(algorithm, people, 3, variables=variables, public=None)
    workers, x, trace = [Worker(t, 0.1, 0.1) for t in targets], 1.0, 0.0
    for _ in range(3):
        d = np.mean([worker.train(x, 4) - x for worker in workers])
        trace = 0.9 * trace + d
        x = x + 0.7 * (d + 0.9 * trace)
    np.testing.assert_allclose(state.server.variables.params["y"], x, rtol=1e-5)


def test_a_client_that_is_absent_keeps_its_optimizer():
    people = population("fed_avg", federation((6, 0, 4, 3, 5, 2)))
    algorithm = diloco(MODEL, TASK, Local(optax.adam(LR), 4))
    state, _ = run_new(algorithm, people)
    counts = np.asarray(optax.tree.get(state.memories[0], "count"))
    np.testing.assert_array_equal(counts, [2, 0, 1, 1, 2, 1])
    chex.assert_trees_all_equal(
        jax.tree.map(lambda x: x[1], optax.tree.get(state.memories[0], "mu")),
        jax.tree.map(np.zeros_like, start().params),
    )


def test_its_bytes_are_those_of_the_parameters():
    algorithm, people = diloco(MODEL, TASK, LOCAL), population("fed_avg", federation())
    (cost,) = client_costs(algorithm, people, start())
    assert cost.bytes_down == 4 * cost.parameters and cost.bytes_up == cost.bytes_down + 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be a number above 0"),
        ({"momentum": 1.0}, "momentum=1.0 must be a number from 0 and below 1"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        diloco(MODEL, TASK, LOCAL, **options)


# Streaming DiLoCo.


def test_one_fragment_is_diloco():
    people = population("fed_avg", federation())
    inner = Local(optax.adam(LR), 4)
    ours, _ = run_new(streaming_diloco(MODEL, TASK, inner, fragments=1), people, 2)
    theirs, _ = run_new(diloco(MODEL, TASK, inner), people, 2)
    chex.assert_trees_all_close(
        ours.server.variables, theirs.server.variables, rtol=1e-5, atol=1e-6
    )


def pair_model():
    """Two numbers, each pulled towards the target: in two fragments one each."""
    init = lambda key: Variables({"y": jnp.ones(2)}, {}, {})
    apply = lambda variables, x, train=False, key=None: (
        variables.params["y"][None, :] + 0 * x[:, None], {},
    )  # fmt: skip
    model = Model(init, apply, Variables({"y": (None,)}, {}, {}))
    half = lambda out, targets, weight: (
        jnp.sum(0.5 * weight[:, None] * jnp.square(out - targets[:, None])), jnp.sum(weight),
    )  # fmt: skip
    return model, SQUARES._replace(loss=half)


@pytest.mark.parametrize(
    ("delay", "share", "failing"), [(0, 0.0, ()), (2, 0.5, (2,))], ids=["plain", "overlapped"]
)
def test_four_rounds_are_the_papers_algorithm(delay, share, failing):
    """Two workers in NumPy; in a round that fails nobody reports, and the fragment comes again."""
    model, task = pair_model()
    _, targets, data = quadratic([3.0, -1.0])
    algorithm = streaming_diloco(
        model, task, Local(optax.sgd(0.1), 1, 3), delay_steps=delay, own_share=share
    )
    people = Population(data, profiles(2), np.zeros(2, np.int32))
    nobody = people._replace(federation=data._replace(count=np.zeros(2, np.int32)))
    engine = compile_rounds(algorithm, people, cohort_size=2)
    state = engine.init(model.init(None), jax.random.key(0))
    x, trace, turn = np.ones(2), np.zeros(2), 0
    own, base = [np.ones(2) for _ in targets], [np.ones(2) for _ in targets]
    step = lambda y, target: y - 0.1 * (y - target)
    for number in range(5):
        state, info = engine.run(state, nobody if number in failing else people)
        if number in failing:
            continue
        for i, target in enumerate(targets):
            for _ in range(delay):
                own[i] = step(own[i], target)
            if turn:  # the fragment that moved last arrives
                f = (turn - 1) % 2
                own[i][f] = share * own[i][f] + (1 - share) * x[f]
                base[i][f] = x[f]
            for _ in range(3 - delay):
                own[i] = step(own[i], target)
        f = turn % 2
        d = np.mean([y[f] - b[f] for y, b in zip(own, base, strict=True)])
        trace[f] = 0.9 * trace[f] + d
        x[f] += 0.7 * (d + 0.9 * trace[f])
        turn += 1
        np.testing.assert_allclose(state.server.variables.params["y"], x, rtol=1e-5)
        # The first time all fragments; then one.
        assert info.spent.caught_up.sum() == (2 if number == 0 else 0)
        assert info.spent.steps.sum() == 6


def test_a_client_that_was_away_takes_what_it_missed():
    people = population("fed_avg", federation((4, 4)))
    first = people._replace(federation=people.federation._replace(count=np.array([4, 0])))
    algorithm = streaming_diloco(MODEL, TASK, Local(optax.sgd(LR), 4))
    engine = compile_rounds(algorithm, people, cohort_size=2)
    state, caught_up = engine.init(start(), jax.random.key(0)), []
    for present in (people, first, people, first, first, first, people):
        before = jax.tree.map(np.asarray, state.server.variables.params)
        state, info = engine.run(state, present)
        caught_up.append(float(info.spent.caught_up.sum()))
        if len(caught_up) == 3:  # the ledger counts a download more
            costs = client_costs(algorithm, people, start())
            (down,) = {cost.bytes_down for cost in costs}
            assert round_costs(costs, info)["bytes_down"] == 3 * down
            assert client_work(costs, people.bucket, info).bytes_down.sum() == 3 * down
    assert caught_up == [2, 0, 1, 0, 0, 0, 1]
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[1], state.memories[0].base), before)
    assert state.memories[0].turn.tolist() == [6, 6]


def test_a_round_sends_one_fragment_of_the_layers():
    """Its bytes are a half of the model's, layers strided over the fragments."""
    model = tiny_decoder()
    variables = jax.eval_shape(model.init, jax.random.key(0))
    algorithm = streaming_diloco(model, causal_lm(), Local(optax.sgd(LR), 4))
    rows = {"tokens": np.zeros((4, 9), np.int32)}
    people = Population(federate(rows, [np.arange(4)]), profiles(1), np.zeros(1, np.int32))
    (cost,) = client_costs(algorithm, people, variables)
    size = 4 * count_parameters(variables.params)
    assert size / 2 <= cost.bytes_down - 4 < size / 2 + 4 * len(jax.tree.leaves(variables.params))
    assert cost.bytes_up == cost.bytes_down  # a weight and a turn
    layers = jnp.tile(jnp.arange(4.0)[:, None], (1, 3))
    x = {"layers": {"w": layers}, "head": jnp.arange(5.0)}
    pieces = cut(x, 2)
    np.testing.assert_array_equal(pieces["layers"]["w"][1, :, 0], [1, 3])
    np.testing.assert_array_equal(pieces["head"], [[0, 1, 2], [3, 4, 0]])
    chex.assert_trees_all_equal(joined(pieces, x), x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fragments": 3}, r"fragments=3 do not divide the model's 2 layers; .* \[1, 2\]"),
        ({"fragments": 0}, "fragments=0 must be at least 1"),
        ({"own_share": 1.0}, "own_share=1.0 must be a number from 0 and below 1"),
        ({"delay_steps": -1}, "delay_steps=-1 must be 0 or more"),
    ],
)
def test_wrong_fragments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        streaming_diloco(tiny_decoder(), causal_lm(), LOCAL, **options)
