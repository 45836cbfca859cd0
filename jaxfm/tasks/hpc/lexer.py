"""Source text of C or Fortran cut into pieces, without a grammar, and identifiers renamed.

`lex` needs no language and refuses nothing: its pieces join to the text. What a model reads goes
through here, so that half a file, macros and code with errors are read, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

Kind = Literal["word", "keyword", "number", "operator", "space", "verbatim", "other"]


def _words(text: str) -> list[str]:
    return text.split()


C_KEYWORDS = _words("""
    auto break case char const continue default do double else enum extern float for goto if inline
    int long register restrict return short signed sizeof static struct switch typedef union
    unsigned void volatile while bool size_t NULL
""")
FORTRAN_KEYWORDS = _words("""
    allocatable allocate call character complex contains cycle deallocate dimension do else elseif
    end enddo endif exit function if implicit in inout integer intent kind logical module none only
    out parameter pointer precision print program pure real result return save select stop
    subroutine target then type use value where while write and or not eq ne lt le gt ge true false
""")
PRAGMA_WORDS = _words("""
    pragma omp parallel for do simd task taskwait taskgroup barrier critical atomic ordered section
    sections single master masked target teams distribute loop private firstprivate lastprivate
    shared reduction schedule static dynamic guided runtime auto collapse nowait depend in out inout
    default none num_threads read update capture seq_cst copyin copyprivate linear aligned safelen
    threadprivate flush map tofrom to from device if end workshare threads sentinel
""")
FUNCTION_NAMES = _words("""
    min max fmin fmax fabs fabsf abs sqrt sqrtf exp log pow sin cos tan mod floor ceil merge dble
    malloc calloc free printf main omp_get_thread_num omp_get_num_threads omp_get_max_threads
    omp_get_wtime omp_set_num_threads omp_init_lock omp_set_lock omp_unset_lock omp_destroy_lock
    omp_lock_t
""")
KEPT = frozenset([*C_KEYWORDS, *FORTRAN_KEYWORDS, *PRAGMA_WORDS, *FUNCTION_NAMES])
"""Names that are never renamed; in Fortran of any case."""

OPERATORS = _words("""
    <<= >>= ... == != <= >= && || += -= *= /= %= &= |= ^= ++ -- -> << >> ** // => :: /=
""")
_PATTERN = re.compile(
    r"(?P<verbatim>/\*.*?\*/|//[^\n]*"
    r"|^[ \t]*\#[ \t]*(?!pragma)[a-z][^\n]*"
    r'|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\')'
    r"|(?P<number>\d[\w.]*(?:(?<=[eEdD])[+-]\d\w*)?)"
    r"|(?P<word>[A-Za-z_]\w*)"
    r"|(?P<space>\r?\n[ \t]*|[ \t]+)"
    r"|(?P<operator>" + "|".join(map(re.escape, sorted(set(OPERATORS), key=len, reverse=True)))
    + r"|\#pragma(?=[ \t])|!\$omp\b|[-+*/%=<>!&|^~?:;,.()\[\]{}])"
    r"|(?P<other>.)",
    re.DOTALL | re.MULTILINE | re.ASCII,
)  # fmt: skip


class Piece(NamedTuple):
    """A piece of source: its kind, its text, the character and the line at which it begins."""

    kind: Kind
    text: str
    start: int
    line: int


class Renamed(NamedTuple):
    """A text with other identifiers, and the identifier that stood for each new one."""

    text: str
    names: dict[str, str]


def lex(text: str) -> list[Piece]:
    """Cuts a text into pieces; they join to the text.

    Comments, strings and preprocessor lines other than pragmas are one piece each, "verbatim".
    `//` begins a comment, so Fortran's concatenation of strings is read as one.

    >>> [piece.text for piece in lex("a[2*i] += x;")]
    ['a', '[', '2', '*', 'i', ']', ' ', '+=', ' ', 'x', ';']
    """
    pieces, line = [], 1
    for match in _PATTERN.finditer(text):
        kind, value = str(match.lastgroup), match[0]
        if kind == "word" and (value in KEPT or value.lower() in KEPT):
            kind = "keyword"
        pieces.append(Piece(kind, value, match.start(), line))  # type: ignore[arg-type]
        line += value.count("\n")
    return pieces


def rename(text: str, prefix: str = "v") -> Renamed:
    """Names each identifier by the order of its first use: v0, v1, ...

    Keywords, words of directives, functions of the libraries and OpenMP's own keep their names.
    `restore` takes the names back.

    >>> rename("s += a[i] * b[i];")
    Renamed(text='v0 += v1[v2] * v3[v2];', names={'v0': 's', 'v1': 'a', 'v2': 'i', 'v3': 'b'})
    """
    new: dict[str, str] = {}
    parts = []
    for piece in lex(text):
        if piece.kind == "word":
            parts.append(new.setdefault(piece.text, f"{prefix}{len(new)}"))
        else:
            parts.append(piece.text)
    return Renamed("".join(parts), {short: name for name, short in new.items()})


def restore(text: str, names: Mapping[str, str]) -> str:
    """Takes `rename` back, in that text or in another one that speaks of the same names."""
    return "".join(
        names.get(piece.text, piece.text) if piece.kind == "word" else piece.text
        for piece in lex(text)
    )


def compact(text: str) -> str:
    """A text without its layout: no indents, no empty lines, no comments, few blanks.

    Lines stay, as directives and Fortran end with them. It has half the tokens, so that a model
    reads longer loops, and reads each in one form.

    >>> compact("for (i = 0; i < n; i++)  // each\\n    int x = a[i];")
    'for(i=0;i<n;i++)\\nint x=a[i];'
    """
    parts: list[str] = []
    wordy = False
    for piece in lex(text):
        if piece.kind == "verbatim" and piece.text.startswith(("/*", "//")):
            continue
        if piece.kind == "space":
            if "\n" in piece.text and parts and parts[-1] != "\n":
                parts.append("\n")
                wordy = False
            continue
        word = piece.kind in ("word", "keyword", "number") or piece.text in ("#pragma", "!$omp")
        if word and wordy:
            parts.append(" ")
        parts.append(piece.text)
        wordy = word
    return "".join(parts).rstrip("\n")


def normalized(text: str) -> str:
    """What is left of a text without its names, its layout and its comments.

    Two items with the same normal form are the same item to a split.
    """
    spoken = (p.text for p in lex(rename(text).text) if p.kind != "space")
    return " ".join(word for word in spoken if not word.startswith(("/*", "//")))
