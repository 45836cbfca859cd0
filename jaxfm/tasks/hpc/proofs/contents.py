"""What index arrays hold: a function of the array and the sizes alone, as harnesses need it."""

from __future__ import annotations

import math

import numpy as np

from jaxfm.tasks.hpc.program import Array, Expr, Number, Op, Program, Var


def size_of(expr: Expr, sizes: dict[str, int]) -> int:
    """The value of an integer expression of sizes and numbers.

    Raises:
        ValueError: It is no such expression.
    """
    match expr:
        case Number(int(value)):
            return value
        case Var(name) if name in sizes:
            return sizes[name]
        case Op("-", (only,)):
            return -size_of(only, sizes)
        case Op("+" | "-" | "*" | "/" | "%" as name, (left, right)):
            return divided(name, size_of(left, sizes), size_of(right, sizes))
        case Op("min" | "max" as name, args):
            return (min if name == "min" else max)(size_of(a, sizes) for a in args)
        case _:
            raise ValueError(f"{expr} is no size; write it with sizes {sorted(sizes)} and numbers.")


def divided(name: str, left: int, right: int) -> int:
    """+ - * / % of integers, with C's rounding towards zero.

    Raises:
        ValueError: A division by zero.
    """
    if name == "+":
        return left + right
    if name == "-":
        return left - right
    if name == "*":
        return left * right
    if right == 0:
        raise ValueError("An integer is divided by zero.")
    quotient = abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1)
    return quotient if name == "/" else left - right * quotient


def sizes_of(program: Program) -> dict[str, int]:
    """The value of each size."""
    return {size.name: int(size.value) for size in program.sizes}


def contents(array: Array, sizes: dict[str, int]) -> np.ndarray:
    """The elements of an array at the start, in its shape.

    Indices (`content` other than "values") lie in [0, limit). Values are multiples of 1/8 in
    [-2, 2) (of 1 in [0, 16) for integers), so that sums of them are exact in any order.
    """
    shape = tuple(size_of(extent, sizes) for extent in array.shape)
    values: np.ndarray
    k = np.arange(math.prod(shape), dtype=np.int64)
    limit = size_of(array.limit, sizes) if array.limit else max(shape[0], 1)
    if array.content == "permutation":
        step = max(1, int(limit * 0.618))
        while math.gcd(step, limit) > 1:
            step += 1
        values = (k * step + 1) % limit
    elif array.content == "colliding":
        values = (k // 2 * 3 + 1) % limit
    elif array.content == "monotone":
        values = np.minimum(k * 2 // 3, limit - 1)
    else:
        values = (k * 5 + k // 7 + 3) % 16
        if array.dtype in ("double", "float"):
            values = (values * 2 + k % 2) / 8 - 2
    types = {"double": np.float64, "float": np.float32, "int": np.int32, "long": np.int64}
    return values.astype(types[array.dtype]).reshape(shape)
