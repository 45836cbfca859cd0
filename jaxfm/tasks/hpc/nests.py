"""Where the loops of a source text stand, which of them run in parallel, and what is locked.

All of it is found from the lexer's pieces, in C and Fortran alike, also in half a file.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxfm.tasks.hpc.lexer import Piece

SENTINELS = ("#pragma", "!$omp", "!$OMP")


class Loop(NamedTuple):
    """A counted loop.

    Attributes:
        var: Its variable.
        piece: The piece that names the variable.
        trips: How many values it counts over, if the bounds are numbers.
        step: What it counts by, without a sign.
        end: The piece after its body.
        lower: Its first value, if that is a number.
        declared: Whether its head declares the variable; Fortran's are private without that.
    """

    var: str
    piece: int
    trips: int | None
    step: int = 1
    end: int = 0
    lower: int | None = None
    declared: bool = True


class Region(NamedTuple):
    """The pieces from `first` up to `last`, and a name: of a lock, or of a condition's branch."""

    first: int
    last: int
    name: str


class Nest(NamedTuple):
    """Loops whose iterations run in parallel (several under `collapse`), and those inside."""

    parallel: tuple[Loop, ...]
    inner: tuple[Loop, ...]

    def holds(self, piece: int) -> bool:
        """Whether a piece stands in it."""
        return self.parallel[0].piece < piece < self.parallel[0].end


class Layout(NamedTuple):
    """The loops of a text in their order, its parallel nests, locked parts and conditions."""

    loops: list[Loop]
    nests: list[Nest]
    locks: list[Region]
    branches: list[Region]


def layout(pieces: list[Piece]) -> Layout:
    """What the pieces of a text, without spaces, are to each other.

    A nest begins at the loop behind a directive with `for` or `do`; a text without such a directive
    has one, its first loop.
    """
    loops = _loops(pieces)
    nests, locks = [], []
    for at, words in directives(pieces):
        own = words[: _before_clauses(words)]
        after = at + len(words)
        if "critical" in own or "atomic" in own:
            locks.append(Region(after, _end(pieces, after), "".join(words[1:])))
        elif "for" in own or "do" in own or "paralleldo" in own:
            behind = [loop for loop in loops if loop.piece > at]
            depth = _collapse(words)
            if behind and own[1:2] != ["end"]:
                nests.append(_nest(behind, depth))
    if not nests and loops:
        nests.append(_nest(loops, 1))
    return Layout(loops, nests, locks, _branches(pieces))


def directives(pieces: list[Piece]) -> list[tuple[int, list[str]]]:
    """The first piece of each directive, and the words on its line in small letters."""
    found = []
    for at, piece in enumerate(pieces):
        if piece.text in SENTINELS:
            end = at
            while end < len(pieces) and pieces[end].line == piece.line:
                end += 1
            found.append((at, [p.text.lower() for p in pieces[at:end]]))
    return found


_CLAUSES = frozenset(
    ("private", "firstprivate", "lastprivate", "reduction", "shared", "schedule", "collapse",
     "default", "num_threads", "if", "nowait", "depend", "(")
)  # fmt: skip


def _before_clauses(words: list[str]) -> int:
    return next((n for n, word in enumerate(words) if word in _CLAUSES), len(words))


def _collapse(words: list[str]) -> int:
    for at, word in enumerate(words[:-2]):
        if word == "collapse" and words[at + 2].isdigit():
            return max(1, int(words[at + 2]))
    return 1


def _nest(loops: list[Loop], depth: int) -> Nest:
    inside = [loop for loop in loops[1:] if loop.piece < loops[0].end]
    return Nest((loops[0], *inside[: depth - 1]), tuple(inside[depth - 1 :]))


def _end(pieces: list[Piece], at: int) -> int:
    """The piece after the statement that begins at a piece; in Fortran, after its construct."""
    while at < len(pieces) and pieces[at].text in SENTINELS:
        line = pieces[at].line
        while at < len(pieces) and pieces[at].line == line:
            at += 1
    if at >= len(pieces):
        return len(pieces)
    text = pieces[at].text.lower()
    if text == "{":
        return _closed(pieces, at)
    if text in ("for", "if", "while", "else") and not _fortran(pieces, at):
        after = at + 1
        if after < len(pieces) and pieces[after].text == "(":
            after = _closed(pieces, after)
        after = _end(pieces, after)
        if text == "if" and after < len(pieces) and pieces[after].text == "else":
            after = _end(pieces, after)
        return after
    if text in ("do", "if"):
        return _end_of_construct(pieces, at, text)
    line = pieces[at].line
    while at < len(pieces) and pieces[at].line == line:
        if pieces[at].text == ";":
            return at + 1
        at += 1
    return at


def _fortran(pieces: list[Piece], at: int) -> bool:
    """Whether an `if` or `else` is Fortran's: `then` stands on its line, or it ends a construct."""
    line = pieces[at].line
    words = [p.text.lower() for p in pieces[at : at + 60] if p.line == line]
    return "then" in words


def _closed(pieces: list[Piece], at: int) -> int:
    """The piece after the bracket that closes the one at a piece."""
    opened, depth = pieces[at].text, 0
    closing = {"(": ")", "{": "}", "[": "]"}[opened]
    while at < len(pieces):
        depth += (pieces[at].text == opened) - (pieces[at].text == closing)
        at += 1
        if not depth:
            break
    return at


def _end_of_construct(pieces: list[Piece], at: int, word: str) -> int:
    """The piece after Fortran's `end do` or `end if` of a construct."""
    depth, directive = 0, 0
    while at < len(pieces):
        piece, text = pieces[at], pieces[at].text.lower()
        before = pieces[at - 1].text.lower() if at else ""
        if piece.text in SENTINELS:
            directive = piece.line
        elif piece.line != directive and text == word:
            depth += -1 if before == "end" else int(word == "do" or _fortran(pieces, at))
        elif text == f"end{word}":
            depth -= 1
        at += 1
        if depth <= 0 and (text == word or text == f"end{word}"):
            break
    return at


def _branches(pieces: list[Piece]) -> list[Region]:
    """The branches of C's conditions; the two of one `if` have its piece in their names."""
    found = []
    for at, piece in enumerate(pieces[:-1]):
        if piece.text != "if" or pieces[at + 1].text != "(" or _fortran(pieces, at):
            continue
        start = _closed(pieces, at + 1)
        end = _end(pieces, start)
        found.append(Region(start, end, f"then {at}"))
        if end < len(pieces) and pieces[end].text == "else":
            found.append(Region(end, _end(pieces, end + 1), f"else {at}"))
    return found


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
                Loop(
                    pieces[start].text,
                    start,
                    _trips(pieces, start),
                    _step(pieces, start),
                    _end(pieces, at),
                    _lower(pieces, start),
                    piece.text.lower() == "do" or pieces[start - 1].kind == "keyword",
                )
            )
    return found


def _lower(pieces: list[Piece], start: int) -> int | None:
    """The number at which a loop begins."""
    words = [piece.text for piece in pieces[start + 2 : start + 4]]
    return int(words[0]) if len(words) == 2 and words[0].isdigit() and words[1] in ";," else None


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
