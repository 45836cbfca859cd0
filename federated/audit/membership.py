"""Membership inference: was an example among those that a model was trained on?

By a threshold on its loss, which overfitting gives away, or by the likelihood ratio of its
confidence under models that were trained with it and without it:

    score = log N(c; mu_in, s_in^2) - log N(c; mu_out, s_out^2)

with c the confidence of the model under attack and mu, s those of shadow models, which the attacker
trains on halves of examples like the model's. The advantage of an attack is the largest difference
of its true and false positive rates over all thresholds: 0 for a guess, 1 for certainty. It is the
largest of many estimates, so of n members and n others even a guess reaches about 1 / sqrt(n).
Sources: Yeom et al. 2018 (loss threshold, advantage); Carlini et al. 2022 (Membership inference
attacks from first principles), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.stats import norm
from sklearn.metrics import roc_auc_score, roc_curve

from jaxfm.data.federation import leading_size
from jaxfm.federated.algorithm import ClientData
from jaxfm.federated.audit.losses import confidence, example_losses
from jaxfm.federated.local import UNLIMITED_STEPS, Local, local_fit, objective
from jaxfm.model import Array, Key, Model, Variables
from jaxfm.tasks import Task

# Below so many shadow models, deviations of single examples are too uncertain (section V.C).
_FEW = 64


class Leakage(NamedTuple):
    """How well an attack tells members from others.

    Attributes:
      advantage: the largest true positive rate less false positive rate.
      auc: the probability that a member scores above another, ties by half.
      true_positive_rate: the largest at a false positive rate of at most `at`: an attack that is
        sure of a few members and guesses the rest has a small advantage, and is one all the same.
      at: that rate.
    """

    advantage: float
    auc: float
    true_positive_rate: float
    at: float


class Shadows(NamedTuple):
    """Confidences of models trained on halves of the same rows.

    Attributes:
      confidence: f32[S, N].
      inside: bool[S, N], whether the row was trained on; S / 2 models for each row.
    """

    confidence: Array
    inside: Array


def leakage(members: Array, others: Array, *, at: float = 0.01) -> Leakage:
    """Rates of an attack whose score is higher for what it takes for members.

    Args:
      members: f[n], scores of examples that the model was trained on.
      others: f[m], scores of examples like them.
      at: the false positive rate at which the true one is reported.
    Raises:
      ValueError: no score on a side, or one that is NaN; `at` is not from 0 to 1.
    """
    if not 0 <= at <= 1:
        raise ValueError(f"at={at} must be a false positive rate from 0 to 1.")
    inside, outside = np.asarray(members, np.float64), np.asarray(others, np.float64)
    if not len(inside) or not len(outside):
        raise ValueError(f"Give scores of both sides, not of {len(inside)} and {len(outside)}.")
    score = np.concatenate([inside, outside])
    if np.isnan(score).any():
        raise ValueError(f"{np.isnan(score).sum()} of {len(score)} scores are NaN.")
    truth = np.arange(len(score)) < len(inside)
    false_rate, true_rate, _ = roc_curve(truth, score, drop_intermediate=False)
    return Leakage(
        advantage=float((true_rate - false_rate).max()),
        auc=float(roc_auc_score(truth, score)),
        true_positive_rate=float(true_rate[false_rate <= at].max()),
        at=at,
    )


def epsilon_bound(
    members: Array, others: Array, *, delta: float = 1e-5, significance: float = 0.05
) -> float:
    """A lower bound of the epsilon of a single run, from scores of canaries.

    Each canary was given to the run or left out by a fair coin. A bound above the epsilon that a
    run states means that it is not as private as it says; one below says nothing.
    Source: Steinke et al. 2023 (Privacy auditing with one training run), theorem 5.2, as
    implemented in jax-privacy.

    Args:
      members, others: f[n], f[m], scores of the canaries that the run was given and was not.
      delta: of the epsilon.
      significance: the probability with which the bound may be wrong.
    Raises:
      ValueError: delta or significance out of range.
      ImportError: jax-privacy is not installed.
    """
    if not 0 < delta < 1 or not 0 < significance < 1:
        raise ValueError(f"delta={delta} and significance={significance} must be between 0 and 1.")
    try:
        from jax_privacy.auditing import CanaryScoreAuditor
    except ImportError as error:
        raise ImportError(
            "Bounds of epsilon need jax-privacy: pip install 'jaxfm[privacy]'."
        ) from error
    auditor = CanaryScoreAuditor(np.asarray(members), np.asarray(others))
    return float(auditor.epsilon_one_run(significance, delta))


def loss_threshold(
    model: Model,
    variables: Variables,
    task: Task,
    members: Mapping[str, Array],
    others: Mapping[str, Array],
    *,
    at: float = 0.01,
) -> Leakage:
    """The attack that takes examples of small loss for members.

    Args:
      model, variables, task: under attack.
      members, others: examples that it was and was not trained on, leaves [n, ...] and [m, ...].
      at: as in `leakage`.
    """
    losses = jax.jit(lambda rows: example_losses(model, variables, task, rows))
    return leakage(-losses(dict(members)), -losses(dict(others)), at=at)


def train_shadows(
    model: Model,
    task: Task,
    local: Local,
    examples: Mapping[str, Array],
    num_shadows: int,
    key: Key,
) -> Shadows:
    """Trains models from new weights on random halves of some rows, in one compiled program.

    They come in pairs that share out the rows, so that every row is in one half of the models.

    Args:
      model, task: of the model under attack.
      local: how shadows are trained, as a client is.
      examples: rows that may be members, leaves [N, ...].
      num_shadows: S, even and at least 4.
      key: of halves, weights and batches.
    Raises:
      ValueError: num_shadows is odd or below 4; fewer than 2 rows.
    """
    size = leading_size(examples)
    if num_shadows < 4 or num_shadows % 2:
        raise ValueError(f"num_shadows={num_shadows} must be even and at least 4.")
    if size < 2:
        raise ValueError(f"There are halves of at least 2 rows, not of {size}.")
    held = {name: jnp.asarray(leaf) for name, leaf in examples.items()}
    fit, half = local_fit(objective(model, task), local), size // 2
    halves, models = jax.random.split(key)

    def one(number: Array) -> tuple[Array, Array]:
        order = jax.random.permutation(jax.random.fold_in(halves, number // 2), size)
        first = number % 2 == 0
        index = jnp.where(first, order, jnp.roll(order, -half)).astype(jnp.int32)
        count = jnp.where(first, half, size - half).astype(jnp.int32)
        start_key, fit_key = jax.random.split(jax.random.fold_in(models, number))
        start = model.init(start_key)
        data = ClientData(held, index, count)
        variables, _ = fit(start, data, jnp.int32(UNLIMITED_STEPS), fit_key)
        inside = jnp.zeros(size, bool).at[index].set(jnp.arange(size) < count)
        return confidence(example_losses(model, variables, task, held)), inside

    return Shadows(*jax.jit(lambda: lax.map(one, jnp.arange(num_shadows)))())


def likelihood_ratio(target: Array, shadows: Shadows, *, online: bool = True) -> Array:
    """The score f32[N] of each row: the larger, the likelier it was trained on.

    Args:
      target: f32[N], `confidence(example_losses(...))` of the model under attack.
      shadows: over the same rows.
      online: compare with models that were trained with the row; False: only how unusual its
        confidence is for a model that was not, for rows that the attacker cannot train on.
    Raises:
      ValueError: target and shadows of different rows.
    """
    if target.shape != shadows.confidence.shape[1:]:
        raise ValueError(
            f"target has shape {target.shape}; the shadows are of {shadows.confidence.shape[1:]}."
        )
    mean_in, deviation_in = _moments(shadows.confidence, shadows.inside)
    mean_out, deviation_out = _moments(shadows.confidence, ~shadows.inside)
    if not online:
        return norm.logcdf(target, mean_out, deviation_out)
    return norm.logpdf(target, mean_in, deviation_in) - norm.logpdf(target, mean_out, deviation_out)


def _moments(values: Array, chosen: Array) -> tuple[Array, Array]:
    """Mean and deviation of each column over chosen rows; of few models one deviation for all."""
    count = jnp.maximum(chosen.sum(0), 1).astype(values.dtype)
    mean = jnp.where(chosen, values, 0).sum(0) / count
    square = jnp.where(chosen, jnp.square(values - mean[None]), 0)
    if values.shape[0] < _FEW:
        variance = jnp.broadcast_to(square.sum() / chosen.sum().astype(values.dtype), mean.shape)
    else:
        variance = square.sum(0) / count
    return mean, jnp.sqrt(variance) + 1e-6
