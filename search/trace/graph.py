"""A function as a flat list of primitive operations, read from its jaxpr.

Calls (`jit`, `custom_jvp`, `custom_vjp`, `remat`, ...) are inlined, `scan` keeps its body, what no
output needs is dropped, and constant scalars and indices are folded. There is no list of layer
types and no code for a particular model: whatever JAX can trace can be read.

>>> import jax, jax.numpy as jnp
>>> graph, values = flatten(lambda w, x: jax.nn.relu(x @ w), jnp.ones((4, 2)), jnp.ones((3, 4)))
>>> [op.name for op in graph.ops]
['dot_general', 'max']
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.extend.core import Literal as JaxLiteral

from jaxfm.cost import scan_counts
from jaxfm.model import PyTree


class Constant(NamedTuple):
    """A value that is known while tracing."""

    value: Any


Atom = int | Constant  # a value by its number, or a constant


class Graph(NamedTuple):
    """Operations in an order in which they can run.

    Attributes:
      ops: the operations.
      inputs: numbers of the arguments.
      consts: arrays that the function closes over, by number.
      outputs: what is returned.
    """

    ops: tuple[Op, ...]
    inputs: tuple[int, ...]
    consts: dict[int, Any]
    outputs: tuple[Atom, ...]


class Op(NamedTuple):
    """One primitive operation.

    Attributes:
      name: name of the primitive, or "permute", which puts the entries of one axis into a constant
        order. It stands for a gather or for a reshape, transposition and reshape (a channel
        shuffle) and has params "axis" and "index".
      primitive: JAX's primitive; None for "permute".
      inputs, outputs: its values.
      params: parameters of the primitive.
      body: the body of a `scan`, else None.
    """

    name: str
    primitive: Any
    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]
    params: dict[str, Any]
    body: Graph | None = None


class Values(NamedTuple):
    """Shapes and dtypes by the number of a value; numbers are shared with all loop bodies.

    Attributes:
      shapes: shape of each value.
      dtypes: dtype of each value.
    """

    shapes: list[tuple[int, ...]]
    dtypes: list[Any]

    def new(self, aval: Any) -> int:
        """Returns the number of a new value."""
        self.shapes.append(tuple(aval.shape))
        self.dtypes.append(aval.dtype)
        return len(self.shapes) - 1


# Primitives that only call a jaxpr, and where they keep it.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "custom_vmap_call": "call",
}


def flatten(
    function: Callable, *args: PyTree, values: Values | None = None
) -> tuple[Graph, Values]:
    """Traces `function(*args)`, arrays or their shapes, and flattens its jaxpr.

    Args:
      values: numbers are taken from it, so that several graphs can share one numbering; None
        begins a new one.
    """
    values = Values([], []) if values is None else values
    closed = jax.make_jaxpr(function)(*args)
    return _read_jaxpr(closed.jaxpr, closed.consts, values), values


def _read_jaxpr(jaxpr: Jaxpr, consts: Sequence[Any], values: Values) -> Graph:
    env: dict[Any, Atom] = {}
    inputs = tuple(values.new(var.aval) for var in jaxpr.invars)
    env.update(zip(jaxpr.invars, inputs, strict=True))
    held: dict[int, Any] = {}
    for var, const in zip(jaxpr.constvars, consts, strict=True):
        env[var] = _constant(const, var.aval, values, held)
    ops: list[Op] = []
    _inline(jaxpr, env, values, ops, held)
    outputs = tuple(_read(env, atom) for atom in jaxpr.outvars)
    ops = _permutations(ops, outputs, values)
    return Graph(_needed(ops, outputs), inputs, held, outputs)


def _plain(value: Any) -> Any:
    """Returns a constant without a mesh; a trace inside `jax.shard_map` would keep its own."""
    if isinstance(value, jax.core.Tracer) or not hasattr(value, "dtype"):
        return value
    return value if jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended) else np.asarray(value)


def _constant(const: Any, aval: Any, values: Values, held: dict[int, Any]) -> Atom:
    const = _plain(const)
    if math.prod(aval.shape) == 1 and not aval.shape:
        return Constant(const)
    number = values.new(aval)
    held[number] = const
    return number


def _read(env: dict[Any, Atom], atom: Any) -> Atom:
    return Constant(_plain(atom.val)) if isinstance(atom, JaxLiteral) else env[atom]


def _inline(jaxpr: Jaxpr, env: dict, values: Values, ops: list[Op], held: dict[int, Any]) -> None:
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        inputs = tuple(_read(env, atom) for atom in eqn.invars)
        inner = eqn.params.get(_CALLS.get(name, ""))
        if inner is not None:
            body, consts = (
                (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, ())
            )
            own: dict[Any, Atom] = dict(zip(body.invars, inputs, strict=True))
            for var, const in zip(body.constvars, consts, strict=True):
                own[var] = _constant(const, var.aval, values, held)
            _inline(body, own, values, ops, held)
            env.update((v, _read(own, a)) for v, a in zip(eqn.outvars, body.outvars, strict=True))
            continue
        folded = _fold(eqn, inputs, held)
        if folded is not None:
            for var, value in zip(eqn.outvars, folded, strict=True):
                env[var] = _constant(value, var.aval, values, held)
            continue
        outputs = tuple(values.new(var.aval) for var in eqn.outvars)
        env.update(zip(eqn.outvars, outputs, strict=True))
        if name == "gather" and (found := _picked(eqn, inputs, outputs, held)) is not None:
            ops.append(found)
            continue
        loop_body, params = None, dict(eqn.params)
        if name == "scan":
            closed = params["jaxpr"]
            loop_body = _read_jaxpr(closed.jaxpr, closed.consts, values)
            params["num_consts"], params["num_carry"] = scan_counts(params)
        ops.append(Op(name, eqn.primitive, inputs, outputs, params, loop_body))


def _fold(eqn: Any, inputs: tuple[Atom, ...], held: dict[int, Any]) -> list[np.ndarray] | None:
    """Returns the values of scalars and indices made from constants; None for any other op."""
    if not inputs or not all(_is_small(var.aval) for var in eqn.outvars):
        return None
    if not all(isinstance(atom, Constant) or atom in held for atom in inputs):
        return None
    known = [atom.value if isinstance(atom, Constant) else held[atom] for atom in inputs]
    if any(isinstance(value, jax.core.Tracer) for value in known):  # of an outer trace
        return None
    with jax.ensure_compile_time_eval():
        return [np.asarray(x) for x in bind(eqn.primitive, known, eqn.params)]


def _is_small(aval: Any) -> bool:
    """Whether a value is a scalar or an array of indices, and not a random key."""
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
        return False
    return aval.shape == () or not jax.dtypes.issubdtype(aval.dtype, np.inexact)


def _picked(eqn: Any, inputs: tuple[Atom, ...], outputs: tuple[int, ...], held) -> Op | None:
    """Returns a gather that picks constant entries of one axis as "permute"; None for others."""
    where, p = eqn.params["dimension_numbers"], eqn.params
    index = held.get(inputs[1]) if isinstance(inputs[1], int) else None
    shape = eqn.invars[0].aval.shape
    if index is None or isinstance(index, jax.core.Tracer):
        return None
    if len(where.collapsed_slice_dims) != 1 or where.operand_batching_dims:
        return None
    (axis,) = where.collapsed_slice_dims
    others = tuple(d for d in range(len(shape)) if d != axis)
    whole = all(p["slice_sizes"][d] == shape[d] for d in others)
    plain = where.start_index_map == (axis,) and where.offset_dims == others and whole
    index = np.asarray(index)
    if not plain or index.ndim != 2 or not ((index >= 0) & (index < shape[axis])).all():
        return None
    params = {"axis": axis, "index": index[:, 0]}
    return Op("permute", None, inputs[:1], outputs, params)


def bind(primitive: Any, inputs: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    """Applies a primitive and returns the list of its results."""
    given = primitive.get_bind_params(params)
    functions, params = given if isinstance(given, tuple) else ((), given)
    out = primitive.bind(*functions, *inputs, **params)
    return list(out) if primitive.multiple_results else [out]


def numbers(atoms: Sequence[Atom]) -> list[int]:
    """Returns those of `atoms` that are not constants."""
    return [atom for atom in atoms if isinstance(atom, int)]


def _needed(ops: list[Op], outputs: Sequence[Atom]) -> tuple[Op, ...]:
    needed = set(numbers(outputs))
    kept: list[Op] = []
    for op in reversed(ops):
        if needed.intersection(op.outputs):
            needed.update(numbers(op.inputs))
            kept.append(op)
    return tuple(reversed(kept))


def _permutations(ops: list[Op], outputs: Sequence[Atom], values: Values) -> list[Op]:
    """Replaces reshape, transpose, reshape by a permutation of one axis where that is the same."""
    uses = Counter(i for op in ops for i in numbers(op.inputs)) + Counter(numbers(outputs))
    maker = {op.outputs[0]: op for op in ops}

    def source(op: Op, name: str) -> Op | None:
        (atom,) = op.inputs[:1]
        if not isinstance(atom, int):
            return None
        made = maker.get(atom)
        return made if made is not None and made.name == name and uses[atom] == 1 else None

    out = []
    for op in ops:
        turn = source(op, "transpose") if op.name == "reshape" and op.inputs else None
        first = source(turn, "reshape") if turn else None
        found = _permutation(op, turn, first, values.shapes) if turn and first else None
        out.append(found or op)
    return out


def _permutation(last: Op, turn: Op, first: Op, shapes: list[tuple[int, ...]]) -> Op | None:
    (source,) = first.inputs
    if not isinstance(source, int) or shapes[source] != shapes[last.outputs[0]]:
        return None
    whole, parts = shapes[source], shapes[first.outputs[0]]
    more = len(parts) - len(whole)
    for axis in range(len(whole)):
        inner = parts[axis : axis + more + 1]
        if (*parts[:axis], whole[axis], *parts[axis + more + 1 :]) != whole:
            continue
        if more < 1 or math.prod(inner) != whole[axis]:
            continue
        order = tuple(turn.params["permutation"])
        outside = list(range(axis)) + list(range(axis + more + 1, len(parts)))
        if any(order[i] != i for i in outside):
            continue
        local = [i - axis for i in order[axis : axis + more + 1]]
        index = np.arange(whole[axis]).reshape(inner).transpose(local).reshape(-1)
        params = {"axis": axis, "index": index}
        return Op("permute", None, (source,), last.outputs, params)
    return None
