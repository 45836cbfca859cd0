"""Adapters of their own for the stages of a stream, and the router among them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_continual import MODEL, START, TASK, TEST, TRAIN, stages

from jaxfm.adapters import attach, head_only
from jaxfm.federated import Local
from jaxfm.federated.algorithms.fed_avg import fed_avg
from jaxfm.federated.continual import learn_adapters, predict, route
from jaxfm.federated.continual.routing import flattened, prototype_sums

ADAPTED = head_only(MODEL)
LOCAL = Local(optax.sgd(0.1), batch_size=4)


def begin():
    return attach(ADAPTED, jax.tree.map(jnp.array, START), jax.random.key(0))


def run(**changes):
    return learn_adapters(
        fed_avg(ADAPTED, TASK, LOCAL), ADAPTED, TASK, stages(), begin(),
        cohort_size=3, num_classes=4, **changes,
    )  # fmt: skip


def test_prototypes_are_means_by_class_over_all_clients():
    sums, number = prototype_sums(flattened, TASK, stages()[0].federation, 4)
    for label in range(4):
        own = TRAIN["image"][TRAIN["label"] == label]
        assert int(number[label]) == (len(own) if label < 2 else 0)
        expected = own.sum(0) if label < 2 else np.zeros(6)
        np.testing.assert_allclose(sums[label], expected, rtol=1e-4, atol=1e-4)


def test_a_row_goes_to_the_stage_of_its_nearest_prototype():
    prototypes = jnp.array([[[0.0], [9.0]], [[4.0], [0.0]]])
    number = jnp.array([[1.0, 1.0], [1.0, 0.0]])  # the last prototype is of no row
    chosen = route(jnp.array([[1.0], [3.0], [8.0], [-5.0]]), prototypes, number)
    assert chosen.tolist() == [0, 1, 0, 0]


def test_a_stage_leaves_the_adapters_of_others_alone_and_a_run_goes_on(tmp_path):
    whole = run(folder=tmp_path)
    bank = whole.bank
    assert whole.scores.forgetting <= 0.1  # only what the router confuses is forgotten
    assert whole.scores.average_accuracy > 0.8
    again = run(folder=tmp_path)  # all stages are there
    jax.tree.map(np.testing.assert_array_equal, again.bank, bank)
    outputs = predict(ADAPTED, begin(), bank, jnp.asarray(TEST["image"]))
    stage = route(jnp.asarray(TEST["image"]), bank.prototypes, bank.number)
    for row in range(4):
        own = jax.tree.map(lambda x, n=int(stage[row]): x[n], bank.params)
        alone, _ = ADAPTED.apply(begin()._replace(params=own), TEST["image"][row : row + 1])
        np.testing.assert_allclose(outputs[row], alone[0], rtol=1e-5, atol=1e-5)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="the model has none; put one around"):
        learn_adapters(
            fed_avg(MODEL, TASK, LOCAL), MODEL, TASK, stages(), START, cohort_size=3, num_classes=4
        )
    with pytest.raises(ValueError, match="give a query that makes vectors"):
        flattened({"tokens": np.zeros((1, 2))})
