"""Runs a network's operations dense, masked or sliced.

masked   Shapes and weights are dense; activations are zeroed where a cut axis is contracted or
         summed. Masks may be traced: hundreds of candidates run under one `vmap`, and since no
         weight is batched, candidates fold into the batch (no grouped convolutions).
sliced   Parameters and activations are smaller: an ordinary function to jit, differentiate,
         export and deploy.

Laws: masked == sliced; with everything kept both are the function itself. Where a sum over a cut
axis, be it a plain one or a product of a value with itself (`einsum("nc,nc->n", h, h) / C`), is
divided by C, by C - 1 (ddof=1) or by the square root of C, the number of entries that are left
takes the place of C. So it does where the square root of such a sum is divided by a square root of
C or C - 1. Every other constant stays what it was: a pruned head keeps the temperature that it was
trained with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm.model import Array, PyTree
from jaxfm.search.trace.execution import Dense, Tapped, run_graph
from jaxfm.search.trace.graph import Op
from jaxfm.search.trace.groups import Kept, Network
from jaxfm.search.trace.masking import Masked, group_units
from jaxfm.search.trace.plan import AxisPlan
from jaxfm.search.trace.roles import Group
from jaxfm.search.trace.slicing import Sliced, count_kept, positions, take


def full(network: Network) -> Kept:
    """Returns masks that keep everything."""
    return tuple(np.ones(_mask_shape(group), bool) for group in network.groups)


def _mask_shape(group: Group) -> tuple[int, ...]:
    return (group.size,) if group.layers is None else (group.layers, group.size)


def masked(network: Network, number: int = 0) -> Callable[..., PyTree]:
    """Returns `run(params, masks, *inputs) -> output` at dense shapes.

    `masks` holds bool[size] or bool[layers, size] of each group, traced or not; None runs the dense
    function. `number` picks one of the network's functions.
    """

    def run(params: PyTree, masks: Sequence[Array] | None, *inputs: PyTree) -> PyTree:
        plan = network.plan(number, *inputs)
        leaves = _leaves(network, params, None)
        how = Dense() if masks is None else Masked(plan, network.groups, tuple(masks))
        return _call(network, number, plan, how, leaves, inputs)

    return run


def sliced(network: Network, kept: Kept, number: int = 0) -> Callable[..., PyTree]:
    """Returns `run(small_params, *inputs) -> output` for parameters that `cut` returned."""
    kept = check(network, kept)

    def run(params: PyTree, *inputs: PyTree) -> PyTree:
        plan = network.plan(number, *inputs)
        leaves = _leaves(network, params, kept)
        return _call(network, number, plan, Sliced(plan, network.groups, kept), leaves, inputs)

    return run


def cut(network: Network, params: PyTree, kept: Kept) -> PyTree:
    """Returns the parameters of the kept units only, each array physically sliced."""
    kept = check(network, kept)
    leaves = _leaves(network, params, None)
    small = []
    for leaf, value in zip(network.leaves, leaves, strict=True):
        for d, axis in enumerate(leaf.axes):
            if axis.shape[1]:
                value = take(value, d, positions(axis, network.groups, kept))
        small.append(value)
    return jax.tree.unflatten(network.treedef, small)


def place(network: Network, small: PyTree, kept: Kept) -> PyTree:
    """Returns parameters of dense shapes, with small values in their places and 0 elsewhere.

    This is the adjoint of `cut`.
    """
    dense = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in network.leaves]
    like = jax.tree.unflatten(network.treedef, dense)
    (out,) = jax.linear_transpose(lambda tree: cut(network, tree, kept), like)(small)
    return out


def coverage(network: Network, chosen: Sequence[Array]) -> PyTree:
    """Returns bool arrays like the parameters: which values have all their units.

    Masks may be traced.
    """
    covered = []
    for leaf in network.leaves:
        out = jnp.ones(leaf.shape, bool)
        for d, axis in enumerate(leaf.axes):
            if not axis.shape[1]:
                continue
            used = np.unique(axis)
            own = [
                g for g in network.groups if ((used >= g.first) & (used < g.first + g.size)).any()
            ]
            depth = next((g.layers for g in own if g.layers), None)
            there = group_units(network.groups, chosen, depth)[..., axis].all(-1)
            here = (0, d) if depth else (d,)
            out &= lax.expand_dims(there, [i for i in range(out.ndim) if i not in here])
        covered.append(out)
    return jax.tree.unflatten(network.treedef, covered)


def check(network: Network, kept: Kept) -> Kept:
    """Returns `kept` as NumPy masks.

    Raises:
      ValueError: the wrong number of groups, a mask of the wrong shape, an empty group, or layers
        of one group that keep unequal numbers.
    """
    if len(kept) != len(network.groups):
        raise ValueError(
            f"There are {len(kept)} masks for {len(network.groups)} groups; give one for each."
        )
    out = []
    for group, mask in zip(network.groups, kept, strict=True):
        mask, shape = np.asarray(mask, bool), _mask_shape(group)
        if mask.shape != shape:
            raise ValueError(
                f"The mask of {group.name!r} has shape {mask.shape}, expected {shape}."
            )
        counts = np.atleast_1d(mask.sum(-1))
        if counts.min() == 0:
            raise ValueError(f"Nothing of {group.name!r} is kept; keep at least one unit.")
        if counts.min() != counts.max():
            raise ValueError(
                f"The layers of {group.name!r} keep {counts.tolist()} units; give equal numbers."
            )
        out.append(mask)
    return tuple(out)


def record(
    network: Network, params: PyTree, tap: Callable[[Op, list[Array]], PyTree], *inputs: PyTree
) -> list[tuple[Op, PyTree]]:
    """Runs the dense function and returns what `tap(op, operands)` returns for every operation.

    Results from inside a loop have a leading axis of its steps.
    """
    plan = network.plan(0, *inputs)
    seen: list[tuple[Op, PyTree]] = []
    arguments = [*_leaves(network, params, None), *jax.tree.leaves(inputs)]
    run_graph(plan.graph, arguments, Tapped(tap, seen), None)
    return seen


def _leaves(network: Network, params: PyTree, kept: Kept | None) -> list[Any]:
    flat, treedef = jax.tree.flatten(params)
    if treedef != network.treedef:
        raise ValueError(f"The parameters have structure {treedef}, expected {network.treedef}.")
    for leaf, value in zip(network.leaves, flat, strict=True):
        shape = leaf.shape
        if kept is not None:
            shape = tuple(count_kept(axis, network.groups, kept) for axis in leaf.axes)
        if np.shape(value) != shape:
            raise ValueError(f"{leaf.path} has shape {np.shape(value)}, expected {shape}.")
    return flat


def _call(network, number: int, plan: AxisPlan, how: Any, leaves, inputs: PyTree) -> PyTree:
    units = how.units()
    out = run_graph(plan.graph, [*leaves, *jax.tree.leaves(inputs)], how, units)
    params = jax.tree.unflatten(
        network.treedef, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in network.leaves]
    )
    shapes = jax.eval_shape(network.functions[number], params, *inputs)
    return jax.tree.unflatten(jax.tree.structure(shapes), out)
