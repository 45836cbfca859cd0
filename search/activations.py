"""Activations of units: what a network says of its units on examples, where it adds them up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from jaxfm.model import Array, PyTree
from jaxfm.search.trace.graph import Op
from jaxfm.search.trace.groups import Network, Scores
from jaxfm.search.trace.interpret import record
from jaxfm.search.trace.labels import Axis
from jaxfm.search.trace.masking import summed_axes
from jaxfm.search.trace.unit_weights import zero_scores

Statistic = Callable[[Array, Sequence[int]], Array]
"""`(values f32[...], axes) -> f32[n]`: a statistic over `axes`, which are all but one."""


def unit_activity(network: Network, params: PyTree, *inputs: PyTree) -> Scores:
    """Returns how active each unit is: its mean |activation|, relative to its layer.

        s_u = Σ over places  mean |x_u| / mean over the units of mean |x|

    A place is a product, a convolution or a sum of products that adds up the units of a group; the
    network runs dense, with its first function. Jittable; under `vmap` over examples of a batch of
    one each, it gives the activity by example.

    Args:
      network: what `network` or `model_network` returned.
      params: its dense parameters.
      *inputs: what the function takes, with a batch axis; the mean runs over the batch.
    Returns:
      f32[size] of each group, or f32[layers, size]; 0 for groups that are never added up.
    """
    scores = list(zero_scores(network))
    mean = lambda values, axes: jnp.abs(values).mean(axes)
    for axis, rate in summed_statistics(network, params, mean, *inputs):
        for g, group in enumerate(network.groups):
            index, column = np.nonzero((axis >= group.first) & (axis < group.first + group.size))
            if not len(index):
                continue
            # Inside a loop a rate has a leading axis of layers.
            sums = jnp.zeros((*rate.shape[:-1], group.size))
            sums = sums.at[..., axis[index, column] - group.first].add(rate[..., index])
            sums = sums.sum(0) if sums.ndim > scores[g].ndim else sums
            scores[g] += sums / jnp.maximum(sums.mean(-1, keepdims=True), 1e-12)
    return tuple(scores)


def summed_statistics(
    network: Network, params: PyTree, statistic: Statistic, *inputs: PyTree
) -> list[tuple[Axis, Array]]:
    """Returns (axis, statistic of its entries) for every axis of units that a product adds up.

    Inside a loop over layers the statistic has a leading axis of layers.
    """
    plan = network.plan(0, *inputs)

    def labelled(op: Op) -> tuple[int, list[int]]:
        """The operand that holds the units, and its axes of units that are added up."""
        side, dims = summed_axes(op, plan)
        number = op.inputs[side] if op.inputs else None
        if op.name == "reduce_sum" or not isinstance(number, int):
            return side, []
        return side, [d for d in dims if plan.axes[number][d].shape[1]]

    def tap(op: Op, operands: list[Array]) -> tuple[Array, ...]:
        side, dims = labelled(op)
        if not dims:
            return ()
        wide = operands[side].astype(jnp.float32)
        others = lambda d: tuple(i for i in range(wide.ndim) if i != d)
        return tuple(statistic(wide, others(d)) for d in dims)

    found: list[tuple[Axis, Array]] = []
    for op, rates in record(network, params, tap, *inputs):
        side, dims = labelled(op)
        axes = plan.axes[op.inputs[side]] if dims else ()  # type: ignore[index]
        found += [(axes[d], rate) for d, rate in zip(dims, rates, strict=True)]
    return found
