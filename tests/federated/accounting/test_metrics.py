"""The three metrics against the same sums in NumPy."""

import jax
import numpy as np
import optax
import pytest

from jaxfm.data.federation import federate, select_clients
from jaxfm.federated.accounting.metrics import (
    client_metrics,
    global_metrics,
    three_metrics,
    worst_decile,
)
from jaxfm.federated.accounting.resources import profiles
from jaxfm.federated.algorithm import Bucket
from jaxfm.federated.algorithms.hetero_fl import hetero_fl
from jaxfm.federated.local import Local
from jaxfm.federated.population import Population
from jaxfm.federated.rounds import compile_rounds
from jaxfm.models.families.cnn import mlp
from jaxfm.subnet import Subnet
from jaxfm.tasks import classification
from jaxfm.tasks.direction import higher_is_better

MODEL, TASK = mlp((6, 8, 3)), classification(3, inputs="x")
ALGORITHM = hetero_fl(
    MODEL, TASK, Local(optax.sgd(0.1), 4), [Subnet({}), Subnet({"hidden1": np.arange(4)})]
)
BUCKET = np.array([1, 0, 1, 1, 0])
RNG = np.random.default_rng(0)
EXAMPLES = {
    "x": RNG.normal(size=(20, 6)).astype(np.float32),
    "label": RNG.integers(0, 3, 20).astype(np.int32),
}
TEST = federate(EXAMPLES, [np.arange(9), [9, 10], [], np.arange(11, 19), [19]])


def state():
    engine = compile_rounds(ALGORITHM, Population(TEST, profiles(5), BUCKET), cohort_size=2)
    return engine.init(MODEL.init(jax.random.key(0)), jax.random.key(1))


def oracle(params, hidden: int, rows, weight=None) -> dict[str, float]:
    """Mean loss and accuracy of the first `hidden` units, in f64."""
    first, last = (jax.tree.map(np.float64, params[name]) for name in ("dense1", "dense2"))
    x, label = EXAMPLES["x"][rows], EXAMPLES["label"][rows]
    h = np.maximum(x @ first["kernel"][:, :hidden] + first["bias"][:hidden], 0)
    logits = h @ last["kernel"][:hidden] + last["bias"]
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    own = -logs[np.arange(len(label)), label]
    return {
        "loss": np.average(own, weights=weight),
        "accuracy": np.average(logits.argmax(-1) == label, weights=weight),
    }


@pytest.mark.parametrize("batch_size", [4, 100])
def test_each_client_is_scored_with_its_own_model_on_its_own_rows(batch_size):
    now = state()
    result = client_metrics(ALGORITHM, BUCKET, TASK, batch_size=batch_size)(now, TEST)
    for client, bucket in enumerate(BUCKET):
        rows = TEST.rows_of(client)
        for name in ("loss", "accuracy"):
            if not len(rows):
                assert np.isnan(result[name][client])
                continue
            expected = oracle(now.server.variables.params, (8, 4)[bucket], rows)[name]
            assert result[name][client] == pytest.approx(expected, rel=1e-5)


def test_rows_keep_their_weights():
    weight = RNG.uniform(size=20).astype(np.float32)
    now, test = state(), TEST._replace(examples=EXAMPLES | {"weight": weight})
    result = client_metrics(ALGORITHM, BUCKET, TASK, batch_size=4)(now, test)
    expected = oracle(now.server.variables.params, 4, np.arange(9), weight[:9])
    assert result["loss"][0] == pytest.approx(expected["loss"], rel=1e-5)


def test_the_global_model_on_the_global_test_set():
    now = state()
    for bucket, hidden in enumerate((8, 4)):
        result = global_metrics(ALGORITHM, now, TASK, EXAMPLES, batch_size=7, bucket=bucket)
        expected = oracle(now.server.variables.params, hidden, np.arange(20))
        assert result == pytest.approx(expected, rel=1e-5)


def test_the_worst_decile():
    values = np.array([0.5, np.nan, 0.1, 0.9, 0.3, 0.2, 0.8, 0.7, 0.6, 0.4, 1.0, 0.0])
    assert worst_decile("accuracy", values) == pytest.approx(0.05)  # 2 of the 11 that have rows
    assert worst_decile("loss", values) == pytest.approx(0.95)
    assert worst_decile("loss", np.array([3.0])) == 3.0
    assert np.isnan(worst_decile("loss", np.array([np.nan])))


@pytest.mark.parametrize("name", ["recall", "f1", "tokens_per_joule"])
def test_the_worst_of_what_is_better_higher_are_the_lowest(name):
    values = np.arange(20) / 20
    declared = {"tokens_per_joule": True}
    better = lambda name: declared.get(name, higher_is_better(name))
    assert worst_decile(name, values, better) == pytest.approx(0.025)
    assert worst_decile(name, values, {name: False}.get) == pytest.approx(0.925)


def test_a_metric_without_a_better_way_has_no_worst_clients():
    assert three_metrics({"length": np.ones(2)}, {}) == {"personal/length": 1.0}
    with pytest.raises(ValueError, match="Nobody says whether a higher 'length' is better"):
        worst_decile("length", np.ones(2))


def test_a_client_that_diverged_is_the_worst_and_one_without_rows_is_nobody():
    now, x = state(), EXAMPLES["x"].copy()
    x[9:11] = np.nan  # the rows of client 1
    test = TEST._replace(examples=EXAMPLES | {"x": x})
    result = client_metrics(ALGORITHM, BUCKET, TASK, batch_size=4)(now, test)
    assert np.isinf(result["loss"][1]) and np.isnan(result["loss"][2])
    metrics = three_metrics(result, {})
    assert metrics["worst_decile/loss"] == metrics["personal/loss"] == np.inf


def test_three_metrics():
    values = np.array([1.0, np.nan, 3.0])
    assert three_metrics({"loss": values, "accuracy": values}, {"loss": 5.0}) == {
        "global/loss": 5.0,
        "personal/loss": 2.0,
        "worst_decile/loss": 3.0,
        "personal/accuracy": 2.0,
        "worst_decile/accuracy": 1.0,
    }


def test_what_cannot_be_measured_raises():
    nothing = ALGORITHM._replace(buckets=(Bucket(None, lambda s, p: s, lambda *a: a),))
    with pytest.raises(ValueError, match="A bucket without a model cannot be evaluated"):
        client_metrics(nothing, np.zeros(5, int), TASK, batch_size=4)
    with pytest.raises(ValueError, match="The test federation has 4 clients, the run 5"):
        fewer = select_clients(TEST, range(4))
        client_metrics(ALGORITHM, BUCKET, TASK, batch_size=4)(state(), fewer)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        client_metrics(ALGORITHM, BUCKET, TASK, batch_size=0)
