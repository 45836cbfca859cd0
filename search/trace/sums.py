"""Sums and the quotients by their sizes, noted while a graph is read.

A mean is a sum that is divided by the number of its terms; an unbiased variance divides by one
less, a normalised sum by the square root. Where a cut axis is summed, these numbers change; any
other constant stays what it was.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxfm.search.trace.graph import Atom, Graph, Op, numbers
from jaxfm.search.trace.reading import Context, Divisor, Sum

_SEEN_THROUGH = ("broadcast_in_dim", "reshape", "convert_element_type", "squeeze", "copy")


def note_sums(c: Context, op: Op) -> None:
    """Notes in the reading what is a sum, and what is a quotient by the size of one."""
    to = c.to
    sources = numbers(op.inputs)
    first = to.summed.get(sources[0]) if sources else None
    if op.name == "reduce_sum" and sources:
        axes = c.axes(sources[0])
        earlier = first.axes if first is not None and first.power == 1 else ()
        to.summed[op.outputs[0]] = Sum((*earlier, *(axes[d] for d in op.params["axes"])), 1.0)
    elif op.name == "dot_general" and len(sources) == 2 and sources[0] == sources[1]:
        (contracted, other), _ = op.params["dimension_numbers"]
        if contracted == other:  # a sum of squares
            axes = c.axes(sources[0])
            to.summed[op.outputs[0]] = Sum(tuple(axes[d] for d in contracted), 1.0)
    elif op.name in _SEEN_THROUGH and first is not None:
        to.summed[op.outputs[0]] = first
    elif op.name == "sqrt" and first is not None:
        to.summed[op.outputs[0]] = first._replace(power=first.power / 2)
    elif op.name in ("div", "mul"):
        for i, atom in enumerate(op.inputs):
            factor = _constant(c, op.inputs[1 - i])
            if not isinstance(atom, int) or atom not in to.summed or not factor:
                continue
            if op.name == "div" and i == 1:
                continue
            found = _divisor(to.summed[atom], factor if op.name == "div" else 1 / factor)
            if found is not None:
                to.divisors[op.outputs[0]] = found


def _divisor(total: Sum, by: float) -> Divisor | None:
    """The quotient of a power of a sum by a number that follows from the sum's size, if it does.

    Of the sum itself, the size (a mean), one less (ddof=1), or its square root; of the square root
    of a sum, the square roots of these.
    """
    size = math.prod(map(len, total.axes))
    ways = [(1.0, 0), (1.0, 1), (0.5, 0)] if total.power == 1 else [(0.5, 0), (0.5, 1)]
    for power, less in ways if total.power >= 0.5 else []:
        if size - less > 1 and math.isclose(by, (size - less) ** power, rel_tol=1e-6):
            return Divisor(total.axes, power, less)
    return None


def _constant(c: Context, atom: Atom) -> float | None:
    if isinstance(atom, int):
        return c.uniform.get(atom)
    return _number(atom.value)


def _number(value: Any) -> float | None:
    """Returns a known scalar as a float, and None for anything else."""
    real = jnp.issubdtype(jnp.result_type(value), jnp.number)
    return float(value) if np.ndim(value) == 0 and real else None


def uniform_values(graph: Graph) -> dict[int, float]:
    """Returns, by value, the one number that a value is known to hold everywhere."""
    found: dict[int, float] = {}
    for op in graph.ops:
        if op.name in ("broadcast_in_dim", "reshape", "convert_element_type") and op.inputs:
            (atom,) = op.inputs[:1]
            if isinstance(atom, int):
                if atom in found:
                    found[op.outputs[0]] = found[atom]
            elif (number := _number(atom.value)) is not None:
                found[op.outputs[0]] = number
    return found
