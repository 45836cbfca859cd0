"""What a traced function costs, as array expressions of the units that each group keeps.

    size of an axis   = Σ over terms of coefficient · Π kept units of the term's groups
    multiply-adds     = Σ over products and convolutions of Π of the sizes of their axes
    parameters, bytes = Σ over leaves of Π of the sizes of their axes
    activations       = the most bytes that are alive at once, in the order of the graph

The expressions are exact, differentiable and vmappable; NumPy counts are evaluated in float64,
where every integer up to 2^53 is exact. Nothing is compiled, and no layer type is known.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.cost import body_flops
from jaxfm.search.trace.graph import Graph, Op, numbers
from jaxfm.search.trace.groups import Network
from jaxfm.search.trace.labels import Axis, plain
from jaxfm.search.trace.plan import AxisPlan, Leaf
from jaxfm.search.trace.roles import Group

Expression = Callable[[Any], Any]  # (counts [G]) -> a number, or an array of them


class Contraction(NamedTuple):
    """A matrix product or convolution.

    Attributes:
      op: the operation.
      axes: axes whose sizes multiply to its multiply-adds.
      times: how often it runs (in loops over layers).
    """

    op: Op
    axes: tuple[Axis, ...]
    times: int


class Costs(NamedTuple):
    """Costs per example, each `(counts [G]) -> []` of JAX or NumPy arrays.

    Attributes:
      macs: multiply-adds of all products and convolutions.
      parameters: number of trained values.
      parameter_bytes: bytes of all leaves, statistics included.
      activation_bytes: the most bytes of activations that are alive at once.
      each: `(counts) -> [O]`, multiply-adds of each contraction. What `cond` and `while` call is
        frozen; it counts only in `macs`, as in `jaxfm.cost`.
    """

    macs: Expression
    parameters: Expression
    parameter_bytes: Expression
    activation_bytes: Expression
    each: Expression


_STATISTIC = re.compile(r"^(stats|live|masks|batch_stats)/|(^|/)(mean|var)(/value)?$")


def is_trained(leaf: Leaf) -> bool:
    """Whether a parameter is trained: it is neither an integer, a random key nor a statistic.

    Statistics of batch norm are known by their path in `jaxfm.Variables`, in Linen ("batch_stats/")
    and in NNX ("mean", "var").
    """
    return jnp.issubdtype(leaf.dtype, jnp.floating) and not _STATISTIC.search(leaf.path)


def contractions(plan: AxisPlan) -> list[Contraction]:
    """Returns all products and convolutions in the order of the graph, loop bodies included."""
    found: list[Contraction] = []

    def visit(graph: Graph, times: int) -> None:
        for op in graph.ops:
            if op.body is not None:
                visit(op.body, times * op.params["length"])
            elif op.name == "dot_general":
                (contract, _), _ = op.params["dimension_numbers"]
                left = _axes(plan, op.inputs[0])
                summed = tuple(left[d] for d in contract)
                found.append(Contraction(op, (*plan.axes[op.outputs[0]], *summed), times))
            elif op.name == "conv_general_dilated":
                out_spec = op.params["dimension_numbers"].out_spec
                out = [a for d, a in enumerate(plan.axes[op.outputs[0]]) if d != out_spec[1]]
                found.append(Contraction(op, (*out, *_axes(plan, op.inputs[1])), times))

    visit(plan.graph, 1)
    return found


def nominal_macs(network: Network, number: int = 0) -> Expression:
    """Returns `(counts [G]) -> []`: multiply-adds as published counters count them, for comparison.

    Each product counts by what is left of its output; that its input is smaller, too, is ignored
    (AGMC, section 3.3: F(a) = sum of a_l F_l). A network within a budget by this number is not
    within it by its true multiply-adds.
    """
    plan = network.plan(number, *network.example)
    table, found = AxisTable(network.groups), contractions(plan)
    outputs = [plan.axes[c.op.outputs[0]] for c in found]
    left = table.products(outputs, [1.0] * len(found))
    dense = network.sizes.astype(np.int64)
    whole = costs(network, number).each(dense) / left(dense)
    return lambda counts: (left(counts) * whole.astype(left(counts).dtype)).sum()


def _uncut(graph: Graph, times: int = 1) -> float:
    """Returns the multiply-adds of what primitives without a rule call; nothing there is cut."""
    inner = [_uncut(op.body, op.params["length"]) for op in graph.ops if op.body is not None]
    own = [body_flops(op.name, op.params) / 2 for op in graph.ops if op.body is None]
    return times * (sum(inner) + sum(own))


def _axes(plan: AxisPlan, atom: Any) -> tuple[Axis, ...]:
    return plan.axes[atom] if isinstance(atom, int) else tuple(map(plain, np.shape(atom.value)))


def costs(network: Network, number: int = 0) -> Costs:
    """Returns the costs of one of the network's functions at the shapes of its example.

    Multiply-adds and activations are divided by the first axis of the first input, the batch.
    """
    plan = network.plan(number, *network.example)
    table = AxisTable(network.groups)
    first = jax.tree.leaves(network.example)[:1]
    batch = first[0].shape[0] if first and first[0].shape else 1
    found = contractions(plan)
    macs = table.products([c.axes for c in found], [c.times / batch for c in found])
    trained = [x for x in network.leaves if is_trained(x)]
    parameters = table.products([x.axes for x in trained], [1.0] * len(trained))
    width = [float(np.dtype(_concrete(x.dtype)).itemsize) for x in network.leaves]
    held = table.products([x.axes for x in network.leaves], width)
    points, kinds, scales = _alive(plan, len(network.leaves))
    alive = table.products(kinds, [scale / batch for scale in scales])
    fixed = _uncut(plan.graph) / batch
    return Costs(
        lambda counts: macs(counts).sum() + fixed,
        lambda counts: parameters(counts).sum(),
        lambda counts: held(counts).sum(),
        lambda counts: (points @ alive(counts)).max(),
        macs,
    )


def counts_of(network: Network, kept: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the number of units that masks keep, i64[G], per layer."""
    return np.array([np.atleast_2d(mask)[0].sum() for mask in kept], np.int64)


class AxisTable:
    """The sizes of axes and products of them, tabulated once for vectorised evaluation."""

    def __init__(self, groups: tuple[Group, ...]):
        self.groups = groups
        self.group_of = np.full(max((g.first + g.size for g in groups), default=1), len(groups))
        for g, group in enumerate(groups):
            self.group_of[group.first : group.first + group.size] = g

    def terms(self, axis: Axis) -> list[tuple[float, tuple[int, ...]]]:
        """Returns (coefficient, groups) of each term of an axis' size."""
        rows = np.sort(self.group_of[axis], axis=1)
        out = []
        for row, times in Counter(map(tuple, rows.tolist())).items():
            own = tuple(g for g in row if g < len(self.groups))
            out.append((times / math.prod(self.groups[g].size for g in own), own))
        return out

    def products(self, items: Sequence[tuple[Axis, ...]], scales: Sequence[float]) -> Expression:
        """Returns `(counts [G]) -> [N]`, the scaled product of the sizes of each item's axes."""
        constant, place = np.array(scales, np.float64), []
        kinds: dict[Any, tuple[int, Axis]] = {}
        for n, axes in enumerate(items):
            row = []
            for axis in axes:
                if axis.shape[1]:
                    key = (axis.shape, axis.tobytes())
                    row.append(kinds.setdefault(key, (len(kinds) + 1, axis))[0])
                else:
                    constant[n] *= len(axis)
            place.append(row)
        most = max(map(len, place), default=0)
        index = np.array([row + [0] * (most - len(row)) for row in place], np.int32)
        terms: list[list[tuple[float, tuple[int, ...]]]]
        terms = [[(1.0, ())], *(self.terms(axis) for _, axis in kinds.values())]
        # Padded, so that an evaluation gathers, multiplies and sums: no scatter, no matrix product
        # (whose default precision would round counts on some accelerators).
        longest = max(map(len, terms))
        wide = max(len(own) for row in terms for _, own in row)
        coefficient = np.zeros((len(terms), longest))
        of = np.full((len(terms), longest, wide), len(self.groups), np.int32)
        for n, sums in enumerate(terms):
            for t, (factor, own) in enumerate(sums):
                coefficient[n, t] = factor
                of[n, t, : len(own)] = own

        def evaluate(counts: Any) -> Any:
            on_host = isinstance(counts, np.ndarray)
            xp: Any = np if on_host else jnp
            dtype = np.float64 if on_host else jnp.float32
            known = xp.append(xp.asarray(counts, dtype), xp.ones(1, dtype))
            sizes = (xp.asarray(coefficient, dtype) * known[of].prod(-1)).sum(-1)
            return xp.asarray(constant, dtype) * sizes[index].prod(-1)

        return evaluate


def _alive(
    plan: AxisPlan, num_leaves: int
) -> tuple[np.ndarray, list[tuple[Axis, ...]], list[float]]:
    """Returns how many values of each kind are alive [points, kinds], and their axes and bytes."""
    kinds: dict[Any, int] = {}
    items: list[tuple[tuple[Axis, ...], float]] = []

    def kind(number: int) -> int:
        axes = plan.axes[number]
        width = float(np.dtype(_concrete(plan.values.dtypes[number])).itemsize)
        key = (tuple((a.shape, a.tobytes()) for a in axes), width)
        if key not in kinds:
            kinds[key] = len(items)
            items.append((axes, width))
        return kinds[key]

    points: list[Counter] = []

    def visit(graph: Graph, around: Counter, free: set[int]) -> None:
        last: dict[int, int] = {}
        for t, op in enumerate(graph.ops):
            last.update(dict.fromkeys(numbers(op.inputs), t))
        last.update(dict.fromkeys(numbers(graph.outputs), len(graph.ops)))
        alive = {n for n in graph.inputs if n not in free}
        for t, op in enumerate(graph.ops):
            alive.update(op.outputs)
            now = around + Counter(kind(n) for n in alive)
            points.append(now)
            if op.body is not None:
                # What a loop carries is counted outside of it; its layers' parameters are no
                # activations.
                visit(op.body, now, set(op.body.inputs))
            alive = {n for n in alive if last.get(n, -1) > t}

    # Values computed from parameters alone are parameters in another form.
    visit(plan.graph, Counter(), set(plan.graph.inputs[:num_leaves]))
    matrix = np.zeros((len(points), len(items)), np.float32)
    for row, now in zip(matrix, points, strict=True):
        for k, n in now.items():
            row[k] = n
    return np.unique(matrix, axis=0), [axes for axes, _ in items], [width for _, width in items]


def _concrete(dtype: Any) -> Any:
    return np.dtype(np.uint32) if jnp.issubdtype(dtype, jax.dtypes.prng_key) else dtype
