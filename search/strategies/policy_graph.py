"""The graph that a policy reads: contractions are its nodes, channel groups its hyper-edges.

All arrays have static shapes: channel counts are values, never shapes. So a policy is not compiled
again when widths change, and one policy fits any network. The channel nodes of one convolution are
equal, so a motif of 2c + 2 nodes is stored as its quotient of four nodes with multiplicities.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.model import Array, PyTree
from jaxfm.search.trace.cost import contractions, costs, is_trained
from jaxfm.search.trace.graph import Graph, Op, numbers
from jaxfm.search.trace.groups import Network
from jaxfm.search.trace.plan import AxisPlan
from jaxfm.search.trace.unit_weights import l2_scores

OP_FEATURES = 11
GROUP_FEATURES = 6


class PolicyGraph(NamedTuple):
    """A network of O contractions and G groups.

    Attributes:
      ops: f32[O, OP_FEATURES], features of each contraction, on one scale for all networks.
      flow: i32[E, 2], (source, target): the source's result reaches the target directly.
      shortcut: f32[E], 1 where it does so past other contractions (a residual connection).
      member: i32[M, 2], (contraction, group): units of the group occur in the contraction.
      contracted: f32[M], 1 where they are added up (inputs), 0 where they are outputs.
      channels: f32[O], how many terms a contraction adds up in the dense network.
      groups: f32[G, GROUP_FEATURES], features of each group.
      sizes: f32[G], units of each group.
    """

    ops: Array
    flow: Array
    shortcut: Array
    member: Array
    contracted: Array
    channels: Array
    groups: Array
    sizes: Array


def policy_graph(network: Network, params: PyTree) -> PolicyGraph:
    """Returns the graph of a network's first function at its example, with weight statistics."""
    plan = network.plan(0, *network.example)
    found = contractions(plan)
    own, dense = costs(network), network.sizes.astype(np.int64)
    macs = np.asarray(own.each(dense))
    ops, member, channels = [], [], []
    for o, item in enumerate(found):
        summed, out = _sides(plan, item.op)
        position, share = o / max(len(found) - 1, 1), macs[o] / macs.sum() * len(found)
        ops.append(_op_features(plan, item.op, macs[o], share, position))
        channels.append(float(max(1, math.prod(len(a) for a in summed))))
        for axes, role in ((summed, 1.0), (out, 0.0)):
            hit = {g for axis in axes for g in _groups_in(network, axis)}
            member += [(o, g, role) for g in sorted(hit)]
    rows = np.array(member, np.float32).reshape(-1, 3)
    flow, shortcut = _flow(plan, {item.op.outputs[0]: o for o, item in enumerate(found)})
    return PolicyGraph(
        ops=jnp.asarray(ops, jnp.float32),
        flow=jnp.asarray(flow, jnp.int32).reshape(-1, 2),
        shortcut=jnp.asarray(shortcut, jnp.float32),
        member=jnp.asarray(rows[:, :2], jnp.int32),
        contracted=jnp.asarray(rows[:, 2]),
        channels=jnp.asarray(channels, jnp.float32),
        groups=jnp.asarray(_group_features(network, params, macs, rows), jnp.float32),
        sizes=jnp.asarray(network.sizes, jnp.float32),
    )


def _op_features(plan: AxisPlan, op: Op, macs: float, share: float, position: float) -> list[float]:
    """Returns OP_FEATURES numbers: four kinds, logarithms of sizes, share and position."""
    conv = op.name == "conv_general_dilated"
    kernel = op.inputs[1] if conv else min(op.inputs, key=lambda a: a in plan.data)
    shape = plan.values.shapes[kernel] if isinstance(kernel, int) else ()
    taps = [shape[d] for d in op.params["dimension_numbers"].rhs_spec[2:]] if conv else [1]
    stride = max(op.params["window_strides"], default=1) if conv else 1
    groups = op.params.get("feature_group_count", 1)
    both = sum(a in plan.data for a in op.inputs if isinstance(a, int)) == 2
    kind = [conv and groups == 1, conv and groups > 1, not conv and not both, both]
    sizes = [np.log10(macs + 1) / 8, np.log10(np.prod(shape) + 1) / 6, share]
    return [*map(float, kind), *sizes, np.log2(np.prod(taps)) / 4, np.log2(stride), position, 1.0]


def _sides(plan: AxisPlan, op: Op):
    """Returns the axes that a contraction adds up, and the output axes that it makes."""
    axes = plan.axes
    if op.name == "dot_general":
        (contract, _), _ = op.params["dimension_numbers"]
        left = axes[op.inputs[0]] if isinstance(op.inputs[0], int) else ()
        return [left[d] for d in contract] if left else [], list(axes[op.outputs[0]])
    lhs, _, out = op.params["dimension_numbers"]
    assert isinstance(op.inputs[0], int)
    return [axes[op.inputs[0]][lhs[1]]], [axes[op.outputs[0]][out[1]]]


def _groups_in(network: Network, axis: np.ndarray) -> list[int]:
    units = set(np.unique(axis).tolist())
    return [
        g
        for g, group in enumerate(network.groups)
        if units.intersection(range(group.first, group.first + group.size))
    ]


def _group_features(network: Network, params: PyTree, macs, rows) -> np.ndarray:
    sizes = [leaf.shape for leaf in network.leaves]
    total = sum(np.prod(s) for s, leaf in zip(sizes, network.leaves) if is_trained(leaf))
    spread = [np.asarray(s, np.float64).reshape(-1) for s in l2_scores(network, params)]
    out = []
    for g, group in enumerate(network.groups):
        touched = rows[rows[:, 1] == g, 0].astype(int)
        own = [m.leaf for m in group.members if is_trained(network.leaves[m.leaf])]
        held = sum(np.prod(sizes[leaf]) for leaf in own)
        low, high = np.quantile(spread[g], [0.1, 0.9])
        share = macs[np.unique(touched)].sum() / macs.sum()
        out.append(
            [np.log2(group.size) / 10, share, held / total, np.log2(len(group.members)) / 8,
             high - low, spread[g].std()]
        )  # fmt: skip
    return np.array(out)


def _flow(plan: AxisPlan, op_of: dict[int, int]) -> tuple[list[tuple[int, int]], list[float]]:
    """Returns edges from each contraction to the next ones, and which of them are shortcuts."""
    # By value: its sources, and whether each comes by a shortcut.
    reach: dict[int, dict[int, bool]] = {}
    edges: dict[tuple[int, int], bool] = {}

    def visit(graph: Graph) -> None:
        for op in graph.ops:
            ins = [reach.get(i, {}) for i in numbers(op.inputs)]
            merged = {s: any(x.get(s, False) for x in ins) for x in ins for s in x}
            if op.outputs[0] in op_of:
                target = op_of[op.outputs[0]]
                for source, late in merged.items():
                    edges[source, target] = edges.get((source, target), True) and late
                reach[op.outputs[0]] = {target: False}
                continue
            if op.body is not None:
                for inner, outer in zip(op.body.inputs, op.inputs, strict=True):
                    if isinstance(outer, int):
                        reach[inner] = dict(reach.get(outer, {}))
                visit(op.body)
                first, count = op.params["num_consts"], op.params["num_carry"]
                for inner, last in zip(
                    op.body.inputs[first : first + count], op.body.outputs[:count], strict=True
                ):
                    if isinstance(last, int):
                        reach[inner] = reach.get(inner, {}) | reach.get(last, {})
                for out, last in zip(op.outputs, op.body.outputs, strict=True):
                    reach[out] = dict(reach.get(last, {})) if isinstance(last, int) else {}
                continue
            # Where two streams are added, the older one has come by a shortcut.
            added = op.name in ("add", "add_any") and sum(map(bool, ins)) > 1
            newest = max(merged, default=-1)
            for out in op.outputs:
                reach[out] = {s: late or (added and s != newest) for s, late in merged.items()}

    visit(plan.graph)
    return list(edges), [float(late) for late in edges.values()]


def chain(num_layers: int, *, shortcuts: bool = False, width: int = 32) -> PolicyGraph:
    """Returns the graph of a fictitious chain of convolutions, for trying policies out.

    There is one group between each two layers.
    """
    ops = np.zeros((num_layers, OP_FEATURES), np.float32)
    ops[:, 0], ops[:, -1] = 1, 1
    ops[:, -2] = np.linspace(0, 1, num_layers)
    flow = [(i, i + 1) for i in range(num_layers - 1)]
    late = [0.0] * len(flow)
    if shortcuts:
        flow += [(i, i + 2) for i in range(num_layers - 2)]
        late += [1.0] * (num_layers - 2)
    groups = num_layers - 1
    member = [(g, g) for g in range(groups)] + [(g + 1, g) for g in range(groups)]
    features = np.zeros((groups, GROUP_FEATURES), np.float32)
    features[:, 0], features[:, 1] = np.log2(width) / 10, np.linspace(0.1, 0.3, groups)
    return PolicyGraph(
        ops=jnp.asarray(ops),
        flow=jnp.asarray(flow, jnp.int32),
        shortcut=jnp.asarray(late, jnp.float32),
        member=jnp.asarray(member, jnp.int32),
        contracted=jnp.asarray([0.0] * groups + [1.0] * groups),
        channels=jnp.full(num_layers, float(width)),
        groups=jnp.asarray(features),
        sizes=jnp.full(groups, float(width)),
    )


def kept_channels(graph: PolicyGraph, counts: Array) -> Array:
    """Returns f32[O], what each contraction adds up when its groups keep counts f32[G]."""
    op, group = graph.member[:, 0], graph.member[:, 1]
    ratio = jnp.log(jnp.maximum(counts, 1e-3) / graph.sizes)[group] * graph.contracted
    return graph.channels * jnp.exp(jax.ops.segment_sum(ratio, op, len(graph.channels)))


def motif(split: Array, inner: Array, outer: Array, total: Array, channels: Array) -> Array:
    """Returns the mean over 2c + 2 nodes of tanh of one graph convolution on a contraction's star.

    The star is s -> u_1..u_c -> v_1..v_c -> t with self loops and symmetric normalisation by
    in-degree; all u and all v have one feature, so four nodes with multiplicities 1, c, c, 1 give
    what 2c + 2 would. Source: GNN-RL (arXiv 2102.03214), level 1 of its hierarchical graph.

    Args:
      split, inner, outer, total: f32[D], features of s, u, v and t.
      channels: f32[], the number c.
    """
    c = channels
    nodes = (
        (1.0, split),
        (c, inner / 2 + split / jnp.sqrt(2.0)),
        (c, outer / 2 + inner / 2),
        (1.0, total / (c + 1) + c * outer / jnp.sqrt(2 * (c + 1))),
    )
    return sum(n * jnp.tanh(y) for n, y in nodes) / (2 * c + 2)


def spread(graph: PolicyGraph, h: Array) -> Array:
    """Returns one step of symmetric graph convolution along the flow, both ways, f32[O, D].

    h_i' = sum over neighbours j and i itself of h_j / sqrt(d_i d_j). Source: Kipf and Welling 2017.
    """
    source = jnp.concatenate([graph.flow[:, 0], graph.flow[:, 1]])
    target = jnp.concatenate([graph.flow[:, 1], graph.flow[:, 0]])
    degree = 1 + jax.ops.segment_sum(jnp.ones(len(source)), target, len(h))
    scale = jax.lax.rsqrt(degree)[:, None]
    return scale * (jax.ops.segment_sum((h * scale)[source], target, len(h)) + h * scale)


def at_groups(graph: PolicyGraph, h: Array) -> Array:
    """Returns f32[G, 2 D], means of h f32[O, D] over what reads and over what makes a group."""
    op, group = graph.member[:, 0], graph.member[:, 1]
    parts = []
    for weight in (graph.contracted, 1 - graph.contracted):
        total = jax.ops.segment_sum(h[op] * weight[:, None], group, len(graph.sizes))
        count = jax.ops.segment_sum(weight, group, len(graph.sizes))
        parts.append(total / jnp.maximum(count, 1)[:, None])
    return jnp.concatenate(parts, axis=1)
