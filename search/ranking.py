"""How much each unit of each group matters: what magnitude pruning ranks by.

Every member of a group is one axis of one parameter. Its scores are divided by their mean, so that
no member outvotes the others by its scale, and averaged over members (Fang et al. 2023, DepGraph,
section 3.3). A stacked parameter scores each layer separately.

    l1, l2       norm of the weights of a unit (Li et al. 2017, Pruning filters)
    taylor       |sum of weight * gradient| over a unit's weights (Molchanov et al. 2019, eq. 8)
    scale        |scale| of the norm after a unit (Liu et al. 2017, network slimming)
    l2_scale     their product: a norm divides weights by their size and multiplies by its scale
    activation   variance of a unit's activations where they are added up
    a function   of the weights of units

>>> import jax.numpy as jnp
>>> from jaxfm.search.trace.groups import network
>>> params = {"up": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "down": jnp.ones((2, 1))}
>>> net = network(lambda p, x: (x @ p["up"]) @ p["down"], params, jnp.ones((1, 2)))
>>> [[round(float(v), 2) for v in x] for x in importance(net, params, "l1")]
[[0.9, 1.1]]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.model import Array, PyTree
from jaxfm.search.activations import summed_statistics
from jaxfm.search.trace.groups import Kept, Network, Scores
from jaxfm.search.trace.unit_weights import SCALE, Term, UnitNorm, average, filled, weight_terms

KINDS = ("l1", "l2", "taylor", "scale", "l2_scale", "activation")


def importance(
    network: Network,
    params: PyTree,
    kind: str | UnitNorm = "l2",
    *,
    gradient: PyTree = None,
    inputs: Sequence[PyTree] = (),
) -> Scores:
    """Returns the importance of every unit; higher matters more.

    A group for which `kind` has no parameter (no norm follows it, for "scale") is ranked by l2.

    Args:
      network: whose units are ranked.
      params: its dense parameters.
      kind: one of `KINDS`, or a function `(weights f32[n, ...]) -> f32[n]` of the weights of n
        units, such as `lambda w: jnp.abs(w).max(tuple(range(1, w.ndim)))`.
      gradient: for "taylor", the gradient of a loss by the parameters.
      inputs: for "activation", a batch of what the function takes.
    Raises:
      ValueError: an unknown kind, a kind whose `gradient` or `inputs` are missing, "scale" for a
        network without norms, or parameters that are not finite (by name).
    """
    scores = _scores(network, params, kind, gradient, inputs)
    check_scores(network, scores, params, gradient)
    return scores


def check_scores(
    network: Network, scores: Scores, params: PyTree = None, gradient: PyTree = None
) -> None:
    """Raises ValueError where units cannot be ranked by scores that are not finite.

    The message names the parameter that holds such numbers, if one does. Traced scores pass.
    """
    if any(isinstance(x, jax.core.Tracer) for x in scores):
        return
    wrong = [g.name for g, x in zip(network.groups, scores) if not np.isfinite(x).all()]
    if not wrong:
        return
    cause = "their scores are not finite."
    for what, tree in (("parameter", params), ("gradient of the parameter", gradient)):
        leaves = zip(network.leaves, jax.tree.leaves(tree))
        bad = next((leaf.path for leaf, x in leaves if not np.isfinite(x).all()), None)
        if bad is not None:
            cause = f"the {what} {bad!r} holds numbers that are not finite."
            break
    raise ValueError(f"The units of {wrong[0]!r} cannot be ranked: {cause}")


def _scores(
    network: Network, params: PyTree, kind: str | UnitNorm, gradient: PyTree,
    inputs: Sequence[PyTree],
) -> Scores:  # fmt: skip
    """The importance of every unit, not checked."""
    if not callable(kind) and kind not in KINDS:
        raise ValueError(
            f"importance={kind!r} is unknown; choose from {KINDS}, or give a function of the "
            "weights of units."
        )
    if kind == "activation":
        if not inputs:
            raise ValueError("importance='activation' needs `inputs`: give a batch of examples.")
        terms = _activation(network, params, inputs)
        return filled(network, params, average(network, terms))
    if kind == "taylor" and gradient is None:
        raise ValueError(
            "importance='taylor' needs `gradient`: give that of a loss by the parameters."
        )
    if kind == "l2_scale":
        norms, scales = (
            average(network, weight_terms(network, params, k)) for k in ("l2", "scale")
        )
        both = [n if s is None or n is None else n * s for n, s in zip(norms, scales, strict=True)]
        return filled(network, params, both)
    terms = weight_terms(network, params, kind, gradient)
    if not terms:
        raise ValueError(
            f"importance={kind!r} finds no parameter to rank by in this network; choose 'l2'."
        )
    return filled(network, params, average(network, terms))


def has_scales(network: Network) -> bool:
    """Whether the scale of a norm follows any unit, so that "scale" can rank by it."""
    scale = lambda leaf: SCALE.search(leaf.path) and any(a.shape[1] for a in leaf.axes)
    return any(scale(leaf) for leaf in network.leaves)


def ranks(scores: Scores) -> Scores:
    """Returns i32 like the scores: 0 for the most important unit of a group (per layer), then 1."""
    return tuple(jnp.argsort(jnp.argsort(-s, axis=-1), axis=-1).astype(jnp.int32) for s in scores)


def masks(order: Scores, counts: Array) -> tuple[Array, ...]:
    """Returns bool masks of the first counts[g] units by rank; `counts` i32[G] may be traced."""
    return tuple(rank < counts[g] for g, rank in enumerate(order))


def keep(order: Scores, counts: Any) -> Kept:
    """Returns what `masks` does as NumPy arrays, for `cut` and `sliced`."""
    counts = np.asarray(counts)
    return tuple(np.asarray(rank) < counts[g] for g, rank in enumerate(order))


def _activation(network: Network, params: PyTree, inputs: Sequence[PyTree]) -> list[Term]:
    variance = lambda values, axes: jnp.var(values, axis=axes)
    found = summed_statistics(network, params, variance, *inputs)
    return [(axis, rate, rate.ndim > 1) for axis, rate in found]


Score = Callable[[PyTree], Array]


def gradient(score: Score, params: PyTree) -> PyTree:
    """Returns the gradient of a scalar by the trained leaves of `params`; zeros for integers."""
    grads = jax.grad(score, allow_int=True)(params)
    wide = lambda g, p: g if g.dtype == p.dtype else jnp.zeros_like(p)
    return jax.tree.map(wide, grads, params)
