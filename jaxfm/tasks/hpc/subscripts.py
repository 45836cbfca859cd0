"""Subscripts as linear forms, read from the lexer's pieces."""

from __future__ import annotations

from jaxfm.tasks.hpc.lexer import Piece

Linear = tuple[dict[str, int], int]


def linear(pieces: tuple[Piece, ...]) -> Linear | None:
    """A subscript as (coefficient of each name, constant); None where it is not linear.

    >>> from jaxfm.tasks.hpc.lexer import lex
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
