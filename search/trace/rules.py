"""Reads a graph: which axes of which values must be cut together.

One rule for each primitive, none for a type of layer: `shape_rules`, `sum_rules`, `index_rules`,
and loops here. A primitive without a rule freezes all that it touches and is reported.
"""

from __future__ import annotations

from jaxfm.search.trace import index_rules, shape_rules, sum_rules  # noqa: F401  # they register
from jaxfm.search.trace.graph import Graph, Op, Values
from jaxfm.search.trace.labels import Axis, plain
from jaxfm.search.trace.reading import RULES, Context, Reading, fresh_axis, note_home, rule
from jaxfm.search.trace.sums import note_sums, uniform_values

LOOPED = "a loop runs along it"


def read(graph: Graph, values: Values, to: Reading, depth: int = 0) -> None:
    """Reads a graph into `to`, which holds the axes of the graph's inputs.

    Args:
      graph: what is read, loop bodies included.
      values: shapes of its values.
      to: what is filled.
      depth: how many loops surround the graph.
    """
    for number in graph.consts:
        to.axes[number] = [fresh_axis(n, to.labels) for n in values.shapes[number]]
        note_home(to, to.axes[number], -1)
    context = Context(to, values, uniform_values(graph), depth)
    for op in graph.ops:
        if op.name in RULES:
            axes = RULES[op.name](context, op)
        else:
            to.unknown[op.name] += 1
            axes = context.freeze_all(op)
        to.axes.update(zip(op.outputs, axes, strict=True))
        note_sums(context, op)


@rule("scan")
def _scan(c: Context, op: Op) -> list[list[Axis]]:
    p, body = op.params, op.body
    assert body is not None
    consts, carry = p["num_consts"], p["num_carry"]
    given = [c.axes(atom) for atom in op.inputs]
    for axes in given[: consts + carry]:
        c.alike_everywhere(axes)
    for axes in given[consts + carry :]:
        c.freeze(axes[0], LOOPED)
        if c.depth:
            c.alike_everywhere(axes[1:])
        c.note_home(axes[1:], op.outputs[0] if op.outputs else -1)
    inner = given[: consts + carry] + [axes[1:] for axes in given[consts + carry :]]
    c.to.axes.update(zip(body.inputs, inner, strict=True))
    read(body, c.values, c.to, c.depth + 1)
    results = [c.axes(atom) for atom in body.outputs]
    for first, last in zip(given[consts : consts + carry], results[:carry], strict=True):
        for a, b in zip(first, last, strict=True):
            c.unify(a, b, op)
    for axes in results[carry:]:
        c.alike_everywhere(axes)
    stacked = [[plain(p["length"]), *axes] for axes in results[carry:]]
    return given[consts : consts + carry] + stacked
