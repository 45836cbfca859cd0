"""Least squares: the weights that stay make up for the channels that are cut.

A contracted channel that is cut is replaced by its best linear estimate from those that are kept,

    x ≈ R x_kept,   R = C M (M C M + λI)⁻¹,   C = mean of x xᵀ over examples and positions,

and R moves into the weights: W' = Rᵀ W. So shapes and cost stay the same, and `cut` returns the
repaired small network. Source: He et al. 2017 (channel pruning, arXiv 1707.06168, section
3.1) as AMC uses it (arXiv 1802.03494); here for any contraction with a parameter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfm.model import Array, PyTree
from jaxfm.search.trace.graph import Graph, Op, numbers
from jaxfm.search.trace.groups import Network
from jaxfm.search.trace.interpret import record
from jaxfm.search.trace.masking import group_units
from jaxfm.search.trace.plan import AxisPlan


class _Site(NamedTuple):
    """A product of data with one parameter over an axis that may be cut.

    Attributes:
      leaf: number of the parameter.
      layered: whether the parameter is stacked over the layers of a loop.
      operand: number of the value that holds data.
      axis: its axis that is contracted.
      kernel_axis: the axis of the parameter that is contracted.
      kernel_shape: shape of the parameter as it meets the data, for one layer.
    """

    leaf: int
    layered: bool
    operand: int
    axis: int
    kernel_axis: int
    kernel_shape: tuple[int, ...]


def repair(
    network: Network, params: PyTree, masks: Sequence[Array], *inputs: PyTree, ridge: float = 1e-3
) -> PyTree:
    """Returns parameters of dense shapes whose kept part makes up for what is cut.

    Products whose kernel is not one parameter (or a reshape of one), parameters that are used more
    than once, and grouped convolutions are left as they are.

    Args:
      network: what `network` or `model_network` returned.
      params: its dense parameters.
      masks: bool[size] or bool[layers, size] of each group, traced or not.
      *inputs: a batch of examples.
      ridge: λ as a share of the mean square of the channels.
    """
    plan = network.plan(0, *inputs)
    sites = _sites(network, plan)

    def moments(op: Op, operands: list[Array]) -> PyTree:
        site = sites.get(op.outputs[0])
        if site is None:
            return ()
        side = op.inputs.index(site.operand)
        x = jnp.moveaxis(operands[side].astype(jnp.float32), site.axis, -1)
        x = x.reshape(-1, x.shape[-1])
        return x.T @ x / x.shape[0]

    flat = list(jax.tree.leaves(params))
    for op, moment in record(network, params, moments, *inputs):
        site = sites.get(op.outputs[0])
        if site is None:
            continue
        axis = plan.axes[site.operand][site.axis]
        value = flat[site.leaf]
        layers = value.shape[0] if site.layered else None
        there = group_units(network.groups, masks, layers)[..., axis].all(-1)
        leading = value.shape[:1] if site.layered else ()
        kernel = value.reshape(*leading, *site.kernel_shape)
        repair_one = lambda k, c, m, s=site: _repair_kernel(k, c, m, s.kernel_axis, ridge)
        repaired = (jax.vmap(repair_one) if site.layered else repair_one)(kernel, moment, there)
        flat[site.leaf] = repaired.reshape(value.shape).astype(value.dtype)
    return jax.tree.unflatten(network.treedef, flat)


def _repair_kernel(kernel: Array, moment: Array, there: Array, axis: int, ridge: float) -> Array:
    m = there.astype(jnp.float32)
    kept = moment * m[:, None] * m[None]
    scale = ridge * jnp.trace(moment) / len(m) + 1e-12
    # Rows that are cut get an equation of their own, so that the system stays regular.
    system = kept + jnp.diag(scale * m + (1 - m))
    guess = jnp.linalg.solve(system, (moment * m[None]).T)  # Rᵀ, [kept, all]
    # A kept channel represents itself; only the cut ones are estimated.
    guess = jnp.diag(m) + guess * (1 - m)[None] * m[:, None]
    wide = jnp.moveaxis(kernel.astype(jnp.float32), axis, 0)
    new = jnp.tensordot(guess, wide, axes=1)
    return jnp.moveaxis(new, 0, axis)


def _sites(network: Network, plan: AxisPlan) -> dict[int, _Site]:
    """Returns the sites by the output value of their operation."""
    found: dict[int, _Site] = {}
    uses: Counter[int] = Counter()

    def visit(graph: Graph, leaves: dict[int, tuple[int, bool]]) -> None:
        for op in graph.ops:
            if op.body is not None:
                consts = op.params["num_consts"] + op.params["num_carry"]
                uses.update(leaves[i][0] for i in numbers(op.inputs[:consts]) if i in leaves)
                own = {
                    inner: (leaves[outer][0], True)
                    for inner, outer in zip(
                        op.body.inputs[consts:], op.inputs[consts:], strict=True
                    )
                    if isinstance(outer, int) and outer in leaves and not leaves[outer][1]
                }
                visit(op.body, own)
            elif op.name in ("reshape", "convert_element_type"):
                (source,) = op.inputs[:1]
                if isinstance(source, int) and source in leaves:
                    leaves[op.outputs[0]] = leaves[source]
            else:
                uses.update(leaves[i][0] for i in numbers(op.inputs) if i in leaves)
                site = _site(plan, op, leaves)
                if site is not None:
                    found[op.outputs[0]] = site

    starts = {
        number: (i, False) for i, number in enumerate(plan.graph.inputs[: len(network.leaves)])
    }
    visit(plan.graph, starts)
    # What repairs one use of a parameter spoils the others (a tied embedding).
    return {number: site for number, site in found.items() if uses[site.leaf] == 1}


def _site(plan: AxisPlan, op: Op, leaves: dict[int, tuple[int, bool]]) -> _Site | None:
    pair: Any = None
    if op.name == "conv_general_dilated" and op.params["feature_group_count"] == 1:
        lhs, rhs, _ = op.params["dimension_numbers"]
        pair = (1, lhs[1], rhs[1])
    if op.name == "dot_general":
        (contract, batch) = op.params["dimension_numbers"]
        sides = [s for s in (0, 1) if op.inputs[s] in leaves]
        if len(sides) == 1 and len(contract[0]) == 1 and not batch[0]:
            pair = (sides[0], contract[1 - sides[0]][0], contract[sides[0]][0])
    if pair is None or op.inputs[pair[0]] not in leaves:
        return None
    side, axis, kernel_axis = pair
    operand, kernel = op.inputs[1 - side], op.inputs[side]
    if not isinstance(operand, int) or not plan.axes[operand][axis].shape[1]:
        return None
    leaf, layered = leaves[kernel]  # type: ignore[index]
    return _Site(
        leaf=leaf,
        layered=layered,
        operand=operand,
        axis=axis,
        kernel_axis=kernel_axis,
        kernel_shape=plan.values.shapes[kernel],  # type: ignore[index]
    )
