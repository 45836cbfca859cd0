"""Which `parallel for` makes a serial loop right, and whether a given one is.

Right means: no data race, and the results of the serial loop in every schedule. For a scalar that
the loop writes that leaves few choices. Only updates with one operator: `reduction`. Written before
it is read in every iteration: `private`, or `lastprivate` where its value is read later. Anything
else carries a value from one iteration to the next, and no clause helps; `firstprivate` never does
for a single loop, since a copy that is written keeps what its thread wrote last.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from jaxfm.tasks.hpc.program import (
    Assign,
    Block,
    Clause,
    Expr,
    For,
    If,
    Judgement,
    Op,
    Path,
    Pragma,
    Program,
    Ref,
    Statement,
    Var,
    children,
    walk,
)
from jaxfm.tasks.hpc.proofs.enumeration import TOOL, Trace, trace

SCOPES = ("private", "firstprivate", "lastprivate", "reduction")
REDUCED = {"+": "+", "-": "+", "*": "*", "min": "min", "max": "max"}


class Proposal(NamedTuple):
    """What was found for a loop.

    Attributes:
        pragma: The directive that makes it right with the fewest clauses, or None.
        candidate: The directive that was tried, with its clauses even where they do not suffice.
        trace: The enumeration of the program with the candidate.
        order: A name whose value may depend on the order in which threads enter critical sections;
            empty if there is none.
    """

    pragma: Pragma | None
    candidate: Pragma
    trace: Trace
    order: str = ""


def minimal(program: Program, path: Path = (0,)) -> Pragma | None:
    """The `parallel for` with the fewest clauses that makes a loop right; None if there is none.

    Args:
        program: A program in which the loop is serial.
        path: Where the loop stands.
    """
    return propose(program, path).pragma


def propose(program: Program, path: Path = (0,)) -> Proposal:
    """`minimal`, and what stands in the way where there is none."""
    loop = statement_at(program.body, path)
    if not isinstance(loop, For):
        raise ValueError(f"The statement at {path} is no loop; give the path of a loop.")
    candidate = Pragma("parallel for", tuple(clauses_for(program, path)))
    found = trace(with_pragma(program, path, candidate))
    if found.conflict:
        # Updates of one array with one operator are a reduction of that array.
        name = found.conflict.second.name
        operator = only_updates(loop.body, name)
        if operator and name in {array.name for array in program.arrays}:
            extra = Clause("reduction", (name,), operator)
            candidate = candidate._replace(clauses=(*candidate.clauses, extra))
            found = trace(with_pragma(program, path, candidate))
    private = {*candidate.named("private"), *candidate.named("lastprivate")}
    order = order_matters(program, path, candidate)
    wrong = (
        found.conflict
        or found.unknown
        or order
        or private & found.undefined
        or set(candidate.named("lastprivate")) - found.last_defined
    )
    return Proposal(None if wrong else candidate, candidate, found, order)


def order_matters(program: Program, path: Path, pragma: Pragma) -> str:
    """A name that keeps what the last thread in a critical section left; empty if there is none.

    It is one that two iterations would race for without the critical sections and atomics, other
    than those that are only updated with one operator, whose order does not matter.
    """
    loop = statement_at(program.body, path)
    assert isinstance(loop, For)
    opened = unlocked(loop.body)
    if opened == loop.body:
        return ""
    copied = {name for scope in SCOPES for name in pragma.named(scope)}
    sums = tuple(
        Clause("reduction", (name,), operator)
        for name in sorted(written(loop.body) - copied)
        if (operator := only_updates(loop.body, name))
    )
    changed = loop._replace(body=opened, pragma=pragma._replace(clauses=(*pragma.clauses, *sums)))
    found = trace(program._replace(body=replaced(program.body, path, (changed,))))
    return found.conflict.second.name if found.conflict else ""


def unlocked(body: tuple[Statement, ...]) -> tuple[Statement, ...]:
    """Statements without the critical sections and atomics around them."""
    found: list[Statement] = []
    for statement in body:
        if isinstance(statement, Block) and statement.pragma.directive in ("critical", "atomic"):
            found += unlocked(statement.body)
        elif isinstance(statement, If):
            then, orelse = unlocked(statement.then), unlocked(statement.orelse)
            found.append(statement._replace(then=then, orelse=orelse))
        elif isinstance(statement, (For, Block)):
            found.append(statement._replace(body=unlocked(statement.body)))
        else:
            found.append(statement)
    return tuple(found)


def clauses_for(program: Program, path: Path) -> Iterator[Clause]:
    """The clauses that a loop's scalars call for."""
    loop = statement_at(program.body, path)
    assert isinstance(loop, For)
    later = live_after(program, path)
    private: list[str] = []
    last: list[str] = []
    for scalar in program.scalars:
        name = scalar.name
        if name == loop.var or name not in written(loop.body) or locked(loop.body, name):
            continue
        if operator := only_updates(loop.body, name):
            yield Clause("reduction", (name,), operator)
        else:
            (last if scalar.live or name in later else private).append(name)
    if private:
        yield Clause("private", tuple(private))
    if last:
        yield Clause("lastprivate", tuple(last))


def right(program: Program) -> Judgement:
    """Whether every `parallel for` of a program is right, with the clauses that it has."""
    found = trace(program)
    if found.conflict:
        reason = f"Two iterations may access {found.conflict.first.name} at once."
        return Judgement("refuted", reason, TOOL, found.conflict)
    if found.unknown:
        return Judgement("cannot tell", found.unknown, TOOL)
    for path, loop in walk(program.body):
        if isinstance(loop, For) and loop.pragma and loop.pragma.directive == "parallel for":
            if reason := fault(program, path, loop, loop.pragma, found):
                return Judgement("refuted", reason, TOOL)
            if name := order_matters(program, path, loop.pragma):
                reason = f"The order in which threads change {name} may decide its value."
                return Judgement("cannot tell", reason, TOOL)
        elif getattr(loop, "pragma", None) and not isinstance(loop, Block):
            return Judgement("cannot tell", "There are directives besides `parallel for`.", TOOL)
    return Judgement("confirmed", "It has no race and the results of the serial loop.", TOOL)


def fault(program: Program, path: Path, loop: For, pragma: Pragma, found: Trace) -> str:
    """Why a race-free loop computes something else than the serial one; empty if it does not."""
    changed, later = written(loop.body), live_after(program, path)
    live = later | {scalar.name for scalar in program.scalars if scalar.live}
    last, first = set(pragma.named("lastprivate")), set(pragma.named("firstprivate"))
    for name in (*pragma.named("private"), *last, *first):
        if name not in first and name in (reads(loop) - changed):
            return f"The private copy of {name} is read but never written."
        if name not in changed or name == loop.var:
            continue
        if name in found.undefined:
            return f"An iteration reads {name} before it has written it."
        if name in live and name not in last:
            return f"The value of {name} is read after the loop."
    for name in last - found.last_defined:
        return f"The last iteration may not write {name}."
    if first & changed:
        copies = tuple(c for c in pragma.clauses if c.name != "firstprivate")
        plain = Clause("private", tuple(first - last))
        tried = trace(with_pragma(program, path, pragma._replace(clauses=(*copies, plain))))
        for name in first & changed & tried.undefined:
            return f"The copy of {name} keeps what its thread wrote last."
    for clause in pragma.clauses:
        for name in pragma.named("reduction") if clause.name == "reduction" else ():
            if name not in clause.arguments:
                continue
            operator = only_updates(loop.body, name)
            if name in changed | reads(loop) and operator != REDUCED.get(clause.modifier):
                return f"{name} is not only updated with {clause.modifier}."
    return ""


def only_updates(body: tuple[Statement, ...], name: str) -> str | None:
    """The one operator with which statements update a name, if they do nothing else with it."""
    operators = set()
    for _, statement in walk(body):
        if isinstance(statement, Assign):
            update, value = as_update(statement)
            target = statement.target
            if name_of(target) == name:
                operators.add(REDUCED.get(update, ""))
                inner = target.subscripts if isinstance(target, Ref) else ()
                if any(name in names(e) for e in (value, *inner)):
                    return None
                continue
        if name in own_names(statement):
            return None
    return operators.pop() if len(operators) == 1 and "" not in operators else None


def as_update(assign: Assign) -> tuple[str, Expr]:
    """An assignment's operator and value, where `s = s + x` counts as `s += x`."""
    target, value, update = assign
    if update:
        return update, value
    match value:
        case Op("+" | "-" | "*" | "min" | "max" as op, (left, right)):
            if left == target:
                return op, right
            if right == target and op != "-":
                return op, left
    return "", value


def live_after(program: Program, path: Path) -> set[str]:
    """Names that are read after a loop, or by what surrounds it in a loop."""
    found: set[str] = set()
    for other, statement in walk(program.body):
        if other[: len(path)] == path or path[: len(other)] == other:
            continue
        common = next((k for k, (a, b) in enumerate(zip(other, path)) if a != b), len(path))
        around = [statement_at(program.body, path[:k]) for k in range(1, common + 1)]
        if other > path or any(isinstance(outer, For) for outer in around):
            found |= own_reads(statement)
    return found


def locked(body: tuple[Statement, ...], name: str) -> bool:
    """Whether every access of a name stands in a critical section or an atomic."""
    for statement in body:
        if isinstance(statement, Block) and statement.pragma.directive in ("critical", "atomic"):
            continue
        if name in own_names(statement) or not locked(children(statement), name):
            return False
    return True


def statement_at(body: tuple[Statement, ...], path: Path) -> Statement:
    """The statement at a path."""
    statement = body[path[0]]
    for index in path[1:]:
        statement = children(statement)[index]
    return statement


def replaced(
    body: tuple[Statement, ...], path: Path, new: tuple[Statement, ...]
) -> tuple[Statement, ...]:
    """Statements with others in the place of the one at a path."""
    index, rest = path[0], path[1:]
    if not rest:
        return (*body[:index], *new, *body[index + 1 :])
    inside = body[index]
    if isinstance(inside, If):
        split = len(inside.then)
        if rest[0] < split:
            inner: Statement = inside._replace(then=replaced(inside.then, rest, new))
        else:
            moved = (rest[0] - split, *rest[1:])
            inner = inside._replace(orelse=replaced(inside.orelse, moved, new))
    else:
        inner = inside._replace(body=replaced(children(inside), rest, new))  # type: ignore[call-arg]
    return (*body[:index], inner, *body[index + 1 :])


def with_pragma(program: Program, path: Path, pragma: Pragma | None) -> Program:
    """A program with a directive on the loop at a path."""
    loop = statement_at(program.body, path)
    assert isinstance(loop, For)
    return program._replace(body=replaced(program.body, path, (loop._replace(pragma=pragma),)))


def names(expr: Expr) -> set[str]:
    """The names in an expression."""
    match expr:
        case Var(name):
            return {name}
        case Ref(array, subscripts):
            return {array}.union(*(names(s) for s in subscripts))
        case Op(args=args):
            return set().union(*(names(a) for a in args))
    return set()


def name_of(target: Var | Ref) -> str:
    """The scalar or the array that an assignment writes."""
    return target.name if isinstance(target, Var) else target.array


def own_reads(statement: Statement) -> set[str]:
    """Names that a statement reads, without the statements inside it."""
    match statement:
        case Assign(target, value, update):
            inner = target.subscripts if isinstance(target, Ref) else ()
            own = {name_of(target)} if update else set()
            return own.union(names(value), *(names(s) for s in inner))
        case If(condition):
            return names(condition)
        case For(lower=lower, upper=upper):
            return names(lower) | names(upper)
    return set()


def own_names(statement: Statement) -> set[str]:
    """Names that a statement reads or writes, without the statements inside it."""
    target = {name_of(statement.target)} if isinstance(statement, Assign) else set()
    counter = {statement.var} if isinstance(statement, For) else set()
    return own_reads(statement) | target | counter


def reads(loop: Statement) -> set[str]:
    """Names that statements read."""
    return set().union(*(own_reads(s) for _, s in walk((loop,))))


def written(body: tuple[Statement, ...]) -> set[str]:
    """Names that statements write."""
    found = {name_of(s.target) for _, s in walk(body) if isinstance(s, Assign)}
    return found | {s.var for _, s in walk(body) if isinstance(s, For)}
