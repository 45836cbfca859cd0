"""Distillation: the divergence is what the formula says, and the student comes to agree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfm.distillation import distill, kl_divergence
from jaxfm.subnet import axis_sizes, extract, width
from jaxfm.tasks import causal_lm
from jaxfm.testing import tiny_decoder


def test_divergence_is_the_sum_over_classes():
    rng = np.random.default_rng(0)
    teacher, student = rng.normal(size=(2, 5, 7)).astype(np.float32)
    weight = np.array([1, 0, 2, 1, 1], np.float32)
    for temperature in (1.0, 3.0):
        p, q = (np.exp(x / temperature) for x in (teacher, student))
        p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
        expected = (weight * (p * np.log(p / q)).sum(-1)).sum() * temperature**2
        total, count = kl_divergence(*map(jnp.asarray, (teacher, student, weight)), temperature)
        np.testing.assert_allclose(total, expected, rtol=1e-5)
        assert count == 5


def test_a_model_does_not_differ_from_itself():
    logits = jax.random.normal(jax.random.key(0), (3, 4))
    total, _ = kl_divergence(logits, logits, jnp.ones(3))
    np.testing.assert_allclose(total, 0, atol=1e-6)


def test_a_cut_student_comes_to_agree_with_its_parent():
    model = tiny_decoder()
    parent = model.init(jax.random.key(0))
    parent = parent._replace(params=jax.tree.map(lambda x: 3 * x, parent.params))
    half = width(axis_sizes(parent, model.axes), {"mlp": 0.5})
    tokens = np.random.default_rng(0).integers(0, 64, (32, 9)).astype(np.int32)
    student, losses = distill(
        model, extract(parent, model.axes, half),
        jax.tree_util.Partial(lambda v, t: model.apply(v, t)[0], parent), causal_lm(),
        {"tokens": tokens}, steps=100, batch_size=16, optimizer=optax.adam(1e-3),
        key=jax.random.key(1),
    )  # fmt: skip
    assert losses.shape == (100,)
    assert losses[-10:].mean() < 0.75 * losses[:10].mean()
    assert axis_sizes(student, model.axes)["mlp"] < axis_sizes(parent, model.axes)["mlp"]


@pytest.mark.parametrize(
    ("examples", "changes", "message"),
    [
        ({"tokens": np.zeros((0, 9), np.int32)}, {}, "no examples to distill on"),
        ({"tokens": np.zeros((4, 9), np.int32)}, {"steps": 0}, "steps and batch_size must be"),
        ({"a": np.zeros(4), "b": np.zeros(3)}, {}, "same leading size"),
    ],
)
def test_bad_input_is_named(examples, changes, message):
    model = tiny_decoder()
    settings = {"steps": 1, "batch_size": 1, "optimizer": optax.sgd(0.1)} | changes
    with pytest.raises(ValueError, match=message):
        distill(
            model, model.init(jax.random.key(0)), lambda tokens: tokens, causal_lm(), examples,
            key=jax.random.key(0), **settings,
        )  # fmt: skip
