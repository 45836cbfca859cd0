"""The state of an enumerated execution: who accessed what, and what is ordered before what.

An execution is cut into segments, pieces of work that one thread does with nothing of another
thread ordered in between: an iteration of a shared loop, a task, a section, the code between two
barriers. `before[s]` is the set of segments that have ended before segment s starts, as the bits of
an integer; two segments of which neither is before the other may run at the same time.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxfm.tasks.hpc.program import Access, Conflict

NOTHING: frozenset[str] = frozenset()


class Race(Exception):
    """Two accesses in no order; ends the enumeration."""

    def __init__(self, conflict: Conflict) -> None:
        self.conflict = conflict
        super().__init__("a race")


class Unknown(Exception):
    """The enumeration met what it cannot decide; the message says what."""


class Who(NamedTuple):
    """An access as it stands in the source, and the loop variables around it."""

    access: Access
    loops: tuple[str, ...]


class Machine:
    """Values of integers, storage of names, segments, and the accesses so far.

    Attributes:
        values: The integer value of each scalar and loop variable; None where it is not known.
        places: Where a scalar or array is stored: a number; None for private storage.
        integers: The elements of integer arrays, flat, by name.
        before: By segment, the segments that ended before it; `segment` is the current one.
        lock: Names of the critical sections around the current statement.
        defined: Private names that the current iteration has certainly written.
        undefined: Private names that were read before that.
        children: Masks of the tasks that the current task or thread created; `groups` those of
            taskgroups, with everything created inside.
        unknown: Why the verdict would be "cannot tell" if no race were found.
    """

    def __init__(self, places: dict[str, int | None], values: dict[str, int | None]) -> None:
        self.values, self.places = values, places
        self.integers: dict[str, list[int | None]] = {}
        self.before, self.segment = [0], 0
        self.lock = NOTHING
        self.writes: dict[tuple, list[tuple]] = {}
        self.reads: dict[tuple, list[tuple]] = {}
        self.privates: set[str] = set()
        self.defined: set[str] = set()
        self.undefined: set[str] = set()
        self.last_defined: set[str] = set()
        self.children: list[int] = []
        self.groups: list[list[int]] = []
        self.depends: dict[tuple, tuple[int, int]] = {}
        self.unknown = ""
        self.steps = 0

    def start(self, before: int) -> int:
        """Begins a segment after the segments of a mask, and makes it the current one."""
        self.before.append(before)
        self.segment = len(self.before) - 1
        return self.segment

    def upto(self) -> int:
        """The current segment and all before it, as a mask."""
        return self.before[self.segment] | 1 << self.segment

    def forget(self) -> None:
        """Everything so far has ended: drops the accesses and joins all segments into one."""
        self.writes.clear()
        self.reads.clear()
        self.before, self.segment = [0], 0
        self.children, self.depends = [], {}

    def read(self, place: int | None, element: int, who: Who) -> None:
        """Records a read of an element of a place."""
        if place is None:
            return
        key = (place, element)
        written = self.writes.get(key)
        if written:
            self.check(written, who)
        readers = self.reads.get(key)
        if readers is None:
            self.reads[key] = [self.entry(who)]
        elif readers[-1][0] != self.segment or readers[-1][1] is not self.lock:
            readers.append(self.entry(who))

    def write(self, place: int | None, element: int, who: Who) -> None:
        """Records a write of an element of a place."""
        if place is None:
            return
        key = (place, element)
        readers = self.reads.get(key)
        if readers:
            self.check(readers, who)
        written = self.writes.get(key)
        if written is None:
            self.writes[key] = [self.entry(who)]
            return
        self.check(written, who)
        if written[-1][0] != self.segment or written[-1][1] is not self.lock:
            written.append(self.entry(who))

    def entry(self, who: Who) -> tuple:
        """An access by the current segment: (segment, lock, who, values of the loop variables)."""
        return self.segment, self.lock, who, [self.values.get(name) or 0 for name in who.loops]

    def check(self, entries: list[tuple], who: Who) -> None:
        """Raises `Race` if one of the accesses is not ordered before the current one."""
        segment, lock = self.segment, self.lock
        before = self.before[segment]
        for other, other_lock, other_who, at in entries:
            if other == segment or before >> other & 1 or (lock and lock & other_lock):
                continue
            iterations = (
                tuple(zip(other_who.loops, at)),
                tuple((name, self.values.get(name) or 0) for name in who.loops),
            )
            raise Race(Conflict(other_who.access, who.access, iterations))

    def define(self, name: str) -> None:
        """Says that the current iteration has written a private name."""
        if name in self.privates:
            self.defined.add(name)

    def use(self, name: str) -> None:
        """Says that the current iteration reads a name."""
        if name in self.privates and name not in self.defined:
            self.undefined.add(name)
