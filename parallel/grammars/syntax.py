"""Regular expressions as trees.

The syntax is that of Python's `re` with the flag ASCII, without what looks at the surroundings of a
place or back at a group: characters, escapes, classes, `.`, `|`, `*`, `+`, `?`, `{m,n}`, `(...)`
and `(?:...)`. To these comes `(?&name)`, which stands for a named rule, as in PCRE.
"""

from __future__ import annotations

import dataclasses
from typing import NoReturn

from jaxfm.parallel.grammars import characters as sets
from jaxfm.parallel.grammars.characters import Ranges

_MOST_COPIES = 1000  # that a repeat may ask for
_CLASSES = {"d": sets.DIGITS, "w": sets.LETTERS, "s": sets.SPACES}
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}
_DIGITS_OF = {"x": 2, "u": 4, "U": 8}


# Classes with an equality of their own: tuples of different kinds would be equal.
@dataclasses.dataclass(frozen=True)
class Chars:
    """One character of a set."""

    ranges: Ranges


@dataclasses.dataclass(frozen=True)
class Chain:
    """The parts, one after the other."""

    parts: tuple[Node, ...]


@dataclasses.dataclass(frozen=True)
class Either:
    """One of the options."""

    options: tuple[Node, ...]


@dataclasses.dataclass(frozen=True)
class Repeat:
    """`least` to `most` times the node; None: any number of times."""

    node: Node
    least: int
    most: int | None


@dataclasses.dataclass(frozen=True)
class Call:
    """What the rule of this name stands for."""

    name: str


Node = Chars | Chain | Either | Repeat | Call


def parse(pattern: str) -> Node:
    """The tree of a pattern.

    Raises:
      TypeError: the pattern is no string.
      ValueError: it is wrong, or has something that is not supported; the message says where.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"A pattern must be a string, got {pattern!r}.")
    reader = _Reader(pattern)
    try:
        node = reader.either()
    except RecursionError:
        raise ValueError("The pattern has groups nested too deeply; write it flatter.") from None
    if reader.at < len(pattern):
        reader.fail("this ) closes no group; write \\) for the character")
    return node


class _Reader:
    """Reads a pattern from left to right."""

    def __init__(self, pattern: str):
        self.pattern = pattern
        self.at = 0

    def fail(self, why: str, at: int | None = None) -> NoReturn:
        at = self.at if at is None else at
        shown = self.pattern[max(at - 20, 0) : at + 20]
        raise ValueError(f"The pattern is wrong at position {at} (near {shown!r}): {why}.")

    def sees(self, text: str) -> bool:
        return self.pattern.startswith(text, self.at)

    def take(self, text: str) -> bool:
        """Whether the pattern goes on with a text, which is then passed."""
        found = self.sees(text)
        self.at += len(text) * found
        return found

    def next(self, what: str) -> str:
        if self.at == len(self.pattern):
            self.fail(f"the pattern ends before {what}")
        self.at += 1
        return self.pattern[self.at - 1]

    def until(self, end: str, start: int, what: str) -> str:
        """The text up to an end, which is passed."""
        stop = self.pattern.find(end, self.at)
        if stop < 0:
            self.fail(f"{what} has no end; close it with {end}", start)
        text, self.at = self.pattern[self.at : stop], stop + len(end)
        return text

    def either(self) -> Node:
        options = [self.chain()]
        while self.take("|"):
            options.append(self.chain())
        return options[0] if len(options) == 1 else Either(tuple(options))

    def chain(self) -> Node:
        parts = []
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            parts.append(self.repeated())
        return parts[0] if len(parts) == 1 else Chain(tuple(parts))

    def repeated(self) -> Node:
        start = self.at
        if self.pattern[start] in "*+?{":
            self.fail(f"nothing stands before the {self.pattern[start]!r} that repeats it")
        node = self.atom()
        bounds = self.bounds()
        if bounds is None:
            return node
        if self.at < len(self.pattern) and self.pattern[self.at] in "*+?{":
            self.fail("a repeat of a repeat; put a group around the first")
        return Repeat(node, *bounds)

    def bounds(self) -> tuple[int, int | None] | None:
        """How often what was read is repeated; None: it is not."""
        for sign, often in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self.take(sign):
                return often
        start = self.at
        if not self.take("{"):
            return None
        low, comma, high = self.until("}", start, "the repeat").partition(",")
        numbers = [text for text in (low, high) if text]
        if not numbers or not all(text.isascii() and text.isdigit() for text in numbers):
            self.fail("a repeat is {m}, {m,}, {,n} or {m,n}; write \\{ for the character", start)
        least = int(low or 0)
        most = None if comma and not high else int(high or low)
        if most is not None and most < least:
            self.fail(f"a repeat of {least} to {most} times is none", start)
        if max(map(int, numbers)) > _MOST_COPIES:
            self.fail(f"a repeat counts to {_MOST_COPIES} at most", start)
        return least, most

    def atom(self) -> Node:
        start = self.at
        sign = self.next("a character")
        if sign == "(":
            return self.group(start)
        if sign == "[":
            return Chars(self.bracket(start))
        if sign == ".":
            return Chars(sets.ANY)
        if sign in "^$":
            self.fail(f"the whole text is matched; leave {sign} out, or write \\{sign}", start)
        return Chars(self.escape(start) if sign == "\\" else sets.single(sign))

    def group(self, start: int) -> Node:
        if self.take("?&"):
            return Call(self.until(")", start, "the name of a rule"))
        if self.sees("?") and not self.take("?:"):
            self.fail("of groups with a question mark only (?:...) and (?&rule) are known", start)
        node = self.either()
        if not self.take(")"):
            self.fail("the group has no end; close it with )", start)
        return node

    def bracket(self, start: int) -> Ranges:
        """The set of a class, after its bracket."""
        inverted = self.take("^")
        pairs: list[tuple[int, int]] = []
        first = True
        while first or not self.sees("]"):
            first = False
            low = self.member(start)
            if not self.sees("-") or self.sees("-]"):
                pairs += low
                continue
            self.at += 1
            high = self.member(start)
            one = len(low) == len(high) == 1 and low[0][0] == low[0][1] and high[0][0] == high[0][1]
            if not one or low[0][0] > high[0][0]:
                self.fail("this range of characters has no beginning and end in order")
            pairs.append((low[0][0], high[0][0]))
        self.at += 1
        found = sets.ranges(pairs)
        return sets.complement(found) if inverted else found

    def member(self, start: int) -> Ranges:
        at = self.at
        if at == len(self.pattern):
            self.fail("the class has no end; close it with ]", start)
        self.at += 1
        sign = self.pattern[at]
        return self.escape(at, inside=True) if sign == "\\" else sets.single(sign)

    def escape(self, start: int, inside: bool = False) -> Ranges:
        """The set of an escape, after its backslash."""
        sign = self.next("the character that it escapes")
        if sign.lower() in _CLASSES:
            found = _CLASSES[sign.lower()]
            return sets.complement(found) if sign.isupper() else found
        if sign in _CONTROLS:
            return sets.single(_CONTROLS[sign])
        if sign in _DIGITS_OF:
            digits = self.pattern[self.at : self.at + _DIGITS_OF[sign]]
            self.at += len(digits)
            try:
                if len(digits) < _DIGITS_OF[sign]:
                    raise ValueError
                return sets.single(chr(int(digits, 16)))
            except (ValueError, OverflowError):
                self.fail(f"\\{sign} needs {_DIGITS_OF[sign]} digits of a character", start)
        if sign == "b" and inside:
            return sets.single("\b")
        if sign.isascii() and sign.isalnum():
            self.fail(f"\\{sign} is not supported", start)
        return sets.single(sign)
