"""The smallest automaton over bytes that reads exactly the texts of a pattern.

The pattern's tree becomes a nondeterministic automaton, built from its end to its beginning, so
that equal endings are built once (Thompson 1968). Sets of its states become the states of a
deterministic one (Rabin and Scott 1959), of which states that no later byte tells apart are one
state (Moore 1956).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from jaxfm.parallel.grammars.characters import utf8
from jaxfm.parallel.grammars.syntax import Call, Chain, Chars, Either, Node, Repeat, parse

DEAD = -1
_MOST_STATES = 2**14
_MOST_PARTS = 2**18


@dataclasses.dataclass(frozen=True, eq=False)
class Automaton:
    """Which texts a grammar has. It begins in state 0; each state is on the way to some text.

    Attributes:
      table: i32[S, C] the state after a byte of each class; DEAD: no text goes on so.
      byte_classes: u8[256] of each byte.
      accepting: bool[S], whether what was read is a text of the grammar.
    """

    table: np.ndarray
    byte_classes: np.ndarray
    accepting: np.ndarray

    def matches(self, text: bytes) -> bool:
        """Whether a whole text is one of the grammar's."""
        state = 0
        for kind in self.byte_classes[np.frombuffer(text, np.uint8)]:
            state = self.table[state, kind]
            if state == DEAD:
                return False
        return bool(self.accepting[state])


def regular(pattern: str, rules: Mapping[str, str] | None = None, *, depth: int = 0) -> Automaton:
    """The automaton of a regular expression, or of a small grammar of named rules.

    Args:
      pattern: in the syntax of `jaxfm.parallel.grammars.syntax`; it is about the whole text.
      rules: patterns by name, for which (?&name) stands in the pattern and in each other.
      depth: how often a rule may stand inside itself. A rule that ends with itself is a loop and
        needs none.
    Raises:
      TypeError: a pattern that is no string.
      ValueError: a wrong pattern, a rule that is missing, a recursion deeper than `depth` allows
        everywhere, no text at all, or more than 2**14 states.
    """
    return _regular(pattern, tuple(sorted((rules or {}).items())), depth)


@functools.lru_cache(maxsize=256)
def _regular(pattern: str, rules: tuple[tuple[str, str], ...], depth: int) -> Automaton:
    builder = _Builder({name: parse(text) for name, text in rules}, depth)
    try:
        start = builder.build(parse(pattern), builder.end)
    except RecursionError:
        raise ValueError("The grammar is nested too deeply; write it flatter.") from None
    return _smallest(*_determined(builder, start))


class _Builder:
    """A nondeterministic automaton that grows from its end.

    Attributes:
      free: states that each state goes to without a byte.
      arcs: (first byte, last byte, state) of each state.
      end: the accepting state.
    """

    def __init__(self, rules: Mapping[str, Node], depth: int):
        self.rules, self.depth = rules, depth
        self.free: list[list[int]] = [[]]
        self.arcs: list[list[tuple[int, int, int]]] = [[]]
        self.end = 0
        self.known: dict = {}
        self.open: list[str] = []  # rules that are being built
        self.loops: dict = {}

    def state(self, *free: int) -> int:
        if len(self.free) == _MOST_PARTS:
            raise ValueError(
                f"The grammar has more than {_MOST_PARTS} parts; give smaller repeats, or less "
                "depth."
            )
        self.free.append(list(free))
        self.arcs.append([])
        return len(self.free) - 1

    def build(self, node: Node, after: int) -> int:
        """The state from which a node is read, and then what follows it."""
        key = node, after, tuple(self.open)
        if key not in self.known:
            self.known[key] = self._build(node, after)
        return self.known[key]

    def _build(self, node: Node, after: int) -> int:
        match node:
            case Chars(ranges):
                start = self.state()
                for (low, high), *rest in utf8(ranges):
                    self.arcs[start].append((low, high, self.tail(tuple(rest), after)))
                return start
            case Chain(parts):
                for part in reversed(parts):
                    after = self.build(part, after)
                return after
            case Either(options):
                return self.state(*(self.build(option, after) for option in options))
            case Repeat(body, least, most):
                if most is None:
                    last = self.state(after)
                    self.free[last].append(self.build(body, last))
                else:
                    last = after
                    for _ in range(most - least):
                        last = self.state(self.build(body, last), after)
                for _ in range(least):
                    last = self.build(body, last)
                return last
            case Call(name):
                return self.call(name, after)

    def tail(self, rest: tuple[tuple[int, int], ...], after: int) -> int:
        """The state from which the last bytes of a character are read."""
        if not rest:
            return after
        if (rest, after) not in self.known:
            self.known[rest, after] = start = self.state()
            self.arcs[start].append((*rest[0], self.tail(rest[1:], after)))
        return self.known[rest, after]

    def call(self, name: str, after: int) -> int:
        if name not in self.rules:
            raise ValueError(f"There is no rule {name!r}; there are {sorted(self.rules)}.")
        if (name, after) in self.loops:  # the rule ends with itself
            return self.loops[name, after]
        if self.open.count(name) > self.depth:
            return self.state()  # from which nothing is read
        self.loops[name, after] = start = self.state()
        self.open.append(name)
        self.free[start].append(self.build(self.rules[name], after))
        self.open.pop()
        del self.loops[name, after]
        return start


def _determined(builder: _Builder, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Table, classes of bytes and accepting states of the automaton of sets of states."""
    closures: dict[int, frozenset[int]] = {}

    def closure(state: int) -> frozenset[int]:
        """The states with arcs, and the end, that are reached without a byte."""
        if state not in closures:
            seen, stack = {state}, [state]
            while stack:
                for other in builder.free[stack.pop()]:
                    if other not in seen:
                        seen.add(other)
                        stack.append(other)
            keeps = (s for s in seen if builder.arcs[s] or s == builder.end)
            closures[state] = frozenset(keeps)
        return closures[state]

    edges = {edge for arcs in builder.arcs for low, high, _ in arcs for edge in (low, high + 1)}
    inner = np.array(sorted(edges - {0, 256}), np.int64)
    classes = np.searchsorted(inner, np.arange(256), side="right").astype(np.uint8)
    first = closure(start)
    number, waiting, rows = {first: 0}, [first], []
    for states in waiting:
        targets: dict[int, set[int]] = {}
        for state in states:
            for low, high, target in builder.arcs[state]:
                for kind in range(classes[low], classes[high] + 1):
                    targets.setdefault(kind, set()).update(closure(target))
        row = np.full(classes.max() + 1, DEAD, np.int32)
        for kind, found in targets.items():
            key = frozenset(found)
            if key not in number:
                number[key] = len(waiting)
                waiting.append(key)
            row[kind] = number[key]
        rows.append(row)
        if len(waiting) > _MOST_STATES:
            raise ValueError(
                f"The grammar needs more than {_MOST_STATES} states; give smaller repeats, or "
                "fewer alternatives."
            )
    return np.stack(rows), classes, np.array([builder.end in states for states in waiting])


def _smallest(table: np.ndarray, classes: np.ndarray, accepting: np.ndarray) -> Automaton:
    """The automaton without states that lead nowhere, and with one of each kind of state."""
    alive = accepting
    while True:
        more = accepting | (alive[table] & (table != DEAD)).any(1)
        if (more == alive).all():
            break
        alive = more
    if not alive[0]:
        raise ValueError("The grammar has no text at all.")
    table = np.where((table != DEAD) & alive[table], table, DEAD)
    kinds = np.unique(accepting, return_inverse=True)[1].reshape(-1)
    while True:
        after = np.where(table == DEAD, DEAD, kinds[table])
        _, finer = np.unique(np.column_stack([kinds, after]), axis=0, return_inverse=True)
        finer = finer.reshape(-1)
        if finer.max() == kinds.max():
            break
        kinds = finer
    order, renumbered = [0], {kinds[0]: 0}  # from the first state on, by the bytes that lead there
    for state in order:
        for target in table[state]:
            if target != DEAD and kinds[target] not in renumbered:
                renumbered[kinds[target]] = len(order)
                order.append(target)
    names = np.full(kinds.max() + 2, DEAD, np.int32)
    for kind, name in renumbered.items():
        names[kind] = name
    rows = np.array(order)
    small = names[np.where(table[rows] == DEAD, DEAD, kinds[table[rows]])]
    columns, merged = np.unique(small, axis=1, return_inverse=True)
    byte_classes = merged.reshape(-1)[classes].astype(np.uint8)
    return Automaton(columns.astype(np.int32), byte_classes, accepting[rows])
