"""The gradient of one image holds the image, and noise hides it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm.data.arrays import digits
from jaxfm.federated.audit.inversion import (
    batch_gradient,
    invert_gradient,
    reconstruction_error,
)
from jaxfm.models import mlp
from jaxfm.tasks import classification

MODEL = mlp((64, 16, 10))
TASK = classification(10, transform=lambda x, key: x.reshape(x.shape[0], -1))


@functools.cache
def inverted(noise: float = 0.0, num: int = 1):
    """(images, what was recovered of them from a gradient with noise of a share of its norm)."""
    source = digits()["train"].examples
    batch = {name: jnp.asarray(leaf[:num]) for name, leaf in source.items()}
    variables = MODEL.init(jax.random.key(0))
    gradient = batch_gradient(MODEL, variables, TASK, batch)
    leaves, tree = jax.tree.flatten(gradient)
    size = sum(leaf.size for leaf in leaves)
    norm = jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in leaves))
    keys = jax.random.split(jax.random.key(9), len(leaves))
    seen = jax.tree.unflatten(tree, [
        leaf + noise * norm / size**0.5 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys)
    ])  # fmt: skip
    found = invert_gradient(
        MODEL, variables, TASK, seen, batch["label"], (8, 8, 1), jax.random.key(1),
        steps=200, total_variation=1e-4,
    )  # fmt: skip
    return np.asarray(batch["image"]), found


def test_one_image_is_recovered_and_noise_hides_it():
    images, found = inverted()
    guess = float(np.square(images - images.mean()).mean())
    assert float(found.mismatch) < 0.01
    assert reconstruction_error(images, found.images)[0] < 0.05 * guess
    _, hidden = inverted(3.0)
    assert reconstruction_error(images, hidden.images)[0] > 0.5 * guess


def test_errors_are_those_of_the_best_match():
    images = np.random.default_rng(0).normal(size=(4, 3, 3, 1))
    order = [2, 0, 3, 1]
    errors = reconstruction_error(images, images[order] + 0.1)
    np.testing.assert_allclose(errors, np.full(4, 0.01), rtol=1e-6)


def test_bad_input_is_refused():
    variables = MODEL.init(jax.random.key(0))
    with pytest.raises(ValueError, match="steps=0 and restarts=1 must be at least 1"):
        invert_gradient(
            MODEL, variables, TASK, variables.params, jnp.zeros(1, jnp.int32), (8, 8, 1),
            jax.random.key(0), steps=0,
        )  # fmt: skip
