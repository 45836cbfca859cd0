"""The dependence graph of source text: what each pair of accesses is to each other.

The graph is what a model reads beside the source: a list of (token, token, relation). It is found
from the lexer's pieces with the classic subscript tests (Goff, Kennedy and Tseng 1991, "Practical
dependence testing"), so it exists for C and Fortran, for half a file and for code with errors. It
is evidence and no proof: it knows neither guards nor bounds that are no numbers, and a pair whose
subscripts are not linear is "unknown".
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from jaxfm.tasks.hpc.lexer import Piece, lex

RELATIONS = (
    "none", "same name", "subscript", "flows into", "loop of", "inner loop of", "both read",
    "same iteration", "independent", "always", "distance 1", "distance 2", "distance 3-4",
    "distance 5-16", "distance 17+", "crossing", "maybe", "unknown, same text", "unknown",
    "scalar defined first", "scalar used first", "scalar updated", "in a clause",
)  # fmt: skip
_ID = {name: number for number, name in enumerate(RELATIONS)}
_ASSIGN = {"=", "+=", "-=", "*=", "/=", "++", "--", "%=", "|=", "&=", "^="}
Linear = tuple[dict[str, int], int]


class Access(NamedTuple):
    """A use of a name: which piece it is, what it does, and its subscripts.

    Attributes:
        piece: Its number among the pieces.
        mode: "read", "write", or "update" (both, as of `+=` or `s = s + x`).
        subscripts: The pieces of each subscript; None for a scalar.
        statement: The number of its statement.
    """

    name: str
    piece: int
    mode: Literal["read", "write", "update"]
    subscripts: tuple[tuple[Piece, ...], ...] | None
    statement: int


class Loop(NamedTuple):
    """A counted loop: its variable, the piece that names it, its trip count if known, its step."""

    var: str
    piece: int
    trips: int | None
    step: int = 1


class Edge(NamedTuple):
    """Two pieces of source, by the byte at which each begins, and their relation's number."""

    first: int
    second: int
    relation: int


def edges(text: str, limit: int = 512) -> list[Edge]:
    """The edges of a text, both ways each, at most `limit`; those of accesses come first."""
    pieces = [p for p in lex(text) if p.kind not in ("space", "verbatim")]
    loops = _loops(pieces)
    accesses, clauses = _accesses(pieces, {loop.piece for loop in loops})
    pairs = [*_dependences(accesses, loops), *_structure(pieces, accesses, loops, clauses)]
    places = _byte_places(text, pieces)
    found: dict[tuple[int, int], int] = {}
    for a, b, name in pairs:
        for key in ((a, b), (b, a)):
            found.setdefault((places[key[0]], places[key[1]]), _ID[name])
    return [Edge(*key, relation) for key, relation in list(found.items())[:limit]]


def _byte_places(text: str, pieces: list[Piece]) -> list[int]:
    if text.isascii():
        return [piece.start for piece in pieces]
    return [len(text[: piece.start].encode()) for piece in pieces]


def linear(pieces: tuple[Piece, ...]) -> Linear | None:
    """A subscript as (coefficient of each name, constant); None where it is not linear.

    >>> linear(tuple(lex("2*i-(j+3)")))
    ({'i': 2, 'j': -1}, -3)
    """
    words = [p for p in pieces if p.kind != "space"]
    value, rest = _sum(words, 0)
    return value if rest == len(words) else None


def _sum(words: list[Piece], at: int) -> tuple[Linear | None, int]:
    total: Linear | None = ({}, 0)
    sign, first = 1, True
    while at < len(words) and (first or words[at].text in "+-"):
        if words[at].text in ("+", "-"):
            sign, at = (1 if words[at].text == "+" else -1), at + 1
        term, at = _product(words, at)
        total, first = _added(total, term, sign), False
    return total, at


def _product(words: list[Piece], at: int) -> tuple[Linear | None, int]:
    value, at = _atom(words, at)
    while at < len(words) and words[at].text == "*":
        other, at = _atom(words, at + 1)
        if value is None or other is None or (value[0] and other[0]):
            value = None
            continue
        (terms, constant), factor = (other, value[1]) if not value[0] else (value, other[1])
        scaled = {name: c * factor for name, c in terms.items() if c * factor}
        value = scaled, constant * factor
    return value, at


def _atom(words: list[Piece], at: int) -> tuple[Linear | None, int]:
    if at >= len(words):
        return None, at
    piece = words[at]
    if piece.text == "(":
        value, at = _sum(words, at + 1)
        return (value, at + 1) if at < len(words) and words[at].text == ")" else (None, len(words))
    if piece.kind == "number" and piece.text.isdigit():
        return ({}, int(piece.text[:9])), at + 1
    if piece.kind == "word" and not (at + 1 < len(words) and words[at + 1].text in "[("):
        return ({piece.text: 1}, 0), at + 1
    return None, len(words)


def _added(a: Linear | None, b: Linear | None, sign: int) -> Linear | None:
    if a is None or b is None:
        return None
    names = [*a[0], *(name for name in b[0] if name not in a[0])]
    sums = {name: a[0].get(name, 0) + sign * b[0].get(name, 0) for name in names}
    return {name: c for name, c in sums.items() if c}, a[1] + sign * b[1]


def _loops(pieces: list[Piece]) -> list[Loop]:
    """The counted loops of C and Fortran, in the order of their text."""
    found = []
    for at, piece in enumerate(pieces[:-3]):
        if piece.kind != "keyword" or piece.text.lower() not in ("for", "do"):
            continue
        start = at + 1 + (pieces[at + 1].text == "(")
        while start < len(pieces) - 1 and pieces[start].kind == "keyword":
            start += 1  # the type of a variable that is declared there
        names = start < len(pieces) - 1 and pieces[start].kind == "word"
        if names and pieces[start + 1].text == "=":
            found.append(
                Loop(pieces[start].text, start, _trips(pieces, start), _step(pieces, start))
            )
    return found


def _trips(pieces: list[Piece], start: int) -> int | None:
    """The trip count of a loop whose bounds are numbers and whose step is one."""
    words = [piece.text for piece in pieces[start + 2 : start + 9]]
    if len(words) >= 3 and words[0].isdigit() and words[1] == "," and words[2].isdigit():
        return int(words[2]) - int(words[0]) + 1
    if len(words) >= 5 and words[0].isdigit() and words[4].isdigit() and words[3] in ("<", "<="):
        return int(words[4]) - int(words[0]) + (words[3] == "<=")
    return None


def _step(pieces: list[Piece], start: int) -> int:
    """The step of a loop, without its sign; 1 where it is no number."""
    line = pieces[start].line
    words = [p.text for p in pieces[start : start + 40] if p.line == line]
    if ";" not in words:  # Fortran: do i = lower, upper, step
        return int(words[-1]) if words.count(",") == 2 and words[-1].isdigit() else 1
    for at in range(words.index(";"), len(words) - 2):
        if words[at] == words[0] and words[at + 1] in ("+=", "-=") and words[at + 2].isdigit():
            return int(words[at + 2]) or 1
    return 1


def _accesses(
    pieces: list[Piece], heads: set[int]
) -> tuple[list[Access], list[tuple[str, int]]]:  # fmt: skip
    """Every use of a variable, and the names in clauses of directives with their pieces."""
    found: list[Access] = []
    clauses: list[tuple[str, int]] = []
    statement, in_clauses, line = 0, False, 0
    for at, piece in enumerate(pieces):
        if piece.line != line:
            line, in_clauses, statement = piece.line, False, statement + 1
        if piece.text in ("#pragma", "!$omp", "!$OMP"):
            in_clauses = True
        elif piece.text in (";", "{", "}"):
            statement += 1
        if piece.kind != "word":
            continue
        if in_clauses:
            clauses.append((piece.text, at))
        elif at not in heads:
            subscripts, after = _subscripts(pieces, at)
            found.append(Access(piece.text, at, _mode(pieces, at, after), subscripts, statement))
    return _with_updates(found), clauses


def _subscripts(
    pieces: list[Piece], at: int
) -> tuple[tuple[tuple[Piece, ...], ...] | None, int]:  # fmt: skip
    """The subscripts behind a name, `[i][j]` or `(i, j)`, and the place after them."""
    found: list[tuple[Piece, ...]] = []
    after = at + 1
    while after < len(pieces) and (
        pieces[after].text == "[" or (pieces[after].text == "(" and not found)
    ):
        depth, inside, opened = 1, [], pieces[after].text
        after += 1
        while after < len(pieces) and depth:
            text = pieces[after].text
            depth += (text in "[(") - (text in ")]")
            if depth and not (text == "," and depth == 1):
                inside.append(pieces[after])
            elif depth:
                found.append(tuple(inside))
                inside = []
            after += 1
        found.append(tuple(inside))
        if opened == "(":
            break
    return (tuple(found) or None), after


def _mode(pieces: list[Piece], at: int, after: int) -> Literal["read", "write", "update"]:
    behind = pieces[after].text if after < len(pieces) else ""
    before = pieces[at - 1].text if at else ""
    if behind == "=":
        return "write"
    return "update" if behind in _ASSIGN or before in ("++", "--") else "read"


def _with_updates(accesses: list[Access]) -> list[Access]:
    """Marks writes whose own place is read in their statement: `s = s + x`."""
    text = lambda a: (a.name, tuple("".join(p.text for p in s) for s in a.subscripts or ()))
    reads = {(a.statement, text(a)) for a in accesses if a.mode == "read"}
    return [
        a._replace(mode="update") if a.mode == "write" and (a.statement, text(a)) in reads else a
        for a in accesses
    ]


def _dependences(accesses: list[Access], loops: list[Loop]) -> list[tuple[int, int, str]]:
    """The relation of each two accesses of one name, and of a write with itself."""
    by_name: dict[str, list[Access]] = {}
    counted = {loop.var for loop in loops}
    for access in accesses:
        if access.name not in counted:
            by_name.setdefault(access.name, []).append(access)
    found = []
    for uses in by_name.values():
        for n, a in enumerate(uses):
            for b in uses[n:]:
                if a is b and a.mode == "read":
                    continue
                if a.subscripts is None or b.subscripts is None:
                    name = _scalar_relation(a, b, uses)
                elif a.mode == b.mode == "read":
                    name = "both read"
                else:
                    name = pair_relation(a, b, loops)
                found.append((a.piece, b.piece, name))
    return found


def _scalar_relation(a: Access, b: Access, uses: list[Access]) -> str:
    if all(use.mode == "read" for use in uses):
        return "both read"
    if uses[0].mode == "update":
        return "scalar updated"
    first = next(use for use in uses if use.mode != "read")
    before = any(use.mode == "read" and use.statement <= first.statement for use in uses)
    return "scalar used first" if before else "scalar defined first"


def pair_relation(a: Access, b: Access, loops: list[Loop]) -> str:
    """What two accesses of one array are to each other over the iterations of the outermost loop.

    "independent": never the same place in two iterations; "same iteration": the same place in one
    iteration only; "always": in all; "distance d": in iterations d apart; "crossing" and "maybe":
    in some, as far as the tests see.
    """
    variables = [loop.var for loop in loops]
    outer = loops[0] if loops else Loop("", 0, None)
    assert a.subscripts is not None and b.subscripts is not None
    if len(a.subscripts) != len(b.subscripts):
        return "unknown"
    results = [
        _dimension(linear(x), linear(y), _same(x, y), outer, variables)
        for x, y in zip(a.subscripts, b.subscripts)
    ]
    for decisive in ("independent", "same iteration"):
        if decisive in results:
            return decisive
    distances = {result for result in results if result.startswith("distance")}
    if len(distances) > 1:
        return "independent"
    for name in (*distances, "crossing", "maybe", "unknown", "unknown, same text"):
        if name in results:
            return name
    return "always"


def _same(x: tuple[Piece, ...], y: tuple[Piece, ...]) -> bool:
    return [p.text for p in x] == [p.text for p in y]


def _dimension(
    x: Linear | None, y: Linear | None, same: bool, outer: Loop, variables: list[str]
) -> str:
    """The relation of two subscripts of one dimension."""
    if x is None or y is None:
        return "unknown, same text" if same else "unknown"
    symbols = [name for name in (*x[0], *y[0]) if name not in variables]
    if any(x[0].get(name, 0) != y[0].get(name, 0) for name in symbols):
        return "unknown"
    p, q, apart = x[0].get(outer.var, 0), y[0].get(outer.var, 0), y[1] - x[1]
    if p == q:  # both count from one lower bound, so only its steps tell places apart
        p = q = p * outer.step
    inner = [name for name in variables if name != outer.var and (name in x[0] or name in y[0])]
    divisor = math.gcd(p, q, *(c for n in inner for c in (x[0].get(n, 0), y[0].get(n, 0))))
    if (divisor == 0 and apart) or (divisor and apart % divisor):
        return "independent"
    if inner:
        return "maybe" if p or q else "always"
    if not p and not q:
        return "always"
    if p == q:
        steps = abs(apart // p)
        if steps == 0:
            return "same iteration"
        return "independent" if outer.trips and steps >= outer.trips else _distance(steps)
    return "crossing" if p == -q else "maybe"


def _distance(steps: int) -> str:
    for most, name in ((1, "1"), (2, "2"), (4, "3-4"), (16, "5-16")):
        if steps <= most:
            return f"distance {name}"
    return "distance 17+"


def _structure(
    pieces: list[Piece], accesses: list[Access], loops: list[Loop], clauses: list[tuple[str, int]]
) -> list[tuple[int, int, str]]:
    """Edges that are no dependences: subscripts, data flow in a statement, loops, clauses."""
    found: list[tuple[int, int, str]] = []
    inside = {id(p): a.piece for a in accesses for s in a.subscripts or () for p in s}
    for at, piece in enumerate(pieces):
        if piece.kind in ("word", "number") and id(piece) in inside:
            found.append((inside[id(piece)], at, "subscript"))
    for name, at in clauses:
        found += [(a.piece, at, "in a clause") for a in accesses if a.name == name]
    targets = {a.statement: a for a in accesses if a.mode != "read"}
    for access in accesses:
        target = targets.get(access.statement)
        if target is not None and target is not access:
            found.append((access.piece, target.piece, "flows into"))
    for number, loop in enumerate(loops):
        name = "inner loop of" if number else "loop of"
        found += [(a.piece, loop.piece, "same name") for a in accesses if a.name == loop.var]
        found += [
            (a.piece, loop.piece, name)
            for a in accesses
            if a.mode != "read" and a.piece > loop.piece
        ]
    return found
