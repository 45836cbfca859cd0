"""Control variates: what a client knows of its own drift, and takes out of every step.

Clients keep c_i and the server c, both zero at first. A local step follows  g - c_i + c  in the
place of the gradient g, and after K steps from x to y

    c_i+ = c_i - c + (x - y) (1 - m) / (K r)

with rate r and momentum m: the gradient is corrected before the optimizer, so K steps move up to
K r / (1 - m) times as far. The server adds  sum_i (c_i+ - c_i) / N  over those who report, with N
all clients there are: c stays the mean of all c_i. Parameters only; statistics have no drift.

One tree goes up, not two: with d_i = c_i+ - c_i and the length K r / (1 - m), a number, the server
has the movement as well,  y - x = -(d_i + c) K r / (1 - m).  What is left out of a compressed d_i
then means "as all others", not "did not move". (Where `compressed` rounds c on its way down, the
server takes its own: off by that rounding.)
Sources: Karimireddy et al. 2020 (SCAFFOLD), algorithm 1, option II; Huang et al. 2023 (Stochastic
controlled averaging with communication compression) for the single upload.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxfm.federated.local import GradHook
from jaxfm.federated.parts.sgd import Sgd
from jaxfm.model import Array, PyTree


def no_variates(params: PyTree) -> PyTree:
    """Where all variates start: zeros like the parameters. Never random, or c starts wrong."""
    return jax.tree.map(jnp.zeros_like, params)


def corrected(own: PyTree, common: PyTree) -> GradHook:
    """The gradient hook g - c_i + c; `own` is c_i and `common` is c, trees like the parameters."""
    return lambda grads, params: jax.tree.map(lambda g, c_i, c: g - c_i + c, grads, own, common)


def next_variate(
    own: PyTree, common: PyTree, start: PyTree, trained: PyTree, steps: Array, sgd: Sgd
) -> PyTree:
    """c_i+ of a client that went from `start` to `trained` in `steps` f32[] steps; c_i for none."""
    length = jnp.where(steps > 0, run_length(steps, sgd), 1)

    def one(c_i, c, x, y):
        slope = (x - y).astype(jnp.float32) / length
        new = c_i - c + slope.astype(c_i.dtype)
        return jnp.where(steps > 0, new, c_i)

    return jax.tree.map(one, own, common, start, trained)


def run_length(steps: Array, sgd: Sgd) -> Array:
    """K r / (1 - m) f32[], how far K steps along one gradient go at most; 0 for none."""
    return steps * sgd.learning_rate / (1 - sgd.momentum)


def movement(gain: PyTree, common: PyTree, length: Array) -> PyTree:
    """y - x of a client whose variate gained `gain`; trees like the parameters."""
    return jax.tree.map(
        lambda d, c: (-length).astype(d.dtype) * (d + c.astype(d.dtype)), gain, common
    )


def common_variate(common: PyTree, gains: PyTree, num_clients: int) -> PyTree:
    """c plus the sum of gains c_i+ - c_i over those who reported, divided by all clients."""
    return jax.tree.map(
        lambda c, d: (c.astype(d.dtype) + d / num_clients).astype(c.dtype), common, gains
    )


def check_num_clients(num_clients: int) -> None:
    """Raises ValueError where the number of all clients cannot be one."""
    if num_clients < 1:
        raise ValueError(f"num_clients must be all clients there are, got {num_clients}.")
