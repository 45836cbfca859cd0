"""What an optimizer does in K steps, for algorithms that divide by it: gradient descent only.

With the same gradient g in each of K steps, descent at rate r with momentum m moves r a(K) g with

    a(K) = (K - m (1 - m^K) / (1 - m)) / (1 - m)

since momentum starts from zero in every round; a(K) = K without momentum.
Source: Wang et al. 2020 (FedNova), section 4.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from jaxfm.model import Array
from jaxfm.optimizer import update


class Sgd(NamedTuple):
    """Stochastic gradient descent: the rate of a step, and the share of the last one it keeps."""

    learning_rate: float
    momentum: float


def sgd_of(optimizer: optax.GradientTransformation, who: str) -> Sgd:
    """The rate and the momentum of an optimizer, measured on three small gradients.

    Small ones, so that clipping does not change them. What decays weights passes, too: the decay
    is a part of the gradient.

    Args:
      optimizer: `optax.sgd`, alone or in a chain.
      who: the algorithm that asks, for the message.
    Raises:
      ValueError: its steps are not those of gradient descent with heavy-ball momentum.
    """
    probe = 1e-3
    first = _moves(optimizer, [probe] * 3) / probe
    doubled = _moves(optimizer, [2 * probe] * 3) / probe
    rate = float(first[0])
    momentum = float(first[1] / rate - 1) if rate > 0 else -1.0
    expected = rate * np.array([1.0, 1 + momentum, 1 + momentum + momentum**2])
    linear = np.allclose(doubled, 2 * first, rtol=1e-4)
    if not (linear and np.allclose(first, expected, rtol=1e-4) and -1e-6 <= momentum < 1):
        raise ValueError(
            f"{who} needs local steps of gradient descent at one rate, with or without momentum "
            f"(optax.sgd); this optimizer moves by {first.round(6).tolist()} times the same "
            "gradient."
        )
    return Sgd(rate, round(max(momentum, 0.0), 5))


def _moves(optimizer: optax.GradientTransformation, gradients: list[float]) -> np.ndarray:
    """f64: how far a number at zero goes down in each step."""
    x, moves = jnp.zeros(()), []
    state = optimizer.init(x)
    for gradient in gradients:
        step, state = update(optimizer, jnp.float32(gradient), state, x)
        moves.append(-float(step))
    return np.array(moves, np.float64)


def accumulated(steps: Array, momentum: float) -> Array:
    """a(K) f32[] of K steps f32[]; 0 for none."""
    gone = 1 - momentum**steps if momentum else 0.0
    return (steps - momentum * gone / (1 - momentum)) / (1 - momentum)
