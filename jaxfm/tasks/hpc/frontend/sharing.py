"""Which clauses a serial loop needs, and what an existing directive makes of each name."""

from __future__ import annotations

from typing import NamedTuple

from jaxfm.tasks.hpc.frontend.loop import Lifted
from jaxfm.tasks.hpc.frontend.source import Outside
from jaxfm.tasks.hpc.program import (
    Assign,
    Block,
    Clause,
    Expr,
    For,
    If,
    Op,
    Pragma,
    Ref,
    Statement,
    Var,
    walk,
)
from jaxfm.tasks.hpc.proofs.accesses import places

_REDUCTIONS = frozenset(("+", "*", "min", "max", "|", "&", "^"))
OWNING = ("private", "firstprivate", "lastprivate", "reduction")


class Plan(NamedTuple):
    """How the names of a loop are shared.

    Attributes:
        pragma: The directive.
        shared: The names that all threads share.
        doubts: Why the result may differ from the serial one although nothing races.
    """

    pragma: Pragma
    shared: frozenset[str]
    doubts: tuple[str, ...] = ()


def needed(lifted: Lifted) -> Plan:
    """The directive that a serial loop needs, with the fewest clauses.

    A scalar is reduced where the loop only ever updates it by one operator; it is private where
    each iteration writes it before it reads it, and lastprivate where it is read later.
    """
    loop = _loop(lifted)
    flow = _Flow()
    flow.body(loop.body, frozenset())
    written = {p.access.name for p in places(loop) if p.access.write}
    scalars = [s.name for s in lifted.program.scalars if s.name in written]
    private: list[str] = []
    last: list[str] = []
    reduced: dict[str, list[str]] = {}
    doubts: list[str] = []
    for name in scalars:
        live = name in lifted.used_after
        if operator := _reduction(loop, name):
            reduced.setdefault(operator, []).append(name)
        elif name not in flow.exposed:
            if name in lifted.local:
                continue
            (last if live else private).append(name)
            if live and name not in flow.ends:
                doubts.append(f"{name} is read after the loop, which may leave it unset.")
    if loop.var in lifted.index and loop.var in lifted.used_after:
        doubts.append(f"{loop.var}, which the loop counts, is read after it.")
    clauses = [Clause("private", tuple(private))] if private else []
    clauses += [Clause("lastprivate", tuple(last))] if last else []
    clauses += [Clause("reduction", tuple(names), op) for op, names in sorted(reduced.items())]
    pragma = Pragma("parallel for", tuple(clauses))
    return Plan(pragma, _shared(lifted, pragma, loop), tuple(doubts))


def given(lifted: Lifted, pragma: Pragma) -> Plan:
    """What an existing directive makes of the names of its loop.

    Raises:
        Outside: A clause names what the proof does not read.
    """
    loop = _loop(lifted)
    flow = _Flow()
    flow.body(loop.body, frozenset())
    owned = {name for kind in OWNING for name in pragma.named(kind)}
    known = {x.name for x in (*lifted.program.scalars, *lifted.program.sizes)}
    arrays = {x.name for x in lifted.program.arrays}
    for name in sorted(owned):
        if name in arrays or "[" in name:
            raise Outside(f"A clause gives each thread its own {name}, an array.")
    doubts = []
    for name in sorted({*pragma.named("private"), *pragma.named("lastprivate")} & known):
        if name in flow.exposed and name not in pragma.named("firstprivate"):
            doubts.append(f"Each iteration reads its own {name} before it is written.")
    for clause in pragma.clauses:
        if clause.name != "reduction":
            continue
        for name in map(str, clause.arguments):
            own = _reduction(loop, name)
            if name in known and own != clause.modifier and clause.modifier != "-":
                doubts.append(f"The loop does more with {name} than the reduction combines.")
    return Plan(pragma, _shared(lifted, pragma, loop), tuple(doubts))


def _loop(lifted: Lifted) -> For:
    loop = lifted.program.body[0]
    assert isinstance(loop, For)
    return loop


def _shared(lifted: Lifted, pragma: Pragma, loop: For) -> frozenset[str]:
    """Names without storage of each thread's own."""
    owned = {name for kind in OWNING for name in pragma.named(kind)}
    program = lifted.program
    names = {x.name for x in program.arrays}
    names |= {x.name for x in (*program.scalars, *program.sizes)}
    collapse = int(next(iter(pragma.named("collapse")), 1))
    spread, inner = {loop.var}, loop
    while len(spread) < collapse and len(inner.body) == 1 and isinstance(inner.body[0], For):
        inner = inner.body[0]
        spread.add(inner.var)
    return frozenset(names - owned - set(lifted.local) - spread)


def _reduction(loop: For, name: str) -> str:
    """The operator by which a loop updates a scalar, doing nothing else with it; else ""."""
    operators = set()
    for _, statement in walk(loop.body):
        if isinstance(statement, Assign) and statement.target == Var(name):
            operators.add(statement.update)
        if isinstance(statement, Block) or name in _read(statement):
            return ""
    found = operators.pop() if len(operators) == 1 else ""
    return found if found in _REDUCTIONS else ""


def _read(statement: Statement) -> set[str]:
    """The scalars that a statement reads by itself; the target of an update is none of them."""
    match statement:
        case Assign(target, value):
            inner = target.subscripts if isinstance(target, Ref) else ()
            return _variables(value).union(*map(_variables, inner))
        case If(condition):
            return _variables(condition)
        case For(_, lower, upper):
            return _variables(lower) | _variables(upper)
        case _:
            return set()


def _variables(expr: Expr) -> set[str]:
    match expr:
        case Var(name):
            return {name}
        case Op(args=inner) | Ref(subscripts=inner):
            return set().union(*map(_variables, inner))
        case _:
            return set()


class _Flow:
    """Which scalars an iteration may read before it writes them, and which it surely writes.

    Attributes:
        exposed: Names that may be read first.
        ends: Names that are surely written when an iteration ends.
    """

    def __init__(self) -> None:
        self.exposed: set[str] = set()
        self.ends: frozenset[str] = frozenset()

    def body(self, body: tuple[Statement, ...], known: frozenset[str]) -> frozenset[str]:
        for statement in body:
            known = self.statement(statement, known)
        self.ends = known
        return known

    def statement(self, statement: Statement, known: frozenset[str]) -> frozenset[str]:
        self.exposed |= _read(statement) - known
        match statement:
            case Assign(Var(name), _, update):
                if update and name not in known:
                    self.exposed.add(name)
                return known | {name}
            case If(_, then, orelse):
                return self.body(then, known) & self.body(orelse, known)
            case For(var, _, _, body):
                known = known | {var}
                self.body(body, known)
                return known
            case Block(_, body):
                return self.body(body, known)
            case _:
                return known
