"""What is noted while a graph is read, and the register of the rules that read it.

A rule belongs to one primitive, never to a type of layer: it unifies the axes that must be cut
together and returns the axes of the results. Three things are noted on the way for those that run
the graph: which axes a contraction or a sum runs over, and which numbers are the sizes of sums (a
mean over a cut axis divides by what is left of it).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxfm.search.trace.graph import Atom, Constant, Op, Values
from jaxfm.search.trace.labels import Axis, Labels, plain


class Sum(NamedTuple):
    """A value that is a power of a sum.

    Attributes:
      axes: what the sum runs over.
      power: 1 for the sum itself, 1/2 for its square root.
    """

    axes: tuple[Axis, ...]
    power: float


class Divisor(NamedTuple):
    """A quotient of a sum by `(size - less) ** power`, where size is the number of its terms.

    Attributes:
      axes: what the sum ran over.
      power: 1 for a mean; 1/2 for a quotient by a square root.
      less: 1 for an unbiased variance (ddof=1), otherwise 0.
    """

    axes: tuple[Axis, ...]
    power: float = 1.0
    less: int = 0

    def factor(self, size: Any, kept: Any) -> Any:
        """What the quotient is multiplied with where `kept` of `size` terms are left."""
        least = self.less + 1  # nothing divides by zero
        kept = (kept if kept > least else least) if isinstance(kept, int) else kept.clip(least)
        return ((size - self.less) / (kept - self.less)) ** self.power


class Reading(NamedTuple):
    """What reading a graph collects; `jaxfm.search.trace.rules.read` fills it.

    Attributes:
      labels: the union-find.
      axes: by value, the axes of the array.
      summed: by value, the sum that it is a power of, seen through changes of shape.
      divisors: by output value of an operation.
      unknown: primitives without a rule, and how often each occurs.
      homes: by id, the loops that read it layer by layer; -1 stands for any other place.
      blocks: axes, and the number of equal blocks into which each must stay divided.
    """

    labels: Labels
    axes: dict[int, list[Axis]]
    summed: dict[int, Sum]
    divisors: dict[int, Divisor]
    unknown: Counter
    homes: dict[int, set[int]]
    blocks: list[tuple[Axis, int]]


def new_reading() -> Reading:
    """Returns an empty reading."""
    return Reading(
        labels=Labels(), axes={}, summed={}, divisors={}, unknown=Counter(), homes={}, blocks=[]
    )


class Context(NamedTuple):
    """What a rule may look at and change.

    Attributes:
      to: the reading that is being filled.
      values: shapes of all values.
      uniform: by value, the one number that it holds everywhere.
      depth: how many loops surround the operation.
    """

    to: Reading
    values: Values
    uniform: dict[int, float]
    depth: int

    def axes(self, atom: Atom) -> list[Axis]:
        """The axes of a value or of a constant."""
        if isinstance(atom, Constant):
            return [plain(n) for n in np.shape(atom.value)]
        return self.to.axes[atom]

    def shape_of(self, number: int) -> tuple[int, ...]:
        """The shape of a value."""
        return self.values.shapes[number]

    def fresh(self, size: int) -> Axis:
        """An axis that may be cut, unless it has a single index."""
        return fresh_axis(size, self.to.labels)

    def unify(self, a: Axis, b: Axis, op: Op) -> None:
        """Two axes that meet in an operation are cut together."""
        self.to.labels.unify(a, b, f"it meets an axis that cannot be cut in {op.name!r}")

    def freeze(self, axis: Axis, why: str) -> Axis:
        """Returns an axis of the same size that is never cut, as `axis` is from now on."""
        self.to.labels.freeze(axis, why)
        return plain(len(axis))

    def freeze_all(self, op: Op) -> list[list[Axis]]:
        """Freezes all operands; returns results that are never cut."""
        for atom in op.inputs:
            for axis in self.axes(atom):
                self.freeze(axis, f"{op.name!r} has no rule")
        return [[plain(n) for n in self.shape_of(number)] for number in op.outputs]

    def alike_everywhere(self, axes: Sequence[Axis]) -> None:
        """Notes that these axes do not belong to one loop: all of its layers cut them alike."""
        self.note_home(axes, -1)

    def note_home(self, axes: Sequence[Axis], loop: int) -> None:
        """Notes that a loop, by the number of its first output, reads these axes per layer."""
        note_home(self.to, axes, loop)


def note_home(to: Reading, axes: Sequence[Axis], loop: int) -> None:
    """As `Context.note_home`."""
    for axis in axes:
        for i in np.unique(axis).tolist():
            to.homes.setdefault(i, set()).add(loop)


def fresh_axis(size: int, labels: Labels) -> Axis:
    """An axis of new ids; an axis of one index is never cut."""
    return labels.fresh(size) if size > 1 else plain(size)


Rule = Callable[[Context, Op], list[list[Axis]]]
"""`(context, op) -> axes of each output`."""

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for primitives of these names."""

    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return add
