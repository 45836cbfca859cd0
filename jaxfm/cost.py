"""What a function costs, counted in its jaxpr: no list of layers, no compilation.

>>> import jax, jax.numpy as jnp
>>> x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
>>> count_flops(lambda x: x @ x.T, x)
2048
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from jaxfm.model import PyTree


def count_flops(function: Callable, *args, **kwargs) -> int:
    """Returns the FLOPs of all matrix products and convolutions; a multiply-add is two.

    A `scan` counts as often as it runs; a `while` loop, whose length is not known, counts once (so
    a client's program counts as one of its local steps); a `cond` counts its costliest branch.

    Args:
      function: any traceable function.
      *args, **kwargs: arrays or `jax.ShapeDtypeStruct`s.
    """
    return _flops(jax.make_jaxpr(function)(*args, **kwargs).jaxpr)


def loop_flops(function: Callable, *args, **kwargs) -> int:
    """Returns the FLOPs inside `while` loops: of a client's program, those of one local step."""
    return _loop_flops(jax.make_jaxpr(function)(*args, **kwargs).jaxpr)


def loop_bytes(function: Callable, *args, **kwargs) -> int:
    """Returns the bytes that the largest loop carries from step to step.

    Of a training loop these are parameters, optimizer state and statistics together.
    """
    return _loop_bytes(jax.make_jaxpr(function)(*args, **kwargs).jaxpr)


def num_bytes(tree: PyTree) -> int:
    """Returns the bytes of all arrays (or shapes) in a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _flops(jaxpr: Jaxpr) -> int:
    return sum(_equation_flops(eqn) for eqn in jaxpr.eqns)


def _equation_flops(eqn: JaxprEqn) -> int:
    name = eqn.primitive.name
    if name == "dot_general":
        (contracting, _), _ = eqn.params["dimension_numbers"]
        left: Any = eqn.invars[0].aval
        return 2 * _count(eqn.outvars[0]) * math.prod(left.shape[i] for i in contracting)
    if name == "conv_general_dilated":
        kernel: Any = eqn.invars[1].aval
        outputs = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2 * _count(eqn.outvars[0]) * kernel.size // outputs
    return body_flops(name, eqn.params)


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """Returns how many of a `scan`'s inputs are constants, and how many are carried.

    Its parameters name both numbers up to JAX 0.12.0; later they are trees of the inputs.
    """
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def body_flops(name: str, params: dict[str, Any]) -> int:
    """Returns the FLOPs of the jaxprs that a primitive calls; 0 if it calls none."""
    inner = [_flops(jaxpr) for jaxpr in _inner(params)]
    if name == "cond":
        return max(inner)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _loop_flops(jaxpr: Jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        inner = [0, *map(_loop_flops, _inner(eqn.params))]
        name = eqn.primitive.name
        if name == "while":
            total += _equation_flops(eqn)
        elif name == "cond":
            total += max(inner)
        else:
            total += sum(inner) * (eqn.params["length"] if name == "scan" else 1)
    return total


def _loop_bytes(jaxpr: Jaxpr) -> int:
    most = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "while":
            most = max(most, sum(_size(var.aval) for var in eqn.outvars))
        elif eqn.primitive.name == "scan":
            carried = eqn.outvars[: scan_counts(eqn.params)[1]]
            most = max(most, sum(_size(var.aval) for var in carried))
        most = max([most, *map(_loop_bytes, _inner(eqn.params))])
    return most


def _count(var: Any) -> int:
    return var.aval.size


def _size(aval: Any) -> int:
    return aval.size * aval.dtype.itemsize


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """Yields the jaxprs that an equation calls."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item
