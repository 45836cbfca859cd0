"""Sums and the quotients by their sizes, noted while a graph is read.

A mean is a sum that is divided by the number of its terms. Where a cut axis is summed, that number
changes; any other constant stays what it was.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxfm.search.trace.graph import Atom, Graph, Op, numbers
from jaxfm.search.trace.reading import Context, Divisor

_SEEN_THROUGH = ("broadcast_in_dim", "reshape", "convert_element_type", "squeeze", "copy")


def note_sums(c: Context, op: Op) -> None:
    """Notes in the reading what is a sum, and what is a quotient by the size of one."""
    to = c.to
    sources = numbers(op.inputs)
    if op.name == "reduce_sum" and sources:
        axes = c.axes(sources[0])
        earlier = to.summed.get(sources[0], ())
        to.summed[op.outputs[0]] = (*earlier, *(axes[d] for d in op.params["axes"]))
    elif op.name == "dot_general" and len(sources) == 2 and sources[0] == sources[1]:
        (contracted, other), _ = op.params["dimension_numbers"]
        if contracted == other:  # a sum of squares
            axes = c.axes(sources[0])
            to.summed[op.outputs[0]] = tuple(axes[d] for d in contracted)
    elif op.name in _SEEN_THROUGH and sources and sources[0] in to.summed:
        to.summed[op.outputs[0]] = to.summed[sources[0]]
    elif op.name in ("div", "mul"):
        for i, atom in enumerate(op.inputs):
            other = op.inputs[1 - i]
            factor = _constant(c, other)
            if not isinstance(atom, int) or atom not in to.summed or factor is None:
                continue
            if op.name == "div" and i == 1:
                continue
            axes_of_sum = to.summed[atom]
            size = math.prod(map(len, axes_of_sum))
            wanted = float(size) if op.name == "div" else 1.0 / size
            if size > 1 and math.isclose(factor, wanted, rel_tol=1e-6):
                to.divisors[op.outputs[0]] = Divisor(axes_of_sum)


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
