"""What the names in a source file stand for, in either language."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from jaxfm.tasks.hpc.program import DType, Expr


class Symbol(NamedTuple):
    """A declared name.

    Attributes:
        name: As it is written (in lower case in Fortran).
        kind: "scalar", "array", "constant" (`value` is it), or "other", of which `why` says
            what it is.
        dtype: Of the scalar or of the elements.
        bits: Of an integer, 0 for a floating-point type.
        signed: Whether an integer has a sign.
        shape: Extents of an array as the program's expressions; None where one is not known.
        lower: The first index of each dimension.
        place: "parameter", "local", "static" (its value outlives the function) or "global".
        memory: Of an array, "own" (no other array shares it), "restrict" (nothing else reaches it
            while it is in scope), or "pointer" (other pointers may).
        taken: Whether a pointer to it may exist.
        node: Where it is declared.
        scope: First and last byte of where it is seen.
    """

    name: str
    kind: Literal["scalar", "array", "constant", "other"]
    dtype: DType = "double"
    bits: int = 0
    signed: bool = True
    shape: tuple[Expr | None, ...] = ()
    lower: tuple[Expr | None, ...] = ()
    place: Literal["parameter", "local", "static", "global"] = "local"
    memory: Literal["own", "restrict", "pointer"] = "own"
    taken: bool = False
    value: int | float | None = None
    why: str = ""
    node: Any = None
    scope: tuple[int, int] = (0, 0)


class Type(NamedTuple):
    """A basic type; `why` says why it is none that is read."""

    dtype: DType = "double"
    bits: int = 0
    signed: bool = True
    why: str = ""


_INT, _LONG = Type("int", 32), Type("long", 64)
C_TYPES: dict[str, Type] = {
    "double": Type("double"), "float": Type("float"), "long double": Type("double"),
    "int": _INT, "signed": _INT, "signed int": _INT, "int signed": _INT, "int32_t": _INT,
    "unsigned": Type("int", 32, False), "unsigned int": Type("int", 32, False),
    "uint32_t": Type("int", 32, False),
    "long": _LONG, "long int": _LONG, "long long": _LONG, "long long int": _LONG,
    "signed long": _LONG, "signed long long": _LONG, "int64_t": _LONG, "ptrdiff_t": _LONG,
    "ssize_t": _LONG, "intptr_t": _LONG, "intmax_t": _LONG,
    "unsigned long": Type("long", 64, False), "unsigned long long": Type("long", 64, False),
    "unsigned long int": Type("long", 64, False),
    "unsigned long long int": Type("long", 64, False),
    "long unsigned int": Type("long", 64, False), "long unsigned": Type("long", 64, False),
    "size_t": Type("long", 64, False), "uint64_t": Type("long", 64, False),
    "uintptr_t": Type("long", 64, False),
    "char": Type("int", 8), "signed char": Type("int", 8), "unsigned char": Type("int", 8, False),
    "int8_t": Type("int", 8), "uint8_t": Type("int", 8, False),
    "short": Type("int", 16), "short int": Type("int", 16), "int16_t": Type("int", 16),
    "unsigned short": Type("int", 16, False), "unsigned short int": Type("int", 16, False),
    "uint16_t": Type("int", 16, False), "bool": Type("int", 8, False),
    "_Bool": Type("int", 8, False),
}  # fmt: skip
"""The types of C whose arithmetic is known; a `long` is taken to be of 64 bits."""

# Functions without side effects, by their name in C or Fortran, and their name as an `Op`.
_PLAIN = (
    "sqrt", "exp", "sin", "cos", "fabs", "tan", "asin", "acos", "atan", "atan2", "pow", "log",
    "log2", "log10", "floor", "ceil", "fmod", "cbrt", "hypot", "tanh", "sinh", "cosh", "round",
    "trunc", "exp2", "expm1", "log1p", "erf", "erfc", "fma", "copysign",
)  # fmt: skip
C_FUNCTIONS: dict[str, str] = {
    **{name + end: name for name in _PLAIN for end in ("", "f", "l")},
    **{f"fm{way}{end}": f"m{way}" for way in ("in", "ax") for end in ("", "f", "l")},
    "abs": "fabs", "labs": "fabs", "llabs": "fabs",
}  # fmt: skip
FORTRAN_FUNCTIONS: dict[str, str] = {
    **{name: name for name in _PLAIN if name not in ("fabs", "pow", "floor", "ceil", "fma")},
    **{"d" + name: name for name in ("sqrt", "exp", "sin", "cos", "tan", "log", "atan", "log10")},
    "abs": "fabs", "dabs": "fabs", "iabs": "fabs", "min": "min", "max": "max", "dmin1": "min",
    "dmax1": "max", "amin1": "min", "amax1": "max", "min0": "min", "max0": "max", "mod": "mod",
    "modulo": "modulo", "dmod": "mod", "amod": "mod", "sign": "sign", "dsign": "sign",
    "real": "real", "dble": "real", "float": "real", "sngl": "real", "int": "int", "nint": "int",
    "floor": "int", "ceiling": "int", "aint": "real", "anint": "real", "alog": "log",
    "alog10": "log10", "merge": "merge", "iand": "&", "ior": "|", "ieor": "^",
}  # fmt: skip
