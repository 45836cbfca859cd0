"""A judgement for all sizes, by integer sets (isl), where a program's loops are affine.

The enumeration speaks of one choice of sizes. Here sizes are symbols, and the question is whether
any sizes have two iterations that meet: an integer point is a witness, and the empty set a proof.
The sets are made by `conflicts`, which judges the loops of real files in the same way;
here a whole `Program` is judged, with the directives that it has.
"""

from __future__ import annotations

import importlib.util

from jaxfm.tasks.hpc.program import (
    Assign,
    Block,
    Expr,
    For,
    If,
    Judgement,
    Program,
    Ref,
    Standalone,
    Statement,
    Var,
    walk,
)
from jaxfm.tasks.hpc.proofs import conflicts
from jaxfm.tasks.hpc.proofs.clauses import names, written

SCOPES = ("private", "firstprivate", "lastprivate", "reduction")


def available() -> str | None:
    """Why the proof cannot be used, or None."""
    found = importlib.util.find_spec("islpy")
    return None if found else "islpy is not installed; pip install 'jaxfm[hpc]'."


def for_all_sizes(program: Program) -> Judgement:
    """Whether a program has a data race for any sizes, all of them at least 1.

    Returns:
        "confirmed": for no sizes. "refuted": for some; the conflict and the reason name them.
        "cannot tell": there are directives besides `parallel for`, critical and atomic; what is not
        linear, or what the loop itself computes, decides; or the loop stands inside another and
        might race.

    Raises:
        ImportError: islpy is not installed.
    """
    try:
        import islpy as isl
    except ImportError as missing:
        raise ImportError("Integer sets need islpy; pip install 'jaxfm[hpc]'.") from missing
    tool = f"integer sets (isl {isl.version.VERSION_TEXT})"
    tell = lambda verdict, reason, conflict=None: Judgement(verdict, reason, tool, conflict)
    doubt = ""
    for path, statement in walk(program.body):
        pragma = getattr(statement, "pragma", None)
        if pragma is None or pragma.directive in ("critical", "atomic"):
            continue
        if not isinstance(statement, For) or pragma.directive != "parallel for":
            return tell("cannot tell", f"`{pragma.directive}` is not judged for all sizes.")
        if reason := unfit(program, statement):
            doubt = doubt or reason
            continue
        private = {name for scope in SCOPES for name in pragma.named(scope)}
        declared = {x.name for x in program.arrays} | {x.name for x in program.scalars}
        depth = int((pragma.named("collapse") or ("1",))[0])
        found = conflicts.search(statement, frozenset(declared - private), collapse=depth)
        if found.kind == "doubt":
            doubt = doubt or found.reason
        elif found.kind == "race" and len(path) > 1:
            doubt = doubt or "Whether iterations meet depends on the loop around the directive."
        elif found.kind == "race":
            at = ", ".join(f"{name} = {value}" for name, value in found.values)
            name = found.conflict.first.name if found.conflict else ""
            where = f" with {at}" if at else ""
            return tell("refuted", f"Two iterations meet in {name}{where}.", found.conflict)
    if doubt:
        return tell("cannot tell", doubt)
    return tell("confirmed", "No two iterations meet, for any sizes.")


def unfit(program: Program, loop: For) -> str:
    """Why a loop is not described by its sizes and loop variables alone; empty if it is."""
    integers = {s.name for s in program.scalars if s.dtype in ("int", "long")}
    computed = written(loop.body) & (integers | {a.name for a in program.arrays})
    for _, statement in walk((loop,)):
        for expr in deciding(statement):
            for name in names(expr) & computed:
                return f"A subscript, bound or condition depends on {name}, which the loop writes."
        if isinstance(statement, Block) and statement.pragma.directive not in (
            "critical",
            "atomic",
        ):
            return f"`{statement.pragma.directive}` inside a loop is not judged for all sizes."
        if isinstance(statement, Standalone):
            return f"`{statement.pragma.directive}` inside a loop is not judged for all sizes."
    return ""


def deciding(statement: Statement) -> list[Expr]:
    """The subscripts, bounds and conditions of a statement."""
    match statement:
        case Assign(target, value):
            inner = list(target.subscripts) if isinstance(target, Ref) else []
            return [*inner, *subscripts(value)]
        case If(condition):
            return [condition]
        case For(var, lower, upper):
            return [lower, upper, Var(var)]
    return []


def subscripts(expr: Expr) -> list[Expr]:
    """All subscripts in an expression."""
    if isinstance(expr, Ref):
        return [*expr.subscripts, *(s for e in expr.subscripts for s in subscripts(e))]
    return [s for e in getattr(expr, "args", ()) for s in subscripts(e)]
