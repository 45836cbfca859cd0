"""The dependence graph of source text: what each pair of accesses is to each other.

The graph is what a model reads beside the source: a list of (token, token, relation). It is found
from the lexer's pieces with the classic subscript tests (Goff, Kennedy and Tseng 1991, "Practical
dependence testing"), so it exists for C and Fortran, for half a file and for code with errors. It
is evidence and no proof: it knows neither guards nor bounds that are no numbers, and a pair whose
subscripts are not linear is "unknown". Distances are those of the loops that a directive shares
out, or of the first loop.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from jaxfm.tasks.hpc.dependence import Access, dependences
from jaxfm.tasks.hpc.lexer import Piece, lex
from jaxfm.tasks.hpc.nests import SENTINELS, Layout, layout

RELATIONS = (
    "none", "same name", "subscript", "flows into", "loop of", "inner loop of", "both read",
    "same iteration", "independent", "always", "distance 1", "distance 2", "distance 3-4",
    "distance 5-16", "distance 17+", "crossing", "maybe", "unknown, same text", "unknown",
    "scalar defined first", "scalar defined at times", "scalar used first", "scalar updated",
    "scalar updated and used", "protected", "elsewhere", "private", "firstprivate", "lastprivate",
    "reduction", "in a clause", "inside the lock",
    "shared counter",
)  # fmt: skip
_ID = {name: number for number, name in enumerate(RELATIONS)}
_ASSIGN = {"=", "+=", "-=", "*=", "/=", "++", "--", "%=", "|=", "&=", "^="}


class Edge(NamedTuple):
    """Two pieces of source, by the byte at which each begins, and their relation's number."""

    first: int
    second: int
    relation: int


def edges(text: str, limit: int = 512) -> list[Edge]:
    """The edges of a text, both ways each, at most `limit`; those of accesses come first."""
    pieces, dependent, other = _pairs(text)
    places = _byte_places(text, pieces)
    found: dict[tuple[int, int], int] = {}
    for a, b, name in dependent + other:
        for key in ((a, b), (b, a)):
            found.setdefault((places[key[0]], places[key[1]]), _ID[name])
    return [Edge(*key, relation) for key, relation in list(found.items())[:limit]]


def notes(text: str) -> str:
    """What the dependences of each variable are, as a line for models that read text alone.

    Each name, in the order of the text, and the numbers of its relations, two digits each.

    >>> notes("for(i=1;i<n;i++)\\na[i]=a[i-1]+s;")
    'a 0710\\n'
    """
    pieces, dependent, _ = _pairs(text)
    found: dict[str, set[int]] = {}
    for a, _b, name in sorted(dependent):
        found.setdefault(pieces[a].text, set()).add(_ID[name])
    said = (f"{name} {''.join(f'{n:02}' for n in sorted(ids))}" for name, ids in found.items())
    return " ".join(said) + "\n"


def assigned(loop: str) -> list[str]:
    """The scalars that a loop of C assigns and does not declare, in their order; not its variable.

    >>> assigned("for(int i=0;i<n;i++) {double u=a[i]; t=u; for(j=0;j<n;j++) s+=b[j];}")
    ['t', 'j', 's']
    """
    pieces = [p for p in lex(loop) if p.kind not in ("space", "verbatim")]
    counted = layout(pieces).loops
    declared, found, declaring = {loop.var for loop in counted[:1]}, [], -1
    for access in _accesses(pieces, set())[0]:
        before = pieces[: access.piece][::-1]
        stars = next((k for k, piece in enumerate(before) if piece.text != "*"), len(before))
        ahead = before[stars] if stars < len(before) else None
        typed = ahead is not None and ahead.kind in ("word", "keyword") and ahead.text != "else"
        if typed and (not stars or _begins(before[stars + 1 :])):
            declaring = access.statement
            declared.add(access.name)
        elif declaring == access.statement and ahead is not None and ahead.text == ",":
            declared.add(access.name)
        member = ahead is not None and ahead.text in (".", "->")
        behind = pieces[access.piece + 1].text if access.piece + 1 < len(pieces) else ""
        reached = access.subscripts is not None or behind in (".", "->")
        pointed = stars > 0 and _begins(before[stars:])
        if access.mode != "read" and not (member or reached or pointed):
            found.append(access.name)
    return [name for name in dict.fromkeys(found) if name not in declared]


def _begins(before: list[Piece]) -> bool:
    """Whether a statement begins behind pieces, which stand in the reverse of their order."""
    return not before or before[0].text in (";", "{", "}", ")", "(", "else", "const", "static")


Pair = tuple[int, int, str]


def _pairs(text: str) -> tuple[list[Piece], list[Pair], list[Pair]]:
    """The pieces of a text; the pairs of them that are dependences, and the other ones."""
    pieces = [p for p in lex(text) if p.kind not in ("space", "verbatim")]
    found = layout(pieces)
    accesses, clauses = _accesses(pieces, {loop.piece for loop in found.loops})
    return pieces, dependences(accesses, found), _structure(pieces, accesses, found, clauses)


def _byte_places(text: str, pieces: list[Piece]) -> list[int]:
    if text.isascii():
        return [piece.start for piece in pieces]
    return [len(text[: piece.start].encode()) for piece in pieces]


def _accesses(
    pieces: list[Piece], heads: set[int]
) -> tuple[list[Access], list[tuple[str, int, str]]]:  # fmt: skip
    """Every use of a variable, and the names in clauses of directives with their pieces."""
    found: list[Access] = []
    clauses: list[tuple[str, int, str]] = []
    statement, in_clauses, line, clause = 0, False, 0, ""
    for at, piece in enumerate(pieces):
        if piece.line != line:
            line, in_clauses, statement = piece.line, False, statement + 1
        if piece.text in SENTINELS:
            in_clauses = True
        elif piece.text in (";", "{", "}"):
            statement += 1
        if in_clauses and piece.kind == "keyword":
            clause = piece.text.lower()
        if piece.kind != "word":
            continue
        if in_clauses:
            clauses.append((piece.text, at, clause))
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


def _structure(
    pieces: list[Piece],
    accesses: list[Access],
    where: Layout,
    clauses: list[tuple[str, int, str]],
) -> list[tuple[int, int, str]]:
    """Edges that are no dependences: subscripts, data flow in a statement, loops, clauses."""
    found: list[tuple[int, int, str]] = []
    inside = {id(p): a.piece for a in accesses for s in a.subscripts or () for p in s}
    for at, piece in enumerate(pieces):
        if piece.kind in ("word", "number") and id(piece) in inside:
            found.append((inside[id(piece)], at, "subscript"))
    for name, at, clause in clauses:
        kind = clause if clause in RELATIONS else "in a clause"
        found += [(a.piece, at, kind) for a in accesses if a.name == name]
    for lock in where.locks:
        inside_it = (a for a in accesses if lock.first <= a.piece < lock.last)
        found += [(a.piece, lock.first - 1, "inside the lock") for a in inside_it]
    counters = (loop for nest in where.nests for loop in nest.inner if not loop.declared)
    found += [(loop.piece, loop.piece, "shared counter") for loop in counters]
    targets = {a.statement: a for a in accesses if a.mode != "read"}
    for access in accesses:
        target = targets.get(access.statement)
        if target is not None and target is not access:
            found.append((access.piece, target.piece, "flows into"))
    for number, loop in enumerate(where.loops):
        name = "inner loop of" if number else "loop of"
        found += [(a.piece, loop.piece, "same name") for a in accesses if a.name == loop.var]
        found += [
            (a.piece, loop.piece, name)
            for a in accesses
            if a.mode != "read" and a.piece > loop.piece
        ]
    return found
