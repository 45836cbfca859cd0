"""Runs a graph operation by operation; what happens to each is up to an interpreter.

An interpreter has `const(number, value, units)`, which prepares a constant array, and `step(op,
inputs, units)`, which returns an operation's outputs. `units` says which units are present, where
an interpreter needs that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxfm.conv import conv2d
from jaxfm.model import Array, PyTree
from jaxfm.search.trace.graph import Constant, Graph, Op, bind


def run_graph(graph: Graph, arguments: Sequence[Any], how: Any, units: Any) -> list[Any]:
    """Runs the operations in order; `units` says which units are present (in this layer)."""
    env: dict[int, Any] = dict(zip(graph.inputs, arguments, strict=True))
    env.update((i, how.const(i, x, units)) for i, x in graph.consts.items())
    read = lambda atom: atom.value if isinstance(atom, Constant) else env[atom]
    for op in graph.ops:
        env.update(zip(op.outputs, how.step(op, list(map(read, op.inputs)), units), strict=True))
    return list(map(read, graph.outputs))


def run_scan(op: Op, inputs: list[Any], how: Any, layered: Any) -> list[Any]:
    """Runs a loop over layers; `layered` holds the units of each layer, or is None."""
    assert op.body is not None
    body = op.body
    run = lambda arguments, units: (run_graph(body, arguments, how, units), ())
    return _loop(op, inputs, layered, run)[0]


def _loop(op: Op, inputs: list[Any], layered: Any, run: Callable) -> tuple[list[Any], PyTree]:
    """Scans `run(arguments, units) -> (outputs, more)`; `more` gets a leading axis of steps."""
    p = op.params
    start, stop = p["num_consts"], p["num_consts"] + p["num_carry"]
    consts, carry, xs = inputs[:start], inputs[start:stop], inputs[stop:]

    def step(carry, x):
        xs, units = x
        out, more = run([*consts, *carry, *xs], units)
        return tuple(out[: p["num_carry"]]), (tuple(out[p["num_carry"] :]), more)

    last, (ys, more) = lax.scan(
        step, tuple(carry), (tuple(xs), layered),
        length=p["length"], reverse=p["reverse"], unroll=p["unroll"],
    )  # fmt: skip
    return [*last, *ys], more


class Dense(NamedTuple):
    """Runs the function itself."""

    def units(self) -> None:
        return None

    def const(self, number: int, value: Any, units: Any) -> Any:
        return value

    def step(self, op: Op, inputs: list[Any], units: Any) -> list[Any]:
        if op.name == "permute":
            return [jnp.take(inputs[0], op.params["index"], axis=op.params["axis"])]
        if op.body is not None:
            return run_scan(op, inputs, self, None)
        return bind(op.primitive, inputs, op.params)


class Tapped(NamedTuple):
    """Runs the function itself and records what `tap` makes of each operation."""

    tap: Callable[[Op, list[Array]], PyTree]
    seen: list[tuple[Op, PyTree]]

    def const(self, number: int, value: Any, units: Any) -> Any:
        return value

    def step(self, op: Op, inputs: list[Any], units: Any) -> list[Any]:
        if op.body is None:
            self.seen.append((op, self.tap(op, inputs)))
            return Dense().step(op, inputs, units)
        ops: list[Op] = []

        def run(arguments: list[Any]) -> tuple[list[Any], list[PyTree]]:
            inner = Tapped(self.tap, [])
            out = run_graph(op.body, arguments, inner, None)  # type: ignore[arg-type]
            ops[:] = [seen_op for seen_op, _ in inner.seen]
            return out, [x for _, x in inner.seen]

        out, found = _loop(op, inputs, None, lambda arguments, _: run(arguments))
        self.seen.extend(zip(ops, found, strict=True))
        return out


def convolve(op: Op, inputs: list[Any], p: dict[str, Any]) -> list[Any]:
    """Convolves; plain convolutions get gradients that stay fast inside compiled loops."""
    x, kernel = inputs
    if _is_plain(p, x, kernel):
        return [conv2d(x, kernel, strides=tuple(p["window_strides"]), padding=p["padding"])]
    return bind(op.primitive, inputs, p)


def _is_plain(p: dict, x: Array, kernel: Array) -> bool:
    layout = tuple(map(tuple, p["dimension_numbers"]))
    ones = tuple(p["lhs_dilation"]) == tuple(p["rhs_dilation"]) == (1, 1)
    nhwc = layout == ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
    same = x.dtype == kernel.dtype and p["preferred_element_type"] in (None, x.dtype)
    return nhwc and ones and same and p["feature_group_count"] == 1 and p["precision"] is None
