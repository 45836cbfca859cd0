"""Streams, replay, consolidation, distillation and drift, against NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxfm.federated import Local, Population, compile_rounds, profiles
from jaxfm.federated.algorithms.fed_avg import fed_avg
from jaxfm.federated.continual import (
    by_groups,
    ewc,
    fisher_information,
    learn,
    lwf,
    no_drift,
    rehearsed,
    scores,
    watch,
)
from jaxfm.model import from_nnx
from jaxfm.tasks import classification, evaluate

RNG = np.random.default_rng(0)
CENTRES = RNG.normal(size=(4, 6)) * 3


def blobs(each, seed):
    rng = np.random.default_rng(seed)
    label = np.tile(np.arange(4), each).astype(np.int32)
    image = (CENTRES[label] + rng.normal(size=(len(label), 6))).astype(np.float32)
    return {"image": image, "label": label}


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.classifier = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.classifier(nnx.relu(self.hidden(x)))


MODEL, TASK = from_nnx(Net), classification(4)
TRAIN, TEST = blobs(12, 1), blobs(6, 2)
LOCAL = Local(optax.sgd(0.1), batch_size=4)
START = jax.tree.map(np.asarray, MODEL.init(jax.random.key(0)))


def stages(rounds=4, num_clients=3):
    groups = TRAIN["label"] // 2, TEST["label"] // 2
    return by_groups(TRAIN, TEST, *groups, num_clients=num_clients, rounds=rounds, seed=0)


def test_a_stage_holds_its_group_once_and_all_have_one_shape():
    own = stages()
    assert [stage.name for stage in own] == ["0", "1"]
    chex.assert_trees_all_equal_shapes(*(stage.federation.index for stage in own))
    for number, stage in enumerate(own):
        rows = np.concatenate([stage.federation.rows_of(client) for client in range(3)])
        assert sorted(rows) == sorted(np.flatnonzero(TRAIN["label"] // 2 == number))
        assert set(stage.test["label"] // 2) == {number}


def test_rows_stay_with_their_owners():
    owner = np.arange(48) % 3
    own = by_groups(
        TRAIN, TEST, TRAIN["label"] // 2, TEST["label"] // 2,
        num_clients=3, rounds=1, owner=owner,
    )  # fmt: skip
    for stage in own:
        for client in range(3):
            assert (owner[stage.federation.rows_of(client)] == client).all()


def test_replay_keeps_a_uniform_sample_of_ones_own_past():
    own = stages(num_clients=2)
    plain = [own[0].federation.rows_of(client) for client in range(2)]
    times = np.zeros(48)
    for seed in range(300):
        second = rehearsed(own, 3, seed=seed)[1].federation
        for client in range(2):
            rows = second.rows_of(client)
            new = set(own[1].federation.rows_of(client))
            old = [row for row in rows if row not in new]
            assert len(old) == 3 and set(old) <= set(plain[client])
            times[old] += 1
    seen = times[np.concatenate(plain)]
    assert abs(seen.mean() - 75) < 1e-9  # 300 times 3 of 12
    assert np.abs(seen - 75).max() < 4.5 * np.sqrt(300 * 0.25 * 0.75)
    assert [len(s.federation.rows_of(0)) for s in rehearsed(own, 0)] == [12, 12]


def test_scores_are_those_of_their_definitions():
    r = np.array([[0.9, 0.1, 0.0], [0.7, 0.8, 0.2], [0.75, 0.5, 0.6]])
    got = scores(r)
    assert got.average_accuracy == pytest.approx((0.75 + 0.5 + 0.6) / 3)
    assert got.backward_transfer == pytest.approx(((0.75 - 0.9) + (0.5 - 0.8)) / 2)
    assert got.forgetting == pytest.approx(((0.9 - 0.75) + (0.8 - 0.5)) / 2)
    assert scores(np.array([[0.5]])).forgetting == 0


def run(algorithm, own, between=None, folder=None, seed=3):
    return learn(
        algorithm, MODEL, TASK, own, START, cohort_size=2, seed=seed, between=between,
        folder=folder,
    )  # fmt: skip


def test_what_protects_forgets_less():
    """Two classes, then two others: plain averaging forgets the first two, each protection less."""
    own = stages(rounds=12)
    plain = run(fed_avg(MODEL, TASK, LOCAL), own)
    assert plain.scores.accuracy[0, 0] > 0.9 and plain.scores.forgetting > 0.4
    replay = run(fed_avg(MODEL, TASK, LOCAL), rehearsed(own, 6))
    elastic = ewc(MODEL, TASK, LOCAL, strength=30.0)
    held = run(elastic.algorithm, own, elastic.consolidate)
    teaching = lwf(MODEL, TASK, LOCAL, strength=3.0)
    taught = run(teaching.algorithm, own, teaching.consolidate)
    for other in (replay, held, taught):
        np.testing.assert_allclose(other.scores.accuracy[0], plain.scores.accuracy[0], atol=0.1)
        assert other.scores.forgetting < plain.scores.forgetting - 0.1
    assert replay.scores.average_accuracy > 0.9


def test_the_figures_are_those_of_the_last_model():
    own = stages(rounds=2)
    learned = run(fed_avg(MODEL, TASK, LOCAL), own)
    for j, stage in enumerate(own):
        want = evaluate(MODEL.apply, learned.state.server.variables, TASK, stage.test, 64)
        assert learned.scores.accuracy[1, j] == want["accuracy"]
    assert learned.loss.shape == (4,) and np.isfinite(learned.loss).all()


@pytest.mark.parametrize("kind", [ewc, lwf])
def test_without_strength_it_is_averaging(kind):
    own = stages(rounds=2)
    made = kind(MODEL, TASK, LOCAL, strength=0.0)
    a = run(made.algorithm, own, made.consolidate).state.server.variables
    b = run(fed_avg(MODEL, TASK, LOCAL), own).state.server.variables
    chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-6)


def test_importance_is_the_mean_square_of_each_rows_gradient():
    own = stages()[0]
    people = Population(own.federation, profiles(3), np.zeros(3, np.int32))
    engine = compile_rounds(fisher_information(MODEL, TASK, 5), people, cohort_size=3)
    variables = MODEL.init(jax.random.key(0))
    got = engine.run(engine.init(variables, jax.random.key(1)))[0].server.importance
    rows = np.flatnonzero(TRAIN["label"] // 2 == 0)

    def loss(params, x, y):
        logits = MODEL.apply(START._replace(params=params), x[None])[0]
        return -jax.nn.log_softmax(logits)[0, y]

    one = jax.jit(jax.grad(loss))
    grads = [one(START.params, TRAIN["image"][row], TRAIN["label"][row]) for row in rows]
    want = jax.tree.map(lambda *g: np.mean([np.square(x) for x in g], axis=0), *grads)
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-6)


def test_a_stopped_stream_goes_on_to_the_same_end(tmp_path):
    elastic = ewc(MODEL, TASK, LOCAL, strength=30.0)
    own = rehearsed(stages(rounds=2), 4)
    whole = run(elastic.algorithm, own, elastic.consolidate)

    class Stop(Exception):
        pass

    def stops(state, people):
        state = elastic.consolidate(state, people)
        stops.done += 1
        return state

    stops.done = 0
    first = run(elastic.algorithm, own, stops, tmp_path / "a")
    again = run(elastic.algorithm, own, stops, tmp_path / "a")  # all stages are done
    assert stops.done == 1
    for other in (first, again):
        chex.assert_trees_all_equal(
            jax.device_get(other.state.server), jax.device_get(whole.state.server)
        )
        np.testing.assert_array_equal(other.scores.accuracy, whole.scores.accuracy)

    def kills(state, people):
        raise Stop

    folder = tmp_path / "b"
    with pytest.raises(Stop):
        run(elastic.algorithm, own, kills, folder)
    resumed = run(elastic.algorithm, own, elastic.consolidate, folder)
    np.testing.assert_array_equal(resumed.scores.accuracy, whole.scores.accuracy)


def page(values, threshold, tolerance=0.05, at_least=5):
    """The test in plain Python."""
    alarms, since, m, least = [], [], 0.0, 0.0
    for t, x in enumerate(values):
        if not np.isfinite(x):
            continue
        since.append(x)
        m += x - np.mean(since) - tolerance
        least = min(least, m)
        if m - least > threshold and len(since) >= at_least:
            alarms.append(t)
            since, m, least = [], 0.0, 0.0
    return alarms


def test_drift_is_told_when_it_comes_and_not_before():
    noise = np.random.default_rng(0).normal(size=90) * 0.1
    level = np.r_[np.full(30, 0.5), np.full(30, 1.5), np.full(30, 0.3)]
    values = (level + noise).astype(np.float32)
    values[10] = np.nan
    step = jax.jit(lambda state, x: watch(state, x, threshold=1.0))
    state, alarms = no_drift(), []
    for t, x in enumerate(values):
        state, alarm = step(state, jnp.asarray(x))
        alarms += [t] if alarm else []
    assert alarms == page(values.astype(np.float64), 1.0)
    assert len(alarms) == 1 and 30 <= alarms[0] <= 34  # a loss that falls is no alarm


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"train_group": np.zeros(48)}, "needs two groups of rows or more"),
        ({"train_group": np.zeros(3)}, r"train_group has shape \(3,\)"),
        ({"test_group": np.zeros(24)}, "No test row belongs to the group"),
        ({"rounds": 0}, "rounds=0: give at least 1"),
        ({"owner": np.full(48, 7)}, "owner has values from 7 to 7"),
    ],
)
def test_streams_that_cannot_be(change, sentence):
    given = {
        "train_group": TRAIN["label"] // 2, "test_group": TEST["label"] // 2, "num_clients": 3,
        "rounds": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=sentence):
        by_groups(TRAIN, TEST, **(given | change))


def test_settings_out_of_range():
    for make, sentence in (
        (lambda: ewc(MODEL, TASK, LOCAL, strength=-1), "strength=-1"),
        (lambda: ewc(MODEL, TASK, LOCAL, decay=2), "decay=2"),
        (lambda: lwf(MODEL, TASK, LOCAL, strength=float("nan")), "strength=nan"),
        (lambda: lwf(MODEL, TASK, LOCAL, temperature=0), "temperature=0"),
        (lambda: rehearsed(stages(), -1), "capacity=-1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make()
