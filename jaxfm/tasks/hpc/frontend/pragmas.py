"""OpenMP directives as text: parsed into a `Pragma`, written in C or Fortran."""

from __future__ import annotations

import re

from jaxfm.tasks.hpc.frontend.source import Outside
from jaxfm.tasks.hpc.program import Clause, Pragma

# Directives of several words, longest first.
_DIRECTIVES = (
    "parallel for simd", "parallel do simd", "parallel for", "parallel do", "parallel sections",
    "for simd", "do simd", "declare simd", "declare reduction", "end parallel do simd",
    "end parallel do", "end parallel", "end do simd", "end do", "end critical", "end single",
    "end master", "end atomic", "end simd", "taskloop simd",
)  # fmt: skip
_CLAUSE = re.compile(r"\s*,?\s*([A-Za-z_]\w*)\s*")
# What a clause may be without changing what races.
HARMLESS = frozenset(("schedule", "num_threads", "proc_bind", "if", "shared", "default", "order"))
KNOWN = HARMLESS | {"private", "firstprivate", "lastprivate", "reduction", "collapse", "nowait"}


_FORTRAN_SIGNS = {"iand": "&", "ior": "|", "ieor": "^", ".and.": "&&", ".or.": "||"}
_ALONE = ("barrier", "taskwait", "taskyield", "flush", "threadprivate", "declare", "end",
          "requires", "cancel", "cancellation", "depobj")  # fmt: skip


def stands_alone(text: str) -> bool:
    """Whether a directive takes no statement after it."""
    return text.split("(")[0].split()[1:2] != [] and text.split()[1].startswith(_ALONE)


def parse_pragma(text: str, language: str) -> Pragma | None:
    """The OpenMP directive of a text without its sentinel; None if it is another's.

    Args:
        text: In C what follows `#pragma`, in Fortran what follows `!$`; on one line.
        language: "c" or "fortran".
    Raises:
        Outside: The clauses cannot be read.
    """
    if language == "fortran":
        text = text.lower()
    match = re.match(r"\s*omp\s+(.*)", text, re.DOTALL)
    if match is None:
        return None
    rest = " ".join(match[1].split())
    rest = re.sub(r"\b(parallel|end)(do|for|parallel)\b", r"\1 \2", rest)
    head = next((d for d in _DIRECTIVES if re.match(rf"{d}\b", rest)), None)
    if head is None:
        first = re.match(r"[a-z]+( (teams|distribute|parallel|for|do|simd|data))*", rest)
        if first is None:
            raise Outside("The directive cannot be read.")
        head = first[0] if first[0].startswith(("target", "teams", "distribute")) else (
            first[0].split()[0]
        )  # fmt: skip
    clauses = _clauses(rest[len(head) :], head)
    if language == "fortran":
        clauses = tuple(
            c._replace(modifier=_FORTRAN_SIGNS.get(c.modifier, c.modifier)) for c in clauses
        )
    return Pragma(re.sub(r"\bdo\b", "for", head), clauses)


def combined(pragma: Pragma, regions: tuple[str, ...], language: str) -> Pragma:
    """A directive with the clauses of the parallel region that it belongs to.

    Args:
        pragma: The directive of a loop.
        regions: Those of the constructs around it, innermost first.
        language: Of the directives.
    Raises:
        Outside: The constructs around it are others than one `parallel` around a `for`.
    """
    own = not pragma.directive.startswith("for")
    if len(regions) > (0 if own else 1):
        raise Outside("The directive is inside other OpenMP constructs.")
    if own:
        return pragma
    around = parse_pragma(regions[0], language) if regions else None
    if around is None:
        raise Outside("The directive belongs to a parallel region that is not in this function.")
    if around.directive != "parallel":
        raise Outside(f"The directive is in a construct {around.directive}, which is not judged.")
    return pragma._replace(clauses=pragma.clauses + around.clauses)


def write_pragma(pragma: Pragma, language: str) -> str:
    """A directive as one line of C or free-form Fortran."""
    clauses = " ".join(_written(clause, language) for clause in pragma.clauses)
    directive = pragma.directive
    if language == "fortran":
        directive = re.sub(r"\bfor\b", "do", directive)
    sentinel = "#pragma omp" if language == "c" else "!$omp"
    return f"{sentinel} {directive} {clauses}".rstrip()


def _written(clause: Clause, language: str) -> str:
    names = ", ".join(str(argument) for argument in clause.arguments)
    if clause.modifier:
        fortran = {sign: name for name, sign in _FORTRAN_SIGNS.items()}
        sign = clause.modifier if language == "c" else fortran.get(clause.modifier, clause.modifier)
        return f"{clause.name}({sign}: {names})"
    return f"{clause.name}({names})" if names else clause.name


def _clauses(text: str, head: str) -> tuple[Clause, ...]:
    """The clauses of a directive's text."""
    found: list[Clause] = []
    if head == "critical" and (name := re.fullmatch(r"\s*\(\s*(\w+)\s*\)\s*", text)):
        return (Clause("name", (name[1],)),)
    position = 0
    while text[position:].strip(" ,\t"):
        match = _CLAUSE.match(text, position)
        if match is None:
            raise Outside(f"The clauses {text.strip()!r} cannot be read.")
        word, position = match[1].lower(), match.end()
        inner = ""
        if text[position : position + 1] == "(":
            end = _closing(text, position)
            inner, position = text[position + 1 : end], end + 1
        found.append(_clause(word, inner))
    return tuple(found)


def _clause(name: str, inner: str) -> Clause:
    modifier, colon, rest = inner.partition(":")
    if name in ("reduction", "depend", "linear", "map") and colon and "[" not in modifier:
        return Clause(name, _split(rest), modifier.strip())
    return Clause(name, _split(inner))


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    raise Outside(f"The clauses {text.strip()!r} cannot be read.")


def _split(text: str) -> tuple[str, ...]:
    """A list's items; commas inside brackets do not count."""
    items, depth, item = [], 0, ""
    for character in text:
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            items.append(item.strip())
            item = ""
        else:
            item += character
    return tuple(x for x in [*items, item.strip()] if x)
