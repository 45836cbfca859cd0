"""Control variates: what a client knows of its own drift, and takes out of every step.

Clients keep c_i and the server c, both zero at first. A local step follows  g - c_i + c  in the
place of the gradient g, and after K steps from x to y

    c_i+ = c_i - c + (x - y) / L,    L = r a(K)

with rate r and a(K) = K, or with momentum m what K steps of it add up to
(`jaxfm.federated.parts.sgd`): the gradient is corrected before the optimizer, so c_i+ is a mean of
the client's gradients along its way, with weights that sum to one. The server adds
sum_i w_i (c_i+ - c_i)  over those who report, so that c stays  sum_i w_i c_i  over all clients.
Parameters only; statistics have no drift.

Which w_i: federated averaging minimises  F = sum_i w_i f_i,  w_i = n_i / n,  with f_i the mean loss
of client i, n_i its examples and n those of all clients. Let the run stand still at x with
c_i = grad f_i(x). A client's every step is then g - c_i + c = c, it ends at x - L c, and whatever
weights the movements have, x stays where and only where

    c = sum_i w_i grad f_i(x) = 0.

With w_i = n_i / n these are the minima of F; with the paper's plain w_i = 1/N those of the mean of
the f_i, wherever client sizes differ. So variates are weighted by examples over *all* examples.
The movements' weights p_i do not move the fixed point; they say how the way there is averaged. As
in federated averaging, p_i = n_i / sum of the n_j that report: none is above one, so one client's
round moves x no further than its own step, and the run is stable where that is. The unbiased
p_i = N w_i / |S| reaches N for the one large client among small ones, and diverges for sizes 1:100
at a tenth of the step that the ratio allows.

One tree goes up, not two: with d_i = c_i+ - c_i and the length L, a number, the server has the
movement as well,  y - x = -(d_i + c) L.  What is left out of a compressed d_i then means "as all
others", not "did not move". (Where `compressed` rounds c on its way down, the server takes its own:
off by that rounding.)
Sources: Karimireddy et al. 2020 (SCAFFOLD), algorithm 1, option II; Huang et al. 2023 (Stochastic
controlled averaging with communication compression) for the single upload.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxfm.federated.local import GradHook
from jaxfm.federated.parts.sgd import Sgd, accumulated
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
    """L = r a(K) f32[], how far K steps go along one gradient of length one; 0 for none."""
    return sgd.learning_rate * accumulated(steps, sgd.momentum)


def movement(gain: PyTree, common: PyTree, length: Array) -> PyTree:
    """y - x of a client whose variate gained `gain`; trees like the parameters."""
    return jax.tree.map(
        lambda d, c: (-length).astype(d.dtype) * (d + c.astype(d.dtype)), gain, common
    )


def common_variate(common: PyTree, gains: PyTree, total: float) -> PyTree:
    """c plus the weighted sum of gains over those who reported, divided by all weights there are.

    Args:
      common: c.
      gains: the sum of n_i (c_i+ - c_i); of c_i+ - c_i where clients count alike.
      total: the sum of n_i over all clients; their number where they count alike.
    """
    add = lambda c, d: (c.astype(d.dtype) + d / float(total)).astype(c.dtype)
    return jax.tree.map(add, common, gains)


def check_total(name: str, total: float) -> None:
    """Raises ValueError where a sum over all clients is not above zero."""
    if not 0 < total < math.inf:
        raise ValueError(f"{name}={total} must be above 0: that of all clients there are.")
