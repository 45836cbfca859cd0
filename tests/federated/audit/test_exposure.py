"""A secret learned by heart has the exposure of its length; one that was never seen has none."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfm.federated.algorithm import ClientData
from jaxfm.federated.audit.exposure import canaries, exposure
from jaxfm.federated.audit.losses import example_losses
from jaxfm.federated.local import Local, local_fit, objective
from jaxfm.tasks import causal_lm
from jaxfm.testing import tiny_decoder

PREFIX, DIGITS = np.array([1, 2, 3]), np.arange(10, 20)


def test_exposure_is_the_rank_in_bits():
    references = np.arange(1.0, 16.0)
    found = exposure(np.array([0.0, 7.5, 20.0, 8.0]), references)
    np.testing.assert_allclose(found, [4, 1, 0, 4 - np.log2(8.5)], atol=1e-6)
    assert float(exposure(np.zeros(1), np.zeros(15))[0]) == pytest.approx(4 - np.log2(8.5))


def test_canaries_begin_alike_and_end_at_random():
    texts = np.asarray(canaries(jax.random.key(0), 400, PREFIX, 4, DIGITS))
    assert texts.shape == (400, 7) and (texts[:, :3] == PREFIX).all()
    counts = np.bincount(texts[:, 3:].ravel(), minlength=20)[10:]
    assert counts.sum() == 1600 and counts.min() > 100
    again = canaries(jax.random.key(0), 400, PREFIX, 4, DIGITS)
    np.testing.assert_array_equal(texts, again)


def test_a_canary_that_was_learned_is_exposed():
    model, task = tiny_decoder(num_layers=1), causal_lm()
    own = canaries(jax.random.key(1), 1, PREFIX, 4, DIGITS)
    others = canaries(jax.random.key(2), 255, PREFIX, 4, DIGITS)
    fit = jax.jit(local_fit(objective(model, task), Local(optax.adam(0.01), 1, 30)))
    start = jax.jit(model.init)(jax.random.key(3))
    data = ClientData({"tokens": own}, jnp.zeros(1, jnp.int32), jnp.int32(1))
    learned, _ = fit(start, data, jnp.int32(10**6), jax.random.key(4))
    losses = jax.jit(lambda variables, tokens: example_losses(model, variables, task, {
        "tokens": tokens
    }))  # fmt: skip
    both = jnp.concatenate([own, others])
    before, after = losses(start, both), losses(learned, both)
    assert float(exposure(after[:1], after[1:])[0]) == 8
    assert float(exposure(before[:1], before[1:])[0]) < 5


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="give at least one"):
        exposure(np.zeros(1), np.zeros(0))
    with pytest.raises(ValueError, match="number=1 and length=0 must be at least 1"):
        canaries(jax.random.key(0), 1, PREFIX, 0, DIGITS)
