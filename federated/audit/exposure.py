"""Canary exposure: how much a model has learned by heart of a secret that it was trained on once.

    exposure(s) = log2 |R| - log2 rank_R(s)

in bits, with R all secrets of a format and the rank that of the model's loss: a canary whose loss
is below that of all of R has log2 |R|, and one that was never seen about 1. R is too large to look
at, so it is sampled: with n references exposure ends at log2(n + 1).
Source: Carlini et al. 2019 (The secret sharer), section 4 and, for sampling, 4.3.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.model import Array, Key


def canaries(
    key: Key, number: int, prefix: np.ndarray, length: int, vocabulary: np.ndarray
) -> Array:
    """Texts i32[number, P + length] that begin alike and end in a secret drawn at random.

    Args:
      key: of the draws.
      number: of texts: those to insert and their references come from different keys.
      prefix: i32[P], "my number is", say.
      length: tokens of the secret.
      vocabulary: i32[K], what they are drawn from; there are K ** length secrets.
    Raises:
      ValueError: number or length below 1, or an empty vocabulary.
    """
    if number < 1 or length < 1 or not len(vocabulary):
        raise ValueError(
            f"number={number} and length={length} must be at least 1, and the vocabulary "
            f"not empty; it has {len(vocabulary)} tokens."
        )
    drawn = jax.random.randint(key, (number, length), 0, len(vocabulary))
    secrets = jnp.asarray(vocabulary, jnp.int32)[drawn]
    begin = jnp.broadcast_to(jnp.asarray(prefix, jnp.int32), (number, len(prefix)))
    return jnp.concatenate([begin, secrets], axis=1)


def exposure(canary: Array, references: Array) -> Array:
    """Exposure f32[C] in bits of canaries by their losses; ties count by half.

    Args:
      canary: f[C], losses (`example_losses`) of what was inserted.
      references: f[n], losses of other secrets of the format, which were not.
    Raises:
      ValueError: no reference.
    """
    if not len(references):
        raise ValueError("Exposure ranks a canary among references; give at least one.")
    own, others = jnp.asarray(canary)[:, None], jnp.asarray(references)[None]
    below = (others < own).sum(1).astype(jnp.float32)
    equal = (others == own).sum(1).astype(jnp.float32)
    return jnp.log2(len(references) + 1.0) - jnp.log2(1 + below + equal / 2)
