"""Source files as syntax trees: which language a file is in, its text, its nodes by kind.

Fixed-form Fortran is turned into free form first, line by line, so that lines keep their numbers.
"""

from __future__ import annotations

import bisect
import functools
import importlib
import re
from typing import Any, Literal, NamedTuple

Language = Literal["c", "fortran", "fortran-fixed"]

SUFFIXES: dict[str, Language] = {
    ".c": "c", ".h": "c",
    ".f90": "fortran", ".f95": "fortran", ".f03": "fortran", ".f08": "fortran", ".f18": "fortran",
    ".f": "fortran-fixed", ".for": "fortran-fixed", ".ftn": "fortran-fixed",
    ".f77": "fortran-fixed",
}  # fmt: skip
"""Language by the suffix of a file in lower case."""

_GRAMMARS = {"c": "tree_sitter_c", "fortran": "tree_sitter_fortran"}
_DEEPEST = 1500
_BOM = b"\xef\xbb\xbf"


class Outside(Exception):
    """A loop is outside what a proof reads; the message is one sentence."""


class Directive(NamedTuple):
    """An OpenMP directive.

    Attributes:
        start, end: Where it stands, in bytes.
        line: The line at which it begins.
        text: Its text without the sentinel, on one line.
        next: Where the code after it begins.
    """

    start: int
    end: int
    line: int
    text: str
    next: int = 0


class Source(NamedTuple):
    """A parsed file.

    Attributes:
        language: Of the grammar: "c" or "fortran".
        text: The text, whose lines are those of the file.
        root: The root of the syntax tree. In C it has no pragmas, which its grammar only knows
            between whole statements.
        directives: The OpenMP directives in the order of the text.
    """

    language: Literal["c", "fortran"]
    text: bytes
    root: Any
    directives: tuple[Directive, ...] = ()

    def before(self, node: Any) -> int | None:
        """Index of the directive right before a node; None without one."""
        at = bisect.bisect_right(self.directives, node.start_byte, key=lambda d: d.start) - 1
        return at if at >= 0 and self.directives[at].next == node.start_byte else None


def parse(text: str | bytes, language: Language) -> Source:
    """Parses a file.

    Raises:
        ValueError: It is no text, in UTF-16, or nested too deeply for a parser.
        ImportError: The grammars are not installed.
    """
    data = text.encode() if isinstance(text, str) else text
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError("The file is in UTF-16; convert it to UTF-8.")
    if b"\0" in data:
        raise ValueError("The file is no source text: it holds null bytes.")
    if _depth(data) > _DEEPEST:
        raise ValueError(f"The file nests brackets deeper than {_DEEPEST:,} levels.")
    if data.startswith(_BOM):
        data = b"   " + data[3:]
    if language == "fortran-fixed":
        data = free_form(data)
    if language == "c":
        masked, directives = _masked(data)
        root = _parser("c").parse(masked).root_node
        told = [
            d for d in directives if _kind_at(root, d.start) not in ("comment", "string_content")
        ]
        return Source("c", data, root, _followed(told, masked, "c"))
    root = _parser("fortran").parse(data).root_node
    return Source("fortran", data, root, _followed(_sentinels(data), data, "fortran"))


def _depth(data: bytes) -> int:
    """How deeply brackets are nested at most, those in comments and strings included."""
    depth = deepest = 0
    for bracket in re.findall(rb"[(){}\[\]]", data):
        depth += 1 if bracket in b"({[" else -1
        deepest = max(deepest, depth)
    return deepest


def nodes(source: Source, query: str, root: Any = None) -> list[Any]:
    """The nodes that a query captures as @x under a root, in the order of the text."""
    from tree_sitter import QueryCursor

    cursor = QueryCursor(_query(source.language, query))
    found = cursor.captures(source.root if root is None else root).get("x", [])
    return sorted(found, key=lambda node: (node.start_byte, -node.end_byte))


def text_of(node: Any) -> str:
    """The text of a node."""
    return node.text.decode("utf-8", "replace")


def line_of(node: Any) -> int:
    """The line at which a node begins, from 1."""
    return node.start_point[0] + 1


def free_form(data: bytes) -> bytes:
    """Fixed-form Fortran as free form: the same lines, comments as `!`, `&` for continuations."""
    lines = [_fixed_line(line) for line in data.split(b"\n")]
    out: list[bytes] = []
    last = None  # index of the last line of code, which a continuation continues
    for kind, line in lines:
        if kind == "continued" and last is not None:
            out[last] += b" &"
        if kind == "directive" and out:
            out[-1] += b" &"
        if kind in ("code", "continued"):
            last = len(out)
        out.append(line)
    return b"\n".join(out)


def _fixed_line(line: bytes) -> tuple[str, bytes]:
    """Whether a line of fixed form is a "comment", "code" or "continued", and its free form."""
    line = line.rstrip(b"\r").expandtabs(6) if b"\t" in line[:6] else line.rstrip(b"\r")
    if not line.strip():
        return "comment", b""
    if line[:1] in b"cC*dD!":
        if line[1:5].lower() == b"$omp" and line[5:6] not in b" 0":
            return "directive", b"!$omp " + line[6:]  # it continues the one before
        return "comment", b"!" + line[1:]
    if line.lstrip().startswith(b"!") and line.find(b"!") != 5:
        return "comment", line
    if line[:1] == b"#":
        return "code", line
    line = line[:72]
    if len(line) > 5 and line[5:6] not in b" 0" and not line[:5].strip():
        return "continued", b"      " + _before_comment(line[6:])
    return "code", line[:5] + b" " + _before_comment(line[6:])


def _before_comment(line: bytes) -> bytes:
    """A line of code without its comment; a `!` in a string begins none."""
    quote = None
    for index in range(len(line)):
        character = line[index : index + 1]
        if quote is None and character == b"!":
            return line[:index]
        if quote is None and character in (b"'", b'"'):
            quote = character
        elif character == quote:
            quote = None
    return line


@functools.cache
def _parser(name: str) -> Any:
    try:
        from tree_sitter import Language, Parser

        grammar = importlib.import_module(_GRAMMARS[name])
    except ImportError as error:
        raise ImportError(
            f"Reading source files needs {_GRAMMARS[name].replace('_', '-')}: "
            "install it by `pip install jaxfm[hpc]`."
        ) from error
    return Parser(Language(grammar.language()))


@functools.cache
def _query(name: str, text: str) -> Any:
    from tree_sitter import Query

    return Query(_parser(name).language, text)


_PRAGMA = re.compile(
    rb"^[ \t]*(?:#|%:)[ \t]*pragma\b(?:[^\\\n]|\\\r?\n|\\.)*"
    rb"|\b_Pragma\s*\(\s*\"(?:[^\"\\\n]|\\.)*\"\s*\)",
    re.MULTILINE,
)
_SENTINEL = re.compile(rb"^[ \t]*!\$omp\b([^\n]*)", re.MULTILINE | re.IGNORECASE)


def _masked(data: bytes) -> tuple[bytes, list[Directive]]:
    """C without its pragmas, each byte at its place, and the OpenMP directives among them."""
    found = []

    def blank(match: re.Match) -> bytes:
        text = match[0].decode("utf-8", "replace")
        inner = re.match(r'_Pragma\s*\(\s*"(.*)"', text, re.DOTALL)
        text = inner[1] if inner else re.sub(r"^\s*(#|%:)\s*pragma\b", "", text)
        text = " ".join(_joined(text).split())
        if re.match(r"omp\b", text):
            line = data.count(b"\n", 0, match.start()) + 1
            found.append(Directive(match.start(), match.end(), line, text))
        return re.sub(rb"[^\r\n]", b" ", match[0])

    return _PRAGMA.sub(blank, data), found


def _sentinels(data: bytes) -> list[Directive]:
    """The OpenMP directives of free-form Fortran, continuation lines joined."""
    found: list[Directive] = []
    goes_on = False
    for match in _SENTINEL.finditer(data):
        text = match[1].decode("utf-8", "replace").split("!")[0].strip()
        more = text.endswith("&")
        text = text.strip("& ").lower()
        if goes_on and found:
            found[-1] = found[-1]._replace(end=match.end(), text=f"{found[-1].text} {text}")
        else:
            line = data.count(b"\n", 0, match.start()) + 1
            found.append(Directive(match.start(), match.end(), line, f"omp {text}"))
        goes_on = more
    return found


_GAP = {
    "c": re.compile(rb"(?:\s+|/\*.*?\*/|//(?:\\\r?\n|[^\n])*)*", re.DOTALL),
    "fortran": re.compile(rb"(?:\s+|![^\n]*)*"),
}


def _followed(directives: list[Directive], text: bytes, language: str) -> tuple[Directive, ...]:
    """Directives with the place of the code after each."""
    ends = [_GAP[language].match(text, d.end).end() for d in directives]  # type: ignore[union-attr]
    return tuple(d._replace(next=end) for d, end in zip(directives, ends))


def _kind_at(root: Any, at: int) -> str:
    node = root.descendant_for_byte_range(at, at + 1)
    return "" if node is None else node.type


def _joined(text: str) -> str:
    """A directive on one line: continuations and comments are taken out."""
    text = re.sub(r"\\\s*\n", " ", text)
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)
    return re.sub(r"//.*", "", text).strip()
