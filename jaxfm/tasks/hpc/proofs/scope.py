"""Storage of a construct's own: the clauses that make names private, and a team's threads."""

from __future__ import annotations

import math
from collections.abc import Iterable

from jaxfm.tasks.hpc.program import Access, Path, Pragma
from jaxfm.tasks.hpc.proofs.machine import Machine, Unknown, Who
from jaxfm.tasks.hpc.proofs.steps import Step, Steps


class Thread:
    """One of the two threads that stand for a team: its segment and its private values."""

    def __init__(self, segment: int, values: dict[str, int | None]) -> None:
        self.segment, self.values = segment, values
        self.children: list[int] = []
        self.depends: dict = {}

    def resume(self, m: Machine) -> None:
        """Makes this thread the running one."""
        m.segment, m.children, m.depends = self.segment, self.children, self.depends
        m.values.update(self.values)

    def pause(self, m: Machine) -> None:
        """Keeps what this thread has done."""
        self.segment, self.children, self.depends = m.segment, m.children, m.depends
        self.values = {name: m.values.get(name) for name in self.values}


class Scope:
    """The clauses of a construct that give names storage of their own."""

    def __init__(
        self, steps: Steps, pragma: Pragma, path: Path, extra: tuple[str, ...] = ()
    ) -> None:
        self.first, self.last = pragma.named("firstprivate"), pragma.named("lastprivate")
        self.reduced = pragma.named("reduction")
        self.private = (*pragma.named("private"), *extra)
        self.names = tuple(dict.fromkeys((*self.private, *self.first, *self.last, *self.reduced)))
        types, written = steps.types, steps.written
        arrays = [name for name in self.names if name in steps.shapes]
        if any(name not in self.reduced for name in arrays):
            raise Unknown(f"The array {arrays[0]} is private, but a private copy has no elements.")
        self.unset = tuple(n for n in (*self.private, *self.last) if n not in self.first)
        self.unset = tuple(n for n in self.unset if n in types)
        self.reading = [Who(Access(n, False, path), ()) for n in self.first if n in written]
        self.ending = [Who(Access(n, True, path), ()) for n in self.last]
        self.combining = [Who(Access(n, True, path), ()) for n in self.reduced]
        self.lengths = {n: math.prod(steps.shapes[n]) for n in arrays}
        self.outer: dict[str, int | None] = {}

    def enter(self, m: Machine) -> tuple:
        """Gives the names private storage; returns what `leave` restores."""
        self.outer = {name: m.places.get(name) for name in self.names}
        saved = (self.outer, {n: m.values.get(n) for n in self.names}, m.privates, m.defined)
        if self.names:
            m.places = {**m.places, **dict.fromkeys(self.names)}
            m.privates = (m.privates - set(self.first) - set(self.reduced)) | set(self.unset)
        for name in self.reduced:
            m.values[name] = None
        return saved

    def leave(self, m: Machine, saved: tuple) -> None:
        """Restores the storage around the construct."""
        if self.names:
            places, values, privates, defined = saved
            m.places = {**m.places, **places}
            changed = {*self.last, *self.reduced}
            m.values.update({n: None if n in changed else v for n, v in values.items()})
            m.privates, m.defined = privates, defined

    def fresh(self, m: Machine) -> None:
        """Forgets private values at the start of an iteration."""
        for name in self.unset:
            if name not in m.defined:
                m.values[name] = None

    def values(self, m: Machine) -> dict[str, int | None]:
        """What each thread of a region begins with."""
        return {n: m.values.get(n) if n in self.first else None for n in self.names}

    def piece(self, m: Machine, run: Step, is_last: bool, names: Iterable[str] = ()) -> None:
        """An iteration or a section, at whose start `names` have values."""
        m.defined = set(names)
        self.fresh(m)
        self.first_reads(m)
        run(m)
        if is_last:
            m.last_defined |= m.defined
            self.last_writes(m)

    def first_reads(self, m: Machine) -> None:
        """`firstprivate` reads the original."""
        for who in self.reading:
            m.read(self.outer[who.access.name], 0, who)

    def last_writes(self, m: Machine) -> None:
        """The thread of the last iteration writes the original of a `lastprivate`."""
        for who in self.ending:
            m.write(self.outer[who.access.name], 0, who)

    def combine(self, m: Machine, start: int) -> None:
        """Partial results of reductions are added to the originals, in some order."""
        if self.combining:
            m.start(start)
        for who in self.combining:
            name = who.access.name
            for element in range(self.lengths.get(name, 1)):
                m.write(self.outer[name], element, who)
