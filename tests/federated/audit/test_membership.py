"""A model that has learned its examples by heart gives them away; one that has not does not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import norm

from jaxfm.federated.algorithm import ClientData
from jaxfm.federated.audit.losses import confidence, example_losses
from jaxfm.federated.audit.membership import (
    Shadows,
    epsilon_bound,
    leakage,
    likelihood_ratio,
    loss_threshold,
    train_shadows,
)
from jaxfm.federated.local import Local, local_fit, objective
from jaxfm.models import mlp
from jaxfm.tasks import classification, evaluate

MODEL = mlp((12, 32, 3))
TASK = classification(3, inputs="x")
LOCAL = Local(optax.adam(0.01), 16, 40)


def rows(num: int, seed: int) -> dict[str, np.ndarray]:
    """Labels of chance: whatever a model knows of them, it has learned by heart."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num, 12)).astype(np.float32)
    return {"x": x, "label": rng.integers(0, 3, num).astype(np.int32)}


@functools.cache
def trained():
    """(rows, which of them it was trained on, the model, its shadows)."""
    all_rows, inside = rows(64, 0), np.random.default_rng(1).permutation(64) < 32
    fit = jax.jit(local_fit(objective(MODEL, TASK), LOCAL))
    held = {name: jnp.asarray(leaf) for name, leaf in all_rows.items()}
    index = np.concatenate([np.flatnonzero(inside), np.flatnonzero(~inside)]).astype(np.int32)
    data = ClientData(held, jnp.asarray(index), jnp.int32(32))
    variables, _ = fit(MODEL.init(jax.random.key(5)), data, jnp.int32(10**6), jax.random.key(6))
    shadows = train_shadows(MODEL, TASK, LOCAL, all_rows, 16, jax.random.key(7))
    return all_rows, inside, variables, shadows


def test_losses_are_those_of_the_examples_alone():
    variables, some = MODEL.init(jax.random.key(0)), rows(5, 3)
    losses = example_losses(MODEL, variables, TASK, some, batch_size=2)
    for i in range(5):
        one = {name: leaf[i : i + 1] for name, leaf in some.items()}
        expected = evaluate(MODEL.apply, variables, TASK, one, 1)["loss"]
        np.testing.assert_allclose(losses[i], expected, rtol=1e-5)
    p = np.exp(-np.asarray(losses, np.float64))
    np.testing.assert_allclose(confidence(losses), np.log(p / (1 - p)), rtol=1e-3, atol=1e-4)


def test_an_untrained_model_leaks_nothing():
    variables = MODEL.init(jax.random.key(0))
    found = loss_threshold(MODEL, variables, TASK, rows(500, 1), rows(500, 2), at=0.1)
    assert found.advantage < 0.1 and abs(found.auc - 0.5) < 0.04
    assert found.true_positive_rate < 0.15


def test_an_overfit_model_leaks_by_its_losses():
    all_rows, inside, variables, _ = trained()
    members, others = ({k: v[who] for k, v in all_rows.items()} for who in (inside, ~inside))
    found = loss_threshold(MODEL, variables, TASK, members, others)
    assert found.advantage > 0.6 and found.auc > 0.8


def test_the_likelihood_ratio_is_surer_of_some():
    """More members than by their losses at (almost) no false positive, as the paper says."""
    all_rows, inside, variables, shadows = trained()
    losses = example_losses(MODEL, variables, TASK, all_rows)
    by_loss = leakage(-losses[inside], -losses[~inside])
    score = likelihood_ratio(confidence(losses), shadows)
    by_ratio = leakage(score[inside], score[~inside])
    assert by_ratio.auc > 0.85
    assert by_ratio.true_positive_rate > 3 * by_loss.true_positive_rate
    offline = likelihood_ratio(confidence(losses), shadows, online=False)
    assert leakage(offline[inside], offline[~inside]).auc > 0.8


def test_shadows_share_out_the_rows_and_are_the_same_again():
    all_rows, _, _, shadows = trained()
    inside = np.asarray(shadows.inside)
    assert (inside.sum(0) == 8).all() and (inside.sum(1) == 32).all()
    np.testing.assert_array_equal(inside[::2], ~inside[1::2])
    learned = shadows.confidence[shadows.inside].mean() - shadows.confidence[~shadows.inside].mean()
    assert learned > 3
    assert len(all_rows["x"]) == shadows.confidence.shape[1]


@pytest.mark.parametrize("num_shadows", [6, 64])
def test_the_ratio_is_that_of_two_normals(num_shadows):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(num_shadows, 4)).astype(np.float32)
    inside = np.stack([rng.permutation(num_shadows) < num_shadows // 2 for _ in range(4)], 1)
    target = np.array([0.1, -0.5, 2.0, 1.0], np.float32)

    def moments(chosen):
        means = np.array([values[chosen[:, i], i].mean() for i in range(4)])
        squares = [np.square(values[chosen[:, i], i] - means[i]).mean() for i in range(4)]
        return means, np.sqrt(squares if num_shadows == 64 else np.full(4, np.mean(squares)))

    expected = norm.logpdf(target, *moments(inside)) - norm.logpdf(target, *moments(~inside))
    score = likelihood_ratio(jnp.asarray(target), Shadows(jnp.asarray(values), jnp.asarray(inside)))
    np.testing.assert_allclose(score, expected, rtol=1e-3, atol=1e-4)


def test_rates_of_known_scores():
    found = leakage(np.array([3.0, 2.0, 1.0, 1.0]), np.array([2.5, 1.0, 0.0, 0.0]), at=0.0)
    assert found.advantage == 0.5  # at 1: all members and half of the others
    assert found.true_positive_rate == 0.25 and found.auc == (4 + 3 + 2.5 + 2.5) / 16


def test_a_bound_of_epsilon_is_below_that_of_randomized_response():
    pytest.importorskip("jax_privacy")
    rng, size, epsilon = np.random.default_rng(0), 4000, 2.0
    keeps = lambda: rng.random(size) < np.exp(epsilon) / (1 + np.exp(epsilon))
    members, others = keeps() * 1.0, ~keeps() * 1.0
    assert 1.5 < epsilon_bound(members, others, delta=1e-6) < epsilon
    chance = rng.normal(size=(2, size))
    assert epsilon_bound(*chance) < 0.2
    with pytest.raises(ValueError, match=r"delta=1 and significance=0\.05 must be between"):
        epsilon_bound(members, others, delta=1)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="scores of both sides, not of 0 and 2"):
        leakage(np.zeros(0), np.zeros(2))
    with pytest.raises(ValueError, match="1 of 3 scores are NaN"):
        leakage(np.array([np.nan]), np.zeros(2))
    with pytest.raises(ValueError, match="at=2 must be a false positive rate"):
        leakage(np.zeros(1), np.zeros(2), at=2)
    with pytest.raises(ValueError, match="num_shadows=5 must be even"):
        train_shadows(MODEL, TASK, LOCAL, rows(4, 0), 5, jax.random.key(0))
    with pytest.raises(ValueError, match=r"target has shape \(3,\)"):
        likelihood_ratio(jnp.zeros(3), Shadows(jnp.zeros((4, 2)), jnp.zeros((4, 2), bool)))
