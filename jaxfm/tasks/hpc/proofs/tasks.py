"""Critical sections, atomics and tasks: what orders or excludes single statements."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from jaxfm.tasks.hpc.program import (
    Assign,
    Block,
    Expr,
    For,
    Path,
    Pragma,
    Ref,
    Var,
    walk,
)
from jaxfm.tasks.hpc.proofs.machine import NOTHING, Machine, Unknown
from jaxfm.tasks.hpc.proofs.scope import Scope
from jaxfm.tasks.hpc.proofs.steps import Loops, Step, Steps

ATOMIC = frozenset({"atomic"})


def locked(steps: Steps, lock: frozenset[str], body, path: Path, loops: Loops) -> Step:
    """Statements inside a critical section."""
    inner = steps.block(body, path, loops)

    def run(m: Machine) -> None:
        outer, m.lock = m.lock, m.lock | lock
        inner(m)
        m.lock = outer

    return run


def atomic(steps: Steps, assign: Assign, pragma: Pragma, path: Path, loops: Loops) -> Step:
    """An atomic update, read or write: only the access of its one place is atomic."""
    kinds = {clause.name for clause in pragma.clauses}
    target, value, _ = assign
    inner = steps.assign(assign, (*path, 0), loops)
    name = target.name if isinstance(target, Var) else target.array
    if any(ref.array == name and ref != target for ref in refs(value)):
        raise Unknown(f"An atomic update of {name} reads another of its elements.")
    if "read" in kinds:
        outer_name = value.name if isinstance(value, Var) else getattr(value, "array", None)
        return atomically(inner, outer_name)
    return atomically(inner, name)


def atomically(inner: Step, name: str | None) -> Step:
    """Runs an assignment whose accesses of one name are atomic."""

    def run(m: Machine) -> None:
        read, write, entry, place = m.read, m.write, m.lock, m.places.get(name or "")

        def guard(record):
            def guarded(where, element, who):
                m.lock = (entry | ATOMIC) if where == place and where is not None else entry
                record(where, element, who)
                m.lock = entry

            return guarded

        m.read, m.write = guard(read), guard(write)  # type: ignore[method-assign]
        try:
            inner(m)
        finally:
            del m.read, m.write

    return run


def task(steps: Steps, block: Block, path: Path, loops: Loops) -> Step:
    """A task: ordered after its creation and the siblings that it depends on."""
    pragma = block.pragma
    body = steps.block(block.body, path, loops)
    depends = [
        (clause.modifier, location(steps, argument, path, loops))
        for clause in pragma.clauses
        if clause.name == "depend"
        for argument in clause.arguments
    ]
    shared, scope = pragma.named("shared"), Scope(steps, pragma, path)
    written = {
        s.target.name
        for _, s in walk(block.body)
        if isinstance(s, Assign) and isinstance(s.target, Var)
    }
    written |= {s.var for _, s in walk(block.body) if isinstance(s, For) and s.var in steps.types}

    def run(m: Machine) -> None:
        created, before = m.segment, m.upto()
        keys = [(modifier, place(m)) for modifier, place in depends]
        for name in shared:
            if m.places.get(name, 0) is None:
                raise Unknown(f"A task shares {name}, which is private around it.")
        for modifier, key in keys:
            writers, readers = m.depends.get(key, (0, 0))
            before |= writers if modifier == "in" else writers | readers
        # Names that are private around a task are copies in it, unless it says otherwise.
        copies = {n: m.values.get(n) for n in written if m.places.get(n, 0) is None}
        outer = m.children, m.depends, m.lock, m.defined, m.privates
        m.children, m.depends, m.lock, m.privates = [], {}, NOTHING, set()
        m.start(before)
        saved = scope.enter(m)
        scope.fresh(m)
        scope.first_reads(m)
        body(m)
        scope.leave(m, saved)
        ended = m.upto()
        m.children, m.depends, m.lock, m.defined, m.privates = outer
        m.values.update(copies)
        m.children.append(ended)
        for group in m.groups:
            group.append(ended)
        for modifier, key in keys:
            writers, readers = m.depends.get(key, (0, 0))
            inside = (writers, readers | ended) if modifier == "in" else (ended, 0)
            m.depends[key] = inside
        m.segment = created
        m.start(m.upto())

    return run


def location(steps: Steps, argument: str | Ref, path: Path, loops: Loops) -> Callable:
    """Where a dependence points to."""
    if isinstance(argument, Ref):
        place = steps.place(argument, path, loops)
        return lambda m: (argument.array, place(m))
    return lambda m: (argument, 0)


def taskwait(m: Machine) -> None:
    """Waits for the tasks that the current task or thread has created."""
    before = m.upto()
    for ended in m.children:
        before |= ended
    m.start(before)


def taskgroup(inner: Step) -> Step:
    """Waits for all tasks that its statements have created, and theirs."""

    def run(m: Machine) -> None:
        m.groups.append([])
        inner(m)
        before = m.upto()
        for ended in m.groups.pop():
            before |= ended
        m.start(before)

    return run


def refs(expr: Expr) -> Iterator[Ref]:
    """The array elements in an expression."""
    if isinstance(expr, Ref):
        yield expr
    for inner in expr.subscripts if isinstance(expr, Ref) else getattr(expr, "args", ()):
        yield from refs(inner)
