"""The pragmas that may stand before a loop, as a regular expression for decoding."""

from __future__ import annotations

import re
from collections.abc import Sequence

NONE = "none"  # the answer that no pragma helps
_DIRECTIVES = {"c": "#pragma omp parallel for", "fortran": "!$omp parallel do"}
OPERATORS = {"c": ("+", "*", "min", "max"), "fortran": ("+", "*", "min", "max")}


def pragma_grammar(
    variables: Sequence[str], arrays: Sequence[str] = (), *, sections: Sequence[str] = (),
    depth: int = 1, language: str = "c",
) -> str:  # fmt: skip
    """The pattern of an OpenMP loop directive whose clauses name only what the loop has, or "none".

    Clauses stand in one order, each at most once: private, firstprivate, lastprivate, a reduction
    for each operator, collapse, schedule. A list has each name at most once, in the order given
    here; the pattern does not keep a name from standing in two clauses.

    Args:
      variables: scalars that the loop reads or writes.
      arrays: names that only private, firstprivate and lastprivate may have, too.
      sections: what only reductions may have, too, for example "h[0:n]" in C.
      depth: loops nested perfectly, which `collapse` may count to.
      language: "c" or "fortran".
    Raises:
      ValueError: another language, or a depth below 1.
    """
    if language not in _DIRECTIVES:
        raise ValueError(f"language={language!r}: give one of {sorted(_DIRECTIVES)}.")
    if depth < 1:
        raise ValueError(f"depth={depth}: give the number of nested loops, at least 1.")
    options = []
    if names := [*variables, *arrays]:
        options += [rf"{kind}\({_listed(names)}\)" for kind in _KINDS]
    if reduced := [*variables, *sections]:
        signs = map(re.escape, OPERATORS[language])
        options += [rf"reduction\({sign}: {_listed(reduced)}\)" for sign in signs]
    if depth > 1:
        options.append(rf"collapse\((?:{'|'.join(str(n) for n in range(2, depth + 1))})\)")
    options.append(r"schedule\((?:static|dynamic|guided)(?:, [1-9]\d{0,3})?\)")
    clauses = "".join(f"(?: {option})?" for option in options)
    return f"(?:{NONE}|{re.escape(_DIRECTIVES[language])}{clauses})"


_KINDS = ("private", "firstprivate", "lastprivate")


def _listed(names: Sequence[str]) -> str:
    """The lists of one or more names in their order."""
    escaped = [re.escape(name) for name in dict.fromkeys(names)]
    begins = (
        name + "".join(f"(?:, {later})?" for later in escaped[i + 1 :])
        for i, name in enumerate(escaped)
    )
    return f"(?:{'|'.join(begins)})"
