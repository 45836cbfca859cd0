"""Small changes of a right program that may, or may not, give it a race: a proof decides."""

from __future__ import annotations

import random
from collections.abc import Iterator

from jaxfm.tasks.hpc.families.build import plus
from jaxfm.tasks.hpc.program import (
    Assign,
    Block,
    Clause,
    Expr,
    For,
    Number,
    Op,
    Path,
    Pragma,
    Program,
    Ref,
    Standalone,
    Statement,
    Var,
    affine,
    walk,
)
from jaxfm.tasks.hpc.proofs.clauses import replaced, written

SCOPES = ("private", "firstprivate", "lastprivate", "reduction")
TEAM = ("for", "single", "sections")


def mutated(program: Program, rng: random.Random) -> tuple[str, Program] | None:
    """A program with one change drawn at random, and what the change is; None if none applies."""
    found = list(changes(program, rng))
    if not found:
        return None
    kinds = sorted({kind for kind, _, _ in found})
    chosen = rng.choice(kinds)
    kind, path, new = rng.choice([change for change in found if change[0] == chosen])
    result = program._replace(body=replaced(program.body, path, new))
    return kind, longer(result) if kind == "subscript shifted" else result


def changes(
    program: Program, rng: random.Random
) -> Iterator[tuple[str, Path, tuple[Statement, ...]]]:
    """Every place where a change applies: its kind, the path, and the new statements there."""
    arrays = written(program.body)
    for path, statement in walk(program.body):
        pragma = getattr(statement, "pragma", None)
        if isinstance(statement, Standalone):
            yield f"{statement.pragma.directive} dropped", path, ()
        elif isinstance(statement, Assign) and (moved := shifted(statement, arrays, rng)):
            yield "subscript shifted", path, (moved,)
        if not pragma or isinstance(statement, Standalone):
            continue
        if pragma.directive in ("critical", "atomic") and isinstance(statement, Block):
            yield f"{pragma.directive} dropped", path, statement.body
        for changed, kind in directives(statement, pragma):
            yield kind, path, (statement._replace(pragma=changed),)  # type: ignore[call-arg]


def directives(statement: Statement, pragma: Pragma) -> Iterator[tuple[Pragma, str]]:
    """Changes of one directive."""
    for index, clause in enumerate(pragma.clauses):
        rest = (pragma.clauses[:index], pragma.clauses[index + 1 :])
        if clause.name in SCOPES or clause.name == "depend":
            kind = "depend dropped" if clause.name == "depend" else "clause dropped"
            for number in range(len(clause.arguments)):
                left = clause.arguments[:number] + clause.arguments[number + 1 :]
                kept = (clause._replace(arguments=left),) if left else ()
                yield pragma._replace(clauses=(*rest[0], *kept, *rest[1])), kind
    waits = all(clause.name != "nowait" for clause in pragma.clauses)
    if pragma.directive in TEAM and waits:
        yield pragma._replace(clauses=(*pragma.clauses, Clause("nowait"))), "nowait added"
    if isinstance(statement, For) and pragma.directive == "parallel for":
        inner = statement.body[0] if len(statement.body) == 1 else None
        # OpenMP 4.5 collapses only loops whose bounds do not depend on each other.
        if isinstance(inner, For) and not inner.pragma and not pragma.named("collapse"):
            bounds = [affine(bound) for bound in (inner.lower, inner.upper)]
            if all(form and statement.var not in form[0] for form in bounds):
                collapse = Clause("collapse", ("2",))
                yield pragma._replace(clauses=(collapse, *pragma.clauses)), "collapse added"


def shifted(assign: Assign, arrays: set[str], rng: random.Random) -> Assign | None:
    """An assignment with one element moved by one or two; None if it has no such element."""
    target, value, update = assign
    distance = rng.choice((1, 1, 2))
    if isinstance(target, Ref) and rng.random() < 0.4 and not target_only(target):
        return Assign(moved_ref(target, distance, rng), value, update)
    state = [False]

    def visit(expr: Expr) -> Expr:
        match expr:
            case Ref(array, _) if array in arrays and not state[0] and not target_only(expr):
                state[0] = True
                return moved_ref(expr, distance, rng)
            case Op(name, args):
                return Op(name, tuple(visit(argument) for argument in args))
        return expr

    changed = visit(value)
    return Assign(target, changed, update) if state[0] else None


def target_only(ref: Ref) -> bool:
    """Whether an element's subscripts are all numbers or not linear."""
    forms = [affine(subscript) for subscript in ref.subscripts]
    return not all(form is not None and form[0] for form in forms)


def moved_ref(ref: Ref, distance: int, rng: random.Random) -> Ref:
    """An element further along one dimension."""
    axis = rng.randrange(len(ref.subscripts))
    new = list(ref.subscripts)
    form = affine(new[axis])
    match new[axis]:
        case Op() if form and len(form[0]) == 1 and form[1] + distance == 0:
            ((name, c),) = form[0].items()
            new[axis] = Var(name) if c == 1 else Op("*", (Number(c), Var(name)))
        case Op("+" | "-" as sign, (left, Number(int(value)))):
            new[axis] = plus(left, (value if sign == "+" else -value) + distance)
        case other:
            new[axis] = plus(other, distance)
    return Ref(ref.array, tuple(new))


def longer(program: Program) -> Program:
    """A program whose written arrays have room for a shift of two."""
    changed = written(program.body)
    arrays = tuple(
        a._replace(shape=tuple(plus_two(extent) for extent in a.shape)) if a.name in changed else a
        for a in program.arrays
    )
    return program._replace(arrays=arrays)


def plus_two(extent: Expr) -> Expr:
    """An extent and two more."""
    match extent:
        case Number(value):
            return Number(value + 2)
        case Op("+" | "-" as sign, (left, Number(int(value)))):
            return plus(left, (value if sign == "+" else -value) + 2)
    return plus(extent, 2)
