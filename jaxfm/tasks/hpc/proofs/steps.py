"""Statements as closures over a `Machine`: the serial part of the enumeration.

A closure runs its statement once and records every access of a name that the program writes.
Integers are computed; values of other types are not: a condition on them may be true or false, so
both branches run, and what only one of them writes is not known afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxfm.tasks.hpc.program import (
    Access,
    Assign,
    Block,
    Expr,
    For,
    If,
    Number,
    Op,
    Path,
    Program,
    Ref,
    Standalone,
    Statement,
    Var,
    affine,
    dtypes,
    is_integer,
    walk,
)
from jaxfm.tasks.hpc.proofs.contents import contents, divided, size_of, sizes_of
from jaxfm.tasks.hpc.proofs.machine import Machine, Unknown, Who

MAX_STEPS = 200_000
Step = Callable[[Machine], None]
Value = Callable[[Machine], int | None]
Loops = tuple[str, ...]
COMPARE: dict[str, Callable[[int, int], int]] = {
    "<": lambda a, b: int(a < b),
    "<=": lambda a, b: int(a <= b),
    ">": lambda a, b: int(a > b),
    ">=": lambda a, b: int(a >= b),
    "==": lambda a, b: int(a == b),
    "!=": lambda a, b: int(a != b),
    "min": min,
    "max": max,
}


class Steps:
    """Makes the closures of one program; `directive` runs statements that have a directive."""

    def __init__(self, program: Program, directive: Callable[[Statement, Path, Loops], Step]):
        self.program, self.types, self.directive = program, dtypes(program), directive
        self.sizes = sizes_of(program)
        self.shapes = {
            array.name: tuple(size_of(extent, self.sizes) for extent in array.shape)
            for array in program.arrays
        }
        self.written: set[str] = set()
        for _, statement in walk(program.body):
            if isinstance(statement, Assign):
                target = statement.target
                self.written.add(target.name if isinstance(target, Var) else target.array)
            elif isinstance(statement, For) and statement.var in self.types:
                self.written.add(statement.var)

    def machine(self) -> Machine:
        """The state at the start of the program."""
        names = [*self.shapes, *(scalar.name for scalar in self.program.scalars)]
        values: dict[str, int | None] = dict(self.sizes)
        for scalar in self.program.scalars:
            values[scalar.name] = int(scalar.value) if scalar.dtype in ("int", "long") else None
        machine = Machine({name: k for k, name in enumerate(names)}, values)
        for array in self.program.arrays:
            if array.dtype in ("int", "long"):
                machine.integers[array.name] = contents(array, self.sizes).ravel().tolist()
        return machine

    # Expressions ---------------------------------------------------------------------------------

    def value(self, expr: Expr, path: Path, loops: Loops) -> Value:
        """A closure that computes an expression (None: not known) and records its reads."""
        if not is_integer(expr, self.types):
            return self.touch(expr, path, loops)
        if plain := self.plain(expr):
            return plain
        match expr:
            case Var(name):
                return self.scalar(name, path, loops)
            case Ref():
                return self.element(expr, path, loops)
            case Op("&&" | "||" as op, (left, right)):
                return self.logical(
                    op, self.value(left, path, loops), self.value(right, path, loops)
                )
            case Op(op, (only,)):
                inner = self.value(only, path, loops)
                change = (lambda a: int(not a)) if op == "!" else (lambda a: -a)
                return lambda m: None if (a := inner(m)) is None else change(a)
            case Op(op, (left, right)) if all(is_integer(a, self.types) for a in expr.args):
                first, second = self.value(left, path, loops), self.value(right, path, loops)
                combine = COMPARE.get(op) or (lambda a, b: divided(op, a, b))

                def both(m: Machine) -> int | None:
                    a, b = first(m), second(m)
                    return None if a is None or b is None else combine(a, b)

                return both
            case _:
                return self.touch(expr, path, loops)

    def plain(self, expr: Expr) -> Value | None:
        """A linear expression of loop variables and sizes, fast; None if it is something else."""
        form = affine(expr)
        if form is None or any(name in self.types and name not in self.sizes for name in form[0]):
            return None
        constant = form[1] + sum(c * self.sizes.get(name, 0) for name, c in form[0].items())
        terms = [(name, c) for name, c in form[0].items() if name not in self.sizes]
        if not terms:
            return lambda m: constant
        if len(terms) == 1:
            name, c = terms[0]
            if c == 1:
                return lambda m: m.values[name] + constant  # type: ignore[operator]
            return lambda m: c * m.values[name] + constant  # type: ignore[operator]
        return lambda m: (
            constant
            + sum(
                c * m.values[name]  # type: ignore[operator, misc]
                for name, c in terms
            )
        )

    def touch(self, expr: Expr, path: Path, loops: Loops) -> Value:
        """A closure that records the reads of an expression whose value is not computed."""
        match expr:
            case Var(name) if name in self.written:
                inner = [self.scalar(name, path, loops)]
            case Ref():
                inner = [self.element(expr, path, loops)]
            case Op(args=args):
                inner = [self.value(a, path, loops) for a in args if not isinstance(a, Number)]
            case _:
                inner = []
        if len(inner) == 1:
            only = inner[0]

            def one(m: Machine) -> None:
                only(m)

            return one

        def several(m: Machine) -> None:
            for part in inner:
                part(m)

        return several

    def logical(self, op: str, first: Value, second: Value) -> Value:
        """C's && and ||, whose right side is not computed where the left side decides."""
        decided = 0 if op == "&&" else 1

        def run(m: Machine) -> int | None:
            a = first(m)
            if a is not None and int(bool(a)) == decided:
                return decided
            b = second(m)
            if b is not None and (a is not None or int(bool(b)) == decided):
                return int(bool(b))
            return None

        return run

    def scalar(self, name: str, path: Path, loops: Loops) -> Value:
        """Reads a scalar."""
        who = Who(Access(name, False, path), loops)
        if name not in self.written:
            return lambda m: m.values.get(name)

        def run(m: Machine) -> int | None:
            if name in m.privates:
                m.use(name)
            m.read(m.places[name], 0, who)
            return m.values.get(name)

        return run

    def element(self, ref: Ref, path: Path, loops: Loops) -> Value:
        """Reads an array's element."""
        name, place = ref.array, self.place(ref, path, loops)
        who = Who(Access(name, False, path, ref.subscripts), loops)
        recorded, integer = name in self.written, self.types[name] in ("int", "long")

        def run(m: Machine) -> int | None:
            k = place(m)
            if recorded and k is not None:
                m.read(m.places[name], k, who)
            return m.integers[name][k] if integer and k is not None else None

        return run

    def place(self, ref: Ref, path: Path, loops: Loops) -> Value:
        """The flat index of an element; None, and a note, where a subscript is not known."""
        if ref.array not in self.shapes:
            raise Unknown(f"The array {ref.array} is not declared.")
        shape = self.shapes[ref.array]
        if len(shape) != len(ref.subscripts):
            raise Unknown(f"{ref.array} has {len(shape)} dimensions.")
        parts = [self.value(s, path, loops) for s in ref.subscripts]

        def outside(index: int, extent: int) -> Unknown:
            return Unknown(f"A subscript of {ref.array} is {index}, outside [0, {extent}).")

        if len(parts) == 1:
            only, extent = parts[0], shape[0]

            def one(m: Machine) -> int | None:
                k = only(m)
                if k is None:
                    m.unknown = f"A subscript of {ref.array} is not known."
                elif not 0 <= k < extent:
                    raise outside(k, extent)
                return k

            return one

        def several(m: Machine) -> int | None:
            flat = 0
            for part, extent in zip(parts, shape):
                k = part(m)
                if k is None:
                    m.unknown = f"A subscript of {ref.array} is not known."
                    return None
                if not 0 <= k < extent:
                    raise outside(k, extent)
                flat = flat * extent + k
            return flat

        return several

    # Statements ----------------------------------------------------------------------------------

    def block(self, body: tuple[Statement, ...], path: Path, loops: Loops, first: int = 0) -> Step:
        """Runs statements in order."""
        parts = [self.statement(s, (*path, k), loops) for k, s in enumerate(body, first)]
        if len(parts) == 1:
            return parts[0]

        def run(m: Machine) -> None:
            for part in parts:
                part(m)

        return run

    def statement(self, statement: Statement, path: Path, loops: Loops) -> Step:
        """Runs one statement."""
        match statement:
            case Assign():
                return self.assign(statement, path, loops)
            case If():
                return self.branch(statement, path, loops)
            case For(pragma=None):
                return self.loop(statement, path, loops)
            case For() | Block() | Standalone():
                return self.directive(statement, path, loops)
        raise Unknown(f"{type(statement).__name__} is no statement.")

    def assign(self, assign: Assign, path: Path, loops: Loops) -> Step:
        """Runs an assignment. An update's read of its target is part of the write."""
        target, value, update = assign
        compute = self.value(value, path, loops)
        name = target.name if isinstance(target, Var) else target.array
        exact = self.types.get(name) in ("int", "long") and is_integer(value, self.types)
        combine = COMPARE.get(update) or (lambda a, b: divided(update, a, b))
        if isinstance(target, Ref):
            place = self.place(target, path, loops)
            who = Who(Access(name, True, path, target.subscripts), loops)
            integer = self.types[name] in ("int", "long")

            def store(m: Machine) -> None:
                new = compute(m)
                k = place(m)
                if k is None:
                    if integer:
                        m.integers[name] = [None] * len(m.integers[name])
                    return
                m.write(m.places[name], k, who)
                if integer:
                    old = m.integers[name][k]
                    if update:
                        new = None if old is None or new is None else combine(old, new)
                    m.integers[name][k] = new if exact else None

            return store
        who = Who(Access(name, True, path), loops)

        def put(m: Machine) -> None:
            new = compute(m)
            if update and name in m.privates:
                m.use(name)
            m.write(m.places[name], 0, who)
            if update:
                old = m.values.get(name)
                new = None if old is None or new is None else combine(old, new)
            m.values[name] = new if exact else None
            if name in m.privates:
                m.define(name)

        return put

    def loop(self, loop: For, path: Path, loops: Loops) -> Step:
        """Runs a serial loop, all of whose iterations belong to the current segment."""
        name, inner = loop.var, (*loops, loop.var)
        bounds = self.bounds(loop, path, loops)
        body = self.block(loop.body, path, inner)
        declared, who = name in self.types, Who(Access(name, True, path), loops)

        def run(m: Machine) -> None:
            iterations = bounds(m)
            count(m, len(iterations))
            for i in iterations:
                if declared:
                    m.write(m.places[name], 0, who)
                    m.define(name)
                m.values[name] = i
                body(m)
            if declared:
                # The test that ends the loop has moved the variable past its last value.
                m.values[name] = iterations.start + len(iterations) * iterations.step
                m.define(name)

        return run

    def bounds(self, loop: For, path: Path, loops: Loops) -> Callable[[Machine], range]:
        """The values that a loop's variable takes."""
        if loop.step == 0:
            raise Unknown(f"The loop over {loop.var} has step 0.")
        lower = self.value(loop.lower, path, loops)
        upper = self.value(loop.upper, path, loops)

        def run(m: Machine) -> range:
            a, b = lower(m), upper(m)
            if a is None or b is None:
                raise Unknown(f"A bound of the loop over {loop.var} is not known.")
            return range(a, b, loop.step)

        return run

    def branch(self, branch: If, path: Path, loops: Loops) -> Step:
        """Runs the branch that an integer condition chooses, or both where it is not known."""
        condition = self.value(branch.condition, path, loops)
        then = self.block(branch.then, path, loops)
        orelse = self.block(branch.orelse, path, loops, first=len(branch.then))
        scalars, arrays = set(), set()
        for _, inner in walk((branch,)):
            if isinstance(inner, Assign):
                target = inner.target
                scalars |= {target.name} if isinstance(target, Var) else set()
                arrays |= {target.array} if isinstance(target, Ref) else set()

        def run(m: Machine) -> None:
            chosen = condition(m)
            if chosen is not None:
                (then if chosen else orelse)(m)
                return
            defined, values = set(m.defined), {name: m.values.get(name) for name in scalars}
            then(m)
            after, m.defined = m.defined, defined
            m.values.update(values)
            orelse(m)
            m.defined = m.defined & after
            m.values.update(dict.fromkeys(scalars))
            for name in arrays & m.integers.keys():
                m.integers[name] = [None] * len(m.integers[name])

        return run


def count(m: Machine, iterations: int) -> None:
    """Counts iterations, and gives up where there are more than a proof should take."""
    m.steps += iterations
    if m.steps > MAX_STEPS:
        raise Unknown(f"There are more than {MAX_STEPS} iterations; judge smaller sizes.")
