"""Adversaries do what their attack says, and nobody else is touched."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import MODEL, TASK, alike, federation, make, population, run, run_new, start

from jaxfm.federated import client_costs
from jaxfm.federated.wrappers import attacks
from jaxfm.federated.wrappers import robust_rules as rules
from jaxfm.federated.wrappers.robust import with_robust

FALSE = (1, 4)
ROWS = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
WEIGHTS = np.array([1, 2, 0, 3, 1, 1, 4, 2], np.float32)  # one is absent
LIARS = np.isin(np.arange(8), (0, 3, 7))
HONEST = ROWS[(WEIGHTS > 0) & ~LIARS]


def people():
    return population("fed_avg", attacks.marked(federation(), FALSE))


def said(attack) -> np.ndarray:
    return np.asarray(attack(ROWS, WEIGHTS, LIARS, jax.random.key(0)))[LIARS]


def test_attacks_equal_their_definitions():
    np.testing.assert_allclose(said(attacks.sign_flip(2)), -2 * ROWS[LIARS])
    np.testing.assert_allclose(said(attacks.scaling(10)), 10 * ROWS[LIARS])
    away = np.tile(-0.5 * HONEST.mean(0), (3, 1))
    np.testing.assert_allclose(said(attacks.inner_product(0.5)), away, rtol=1e-5)
    little = np.tile(HONEST.mean(0) - 1.5 * HONEST.std(0), (3, 1))
    np.testing.assert_allclose(said(attacks.little_is_enough(1.5)), little, rtol=1e-4)
    noise = attacks.gaussian(3.0)(np.zeros((100, 100)), WEIGHTS, LIARS, jax.random.key(1))
    assert abs(float(noise.std()) - 3) < 0.1 and abs(float(noise.mean())) < 0.1


def test_the_deviations_that_are_little_enough():
    """50 clients of which 24 are adversaries: the example of the paper, s = 2 and z = 1.43."""
    rows = np.random.default_rng(1).normal(size=(50, 4)).astype(np.float32)
    liars = np.arange(50) < 24
    lies = attacks.little_is_enough()(rows, np.ones(50), liars, jax.random.key(0))
    honest = rows[~liars]
    z = (honest.mean(0) - np.asarray(lies)[0]) / honest.std(0)
    np.testing.assert_allclose(z, 1.4261, atol=1e-3)  # the 24/26 quantile of a normal


@functools.cache
def attacked_round(scale: float, claims: float = 1.0):
    algorithm = attacks.with_attack(make("fed_avg"), attacks.scaling(scale), claims=claims)
    return run_new(algorithm, people())[0].server.variables


def test_an_attack_that_repeats_the_truth_changes_nothing():
    plain, _ = run("fed_avg", population("fed_avg", federation()))
    chex.assert_trees_all_close(attacked_round(1.0), plain.server.variables, rtol=1e-5, atol=1e-6)


def test_each_adversary_follows_its_own_attack():
    """One says the truth a hundred times over, the other 0 times; together as each alone."""
    both = attacks.marked(attacks.marked(federation(), (1,)), (4,), attack=1)
    algorithm = attacks.with_attack(make("fed_avg"), attacks.scaling(100.0), attacks.scaling(0.0))
    state, _ = run_new(algorithm, population("fed_avg", both))
    # Client 1 has one example, client 4 has five.
    alone = lambda rows, weights, false, key: jnp.where(weights[:, None] == 1, 100 * rows, 0)
    expected, _ = run_new(attacks.with_attack(make("fed_avg"), alone), people())
    chex.assert_trees_all_close(
        state.server.variables, expected.server.variables, rtol=1e-4, atol=1e-5
    )


def test_silent_adversaries_leave_the_sum_of_the_honest():
    """Scaled by 0 they say that nothing moves, with the weight of their examples."""
    count = np.where(np.isin(np.arange(6), FALSE), 0, federation().count)
    honest, _ = run("fed_avg", population("fed_avg", federation()._replace(count=count)))
    share = count.sum() / federation().count.sum()
    expected = jax.tree.map(
        lambda x, y: x + share * (y - x), start().params, honest.server.variables.params
    )
    chex.assert_trees_all_close(attacked_round(0.0).params, expected, rtol=1e-5, atol=1e-6)


def test_a_claim_outweighs_the_honest_in_a_mean_and_not_in_a_median():
    far = lambda variables: max(
        float(abs(x - y).max())
        for x, y in zip(jax.tree.leaves(variables.params), jax.tree.leaves(start().params))
    )
    assert far(attacked_round(-30.0, 1e6)) > 1
    algorithm = with_robust(make("fed_avg"), rules.median)
    algorithm = attacks.with_attack(algorithm, attacks.scaling(-30.0), claims=1e6)
    state, _ = run_new(algorithm, people())
    assert far(state.server.variables) < 0.5


def test_an_upload_is_eight_bytes_longer():
    plain = client_costs(make("fed_avg"), people(), start())[0]
    algorithm = attacks.with_attack(make("fed_avg"), attacks.sign_flip())
    assert client_costs(algorithm, people(), start())[0].bytes_up == plain.bytes_up + 8


def test_labels_are_flipped_where_adversaries_are():
    data = federation()
    labels = attacks.flipped_labels(data, FALSE, 3).examples["label"]
    own = np.concatenate([data.rows_of(i) for i in FALSE])
    is_own = np.isin(np.arange(24), own)
    expected = np.where(is_own, 2 - data.examples["label"], data.examples["label"])
    np.testing.assert_array_equal(labels, expected)


def test_a_backdoor_stamps_a_share_of_the_rows():
    data = federation((6, 6, 6, 6, 0, 0))
    images = np.zeros((24, 4, 4, 1), np.float32)
    data = data._replace(examples={"image": images, "label": data.examples["label"]})
    trigger = attacks.patch(2, size=2)
    bad = attacks.backdoored(data, (0, 1), trigger, share=0.5)
    stamped = bad.examples["image"].any((1, 2, 3))
    assert stamped.sum() == 6 and not stamped[12:].any()
    assert (bad.examples["label"][stamped] == 2).all()
    np.testing.assert_array_equal(bad.examples["label"][~stamped], data.examples["label"][~stamped])
    assert bad.examples["image"][stamped].sum((1, 2, 3)).tolist() == [4.0] * 6
    words = attacks.token(1, 9, place=2).stamp({"tokens": np.zeros((3, 5), np.int32)})
    assert words["tokens"].tolist() == [[0, 0, 9, 0, 0]] * 3


def test_the_success_of_a_backdoor_counts_other_classes():
    """A model that always answers 1: all rows of other classes are taken for it."""
    variables = start()
    params = jax.tree.map(jnp.zeros_like, variables.params)
    params["dense2"]["bias"] = jnp.array([0.0, 5.0, 0.0])
    answers = variables._replace(params=params)
    trigger = attacks.Trigger(lambda examples: dict(examples), 1)
    rows = federation().examples
    assert attacks.backdoor_success(MODEL, answers, TASK, rows, trigger) == 1
    other = trigger._replace(target=2)
    assert attacks.backdoor_success(MODEL, answers, TASK, rows, other) == 0


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="There is no client 6; there are 6"):
        attacks.marked(federation(), (6,))
    with pytest.raises(ValueError, match="Row 0 belongs to an adversary and to an honest client"):
        attacks.marked(alike(), (1,))
    with pytest.raises(ValueError, match="claims=0 must be a factor above 0"):
        attacks.with_attack(make("fed_avg"), attacks.sign_flip(), claims=0)
    with pytest.raises(ValueError, match="Give at least one attack"):
        attacks.with_attack(make("fed_avg"))
    with pytest.raises(ValueError, match="size=0 must be at least 1"):
        attacks.patch(0, size=0)
    with pytest.raises(ValueError, match="share=0 must be above 0"):
        attacks.backdoored(federation(), FALSE, attacks.patch(0), share=0)
    with pytest.raises(ValueError, match="no leaf 'image'; they have"):
        attacks.backdoored(federation(), FALSE, attacks.patch(0))
    algorithm = attacks.with_attack(make("fed_avg"), attacks.sign_flip())
    with pytest.raises(ValueError, match="name the adversaries by marked"):
        client_costs(algorithm, population("fed_avg", federation()), start())
