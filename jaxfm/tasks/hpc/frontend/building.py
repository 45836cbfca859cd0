"""A program under construction: which names a loop uses, in which ways, and what speaks against it.

Both languages lower their statements through one `Building`; `finish` turns it into a `Lifted`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from jaxfm.tasks.hpc.frontend.loop import Lifted
from jaxfm.tasks.hpc.frontend.names import Symbol
from jaxfm.tasks.hpc.frontend.reductions import expanded
from jaxfm.tasks.hpc.frontend.source import Outside
from jaxfm.tasks.hpc.program import (
    Array,
    Assign,
    Block,
    Clause,
    Expr,
    For,
    If,
    Number,
    Op,
    Path,
    Pragma,
    Program,
    Ref,
    Scalar,
    Statement,
    Var,
    affine,
    walk,
)
from jaxfm.tasks.hpc.proofs.accesses import places

DEEPEST = 12  # loops in a loop, and branches in them
_COMPARISONS = frozenset(("<", "<=", ">", ">=", "==", "!="))


@dataclasses.dataclass
class Building:
    """What is known of the loop so far.

    Attributes:
        symbols: What each name stands for.
        local: Names that are declared in the loop.
        active: Variables of the loops around the place that is being lowered.
        indices: Variables of all loops so far, in order.
        lines: The line of each statement.
        alias: What a local integer stands for that is only ever its initial value.
        assume: Which doubts the user has settled: "no_alias", "in_bounds".
    """

    assume: frozenset[str] = frozenset()
    symbols: dict[str, Symbol] = dataclasses.field(default_factory=dict)
    local: set[str] = dataclasses.field(default_factory=set)
    active: list[str] = dataclasses.field(default_factory=list)
    indices: list[str] = dataclasses.field(default_factory=list)
    written: set[str] = dataclasses.field(default_factory=set)
    plain: set[str] = dataclasses.field(default_factory=set)
    lines: dict[Path, int] = dataclasses.field(default_factory=dict)
    alias: dict[str, Expr] = dataclasses.field(default_factory=dict)

    def use(self, name: str, symbol: Symbol | None, line: int, *, inner: bool) -> Symbol:
        """Registers a use of a name and returns what it stands for.

        Args:
            name: As it is written.
            symbol: Its declaration.
            line: Of the use.
            inner: Whether it is declared in the loop.
        Raises:
            Outside: It stands for something that is not read, or for two things.
        """
        if symbol is None:
            raise Outside(f"Line {line} uses {name}, which this file does not declare.")
        if symbol.kind == "other":
            raise Outside(f"Line {line} uses {name}, which {symbol.why}.")
        known = self.symbols.setdefault(name, symbol)
        if known.node != symbol.node and not (inner and name in self.local):
            raise Outside(f"{name} is declared twice in or around the loop.")
        if known.node != symbol.node and (known.dtype, known.bits) != (symbol.dtype, symbol.bits):
            raise Outside(f"{name} is declared with two types in the loop.")
        if inner:
            self.local.add(name)
        return symbol

    def index(self, name: str, symbol: Symbol, line: int) -> None:
        """Registers the variable of a loop that begins here."""
        if symbol.kind != "scalar" or symbol.bits < 32:
            raise Outside(f"The loop of line {line} does not count an integer of 32 bits or more.")
        if name in self.active:
            raise Outside(f"The loop of line {line} has the variable of a loop around it.")
        if len(self.active) >= DEEPEST:
            raise Outside(f"Line {line} is deeper than {DEEPEST} loops.")
        self.indices.append(name)

    def read(self, name: str, line: int) -> Var:
        """Reads a scalar."""
        if name in self.indices and name not in self.active:
            raise Outside(f"Line {line} reads {name} outside the loop that counts it.")
        if name not in self.active:
            self.plain.add(name)
        return Var(name)

    def write(self, name: str, line: int) -> None:
        """Writes a scalar."""
        if name in self.active:
            raise Outside(f"Line {line} changes {name}, which a loop counts.")
        if name in self.indices:
            raise Outside(f"Line {line} changes {name}, which another loop counts.")
        self.plain.add(name)
        self.written.add(name)


def finish(
    building: Building,
    loop: For,
    *,
    pragma: Pragma | None,
    used_after: tuple[str, ...],
    private_indices: bool,
    doubts: tuple[str, ...] = (),
) -> Lifted:
    """The program of a loop, with every doubt that its names raise.

    Args:
        building: What lowering the loop has found.
        loop: The loop, without its directive.
        pragma: Its directive.
        used_after: Scalars that may be read after the loop.
        private_indices: Whether inner loops have their own variable without any clause (Fortran).
        doubts: Further ones.
    Raises:
        Outside: A name is used in two ways.
    """
    clash = sorted(set(building.indices) & building.plain)
    if clash:
        raise Outside(f"{clash[0]} is the variable of a loop and an ordinary variable as well.")
    stored = {place.access.name for place in places(loop) if place.access.write}
    for part in (*_parts(loop.lower), *_parts(loop.upper)):
        if isinstance(part, Ref) and part.array in stored:
            raise Outside(f"The bounds of the loop depend on {part.array}, which it writes.")
    hidden = _Hider(building)
    changed = hidden.statement(loop)
    assert isinstance(changed, For)
    loop = changed
    outer = tuple(dict.fromkeys(x for x in building.indices if x not in building.local))
    inner_shared = [] if private_indices else [x for x in outer if x != loop.var]
    sizes, scalars = [], []
    shapes = {v for s in building.symbols.values() for e in s.shape if e for v in _names(e)}
    for name, symbol in building.symbols.items():
        if symbol.kind != "scalar" or (name in building.indices and name not in inner_shared):
            continue
        if symbol.bits and name not in building.written and name not in building.indices:
            sizes.append(Scalar(name, symbol.dtype, 8))
        else:
            scalars.append(Scalar(name, symbol.dtype))
    sizes += [Scalar(v, "int", 8) for v in sorted(shapes - set(building.symbols))]
    arrays = [
        Array(name, tuple(Var(f"extent_{name}") if e is None else e for e in s.shape), s.dtype)
        for name, s in building.symbols.items()
        if s.kind == "array"
    ]
    sizes += [
        Scalar(f"extent_{name}", "int", 64)
        for name, s in building.symbols.items()
        if s.kind == "array" and None in s.shape
    ]
    full = pragma
    if pragma is not None:
        implied = sorted(building.local & {s.name for s in scalars})
        extra = (Clause("private", tuple(implied)),) if implied else ()
        full = pragma._replace(clauses=pragma.clauses + extra)
    program = Program(tuple(sizes), tuple(arrays), tuple(scalars), (loop._replace(pragma=full),))
    doubts = (*doubts, *hidden.doubts, *_aliases(building, program))
    return Lifted(
        program,
        building.lines,
        tuple(sorted(building.local)),
        outer,
        doubts,
        used_after,
        pragma,
        private_indices,
    )


@dataclasses.dataclass
class _Hider:
    """Hides what looks linear but is not from the proof, by the operator "opaque".

    A variable that the loop writes has many values, a real one is no integer, and unsigned
    arithmetic may wrap.
    """

    building: Building
    doubts: list[str] = dataclasses.field(default_factory=list)

    def statement(self, statement: Statement) -> Statement:
        match statement:
            case Assign(target, value):
                if self._rounds(statement):
                    statement = expanded(statement)
                    value = statement.value
                place = self.expr(target)
                assert isinstance(place, (Var, Ref))
                return statement._replace(target=place, value=self.expr(value))
            case If(condition, then, orelse):
                return If(
                    self.condition(condition),
                    tuple(map(self.statement, then)),
                    tuple(map(self.statement, orelse)),
                )
            case For(var, lower, upper, body):
                for bound in (lower, upper):
                    self._bound(var, bound)
                lower, upper = self.expr(lower), self.expr(upper)
                body = tuple(map(self.statement, body))
                return statement._replace(lower=lower, upper=upper, body=body)
            case Block(body=body):
                return statement._replace(body=tuple(map(self.statement, body)))
            case _:
                return statement

    def expr(self, expr: Expr) -> Expr:
        match expr:
            case Ref(array, subscripts):
                return Ref(array, tuple(self._subscript(s) for s in map(self.expr, subscripts)))
            case Op(name, args):
                return Op(name, tuple(map(self.expr, args)))
            case _:
                return expr

    def _rounds(self, update: Assign) -> bool:
        """Whether an integer is updated by real numbers, so that each step rounds."""
        name = update.target.name if isinstance(update.target, Var) else update.target.array
        if not self.building.symbols[name].bits:
            return False
        for part in _parts(update.value):
            match part:
                case Number(float()) | Op("/" | "real" | "sqrt" | "exp" | "pow"):
                    return True
                case Var(inner) | Ref(array=inner):
                    symbol = self.building.symbols.get(inner)
                    if symbol is not None and not symbol.bits:
                        return True
        return False

    def condition(self, expr: Expr) -> Expr:
        if isinstance(expr, Op) and expr.name in ("&&", "||", "!"):
            return Op(expr.name, tuple(map(self.condition, expr.args)))
        inner = self.expr(expr)
        if not isinstance(expr, Op) or expr.name not in _COMPARISONS:
            return Op("opaque", (inner,))
        parts = [_modulo(argument) for argument in expr.args]
        linear = [affine(part) for part in parts]
        if None not in linear and all(map(self._steady, _names(expr))) and self._plain(linear):
            return inner
        # An inequality of real numbers may hold in any iteration; of others nothing is known.
        free = expr.name not in ("==", "!=") and any(map(self._real, _parts(expr)))
        return Op("free" if free else "opaque", (inner,))

    def _plain(self, sides: list) -> bool:
        """Whether a comparison is one of signed numbers, or of sums of unsigned ones."""
        symbols = [self.building.symbols.get(name) for side in sides for name in side[0]]
        signs = {symbol.signed for symbol in symbols if symbol is not None}
        if False not in signs:
            return True
        return signs == {False} and all(min((c, *x.values())) >= 0 for x, c in sides)

    def _real(self, expr: Expr) -> bool:
        name = (
            getattr(expr, "name", None) if isinstance(expr, Var) else getattr(expr, "array", None)
        )
        symbol = self.building.symbols.get(name or "")
        return symbol is not None and not symbol.bits

    def _bound(self, var: str, bound: Expr) -> None:
        moving = sorted(_names(bound) & self.building.written)
        if moving:
            raise Outside(
                f"The bounds of the loop over {var} depend on {moving[0]}, which it writes."
            )
        for name in _names(bound):
            symbol = self.building.symbols.get(name)
            if symbol is not None and symbol.kind == "scalar" and not symbol.bits:
                raise Outside(f"The bounds of the loop over {var} depend on {name}, a real number.")
        if any(isinstance(x, Number) and isinstance(x.value, float) for x in _parts(bound)):
            raise Outside(f"The bounds of the loop over {var} are no integers.")

    def _subscript(self, expr: Expr) -> Expr:
        linear = affine(expr)
        if linear is None:
            self._may_wrap(_names(expr))
            return expr
        if not all(map(self._steady, linear[0])):
            return Op("opaque", (expr,))
        if any(abs(c) != 1 for c in linear[0].values()) or len(linear[0]) > 1:
            self._may_wrap(linear[0])
        return expr

    def _may_wrap(self, names: Iterable[str]) -> None:
        """Notes a doubt if one of the names is an unsigned number of 32 bits."""
        small = sorted(name for name in names if self._small_unsigned(name))
        if small:
            text = f"Unsigned arithmetic with {small[0]} may wrap in a subscript."
            self.doubts += [text] if text not in self.doubts else []

    def _steady(self, name: str) -> bool:
        """Whether a variable is an integer of one value in each iteration."""
        symbol = self.building.symbols.get(name)
        return symbol is None or (bool(symbol.bits) and name not in self.building.written)

    def _small_unsigned(self, name: str) -> bool:
        symbol = self.building.symbols.get(name)
        return symbol is not None and not symbol.signed and symbol.bits == 32


def _aliases(building: Building, program: Program) -> Iterator[str]:
    """One sentence for each pair of names that may share memory, one of them written."""
    if "no_alias" in building.assume:
        return
    stored = {
        s.target.array
        for _, s in walk(program.body)
        if isinstance(s, Assign) and isinstance(s.target, Ref)
    }
    symbols = building.symbols
    arrays = [name for name, s in symbols.items() if s.kind == "array"]
    for one in sorted(stored):
        for other in arrays:
            both = other in stored and other <= one
            if other != one and not both and may_alias(symbols[one], symbols[other]):
                yield f"{one} and {other} may be the same memory."
    pointers = [name for name in arrays if symbols[name].memory == "pointer"]
    for one in pointers:
        for name, symbol in symbols.items():
            changed = one in stored or name in building.written
            reached = symbol.kind == "scalar" and (symbol.taken or symbol.place == "global")
            cast = symbols[one].place in ("local", "static")
            if changed and reached and name not in building.local:
                if not cast and not _same_type(symbols[one], symbol):
                    continue
                yield f"{one} may point to {name}."


def may_alias(one: Symbol, other: Symbol) -> bool:
    """Whether two arrays may share memory.

    A local pointer may have been set to anything. A parameter without `restrict` may point to what
    another parameter points to and to arrays that outlive the function, if the types agree, as C
    demands of an access.
    """
    if any(s.memory == "pointer" and s.place in ("local", "static") for s in (one, other)):
        return True
    if "restrict" in (one.memory, other.memory) or not _same_type(one, other):
        return False
    if one.memory == other.memory == "own":
        return False
    for own, pointer in ((one, other), (other, one)):
        if own.memory == "own" and own.place == "local" and pointer.place == "parameter":
            return False  # it is newer than what the caller has
    return True


def _same_type(one: Symbol, other: Symbol) -> bool:
    return 8 in (one.bits, other.bits) or (one.dtype, one.bits) == (other.dtype, other.bits)


def _parts(expr: Expr) -> Iterator[Expr]:
    yield expr
    match expr:
        case Op(args=inner) | Ref(subscripts=inner):
            for part in inner:
                yield from _parts(part)


def _modulo(expr: Expr) -> Expr:
    """The linear part of a remainder by a constant."""
    match expr:
        case Op("%", (inner, Number(int()))):
            return inner
    return expr


def _names(expr: Expr) -> set[str]:
    """The variables of an expression, those in subscripts included."""
    return {part.name for part in _parts(expr) if isinstance(part, Var)}


names_of = _names
parts_of = _parts
