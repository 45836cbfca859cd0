"""Other names for the same program: chosen, at random, or in order for finding duplicates."""

from __future__ import annotations

import random
from typing import Any

from jaxfm.tasks.hpc.families.build import ARRAYS, LOOPS, SCALARS, SIZES
from jaxfm.tasks.hpc.program import Clause, For, Program, Statement, walk
from jaxfm.tasks.hpc.render import Style, random_style


def renamed(program: Program, mapping: dict[str, str]) -> Program:
    """A program with other names; names that the mapping lacks stay.

    Raises:
        ValueError: Two names would become one.
    """
    names = named(program)
    new = [mapping.get(name, name) for name in names]
    if len(set(new)) < len(new):
        twice = sorted({name for name in new if new.count(name) > 1})
        raise ValueError(f"Two names become '{twice[0]}'; give each name another one.")
    return _renamed(program, {name: mapping[name] for name in names if name in mapping})


def named(program: Program) -> list[str]:
    """All names of a program: sizes, arrays, scalars, then loop variables, in order."""
    declared = [x.name for x in program.sizes] + [x.name for x in program.arrays]
    declared += [x.name for x in program.scalars]
    loops = [s.var for _, s in walk(program.body) if isinstance(s, For)]
    return list(dict.fromkeys((*declared, *loops)))


def restyle(program: Program, rng: random.Random) -> tuple[Program, Style]:
    """A program with names of the same kinds drawn anew, and a style to write it in."""
    pools: list[tuple[tuple[Any, ...], tuple[str, ...]]] = [
        (program.sizes, SIZES),
        (program.arrays, ARRAYS),
        (program.scalars, SCALARS),
    ]
    taken: set[str] = set()
    mapping: dict[str, str] = {}

    def draw(name: str, pool: tuple[str, ...]) -> None:
        free = [x for x in pool if x not in taken]
        mapping[name] = rng.choice(free) if free else f"{rng.choice(pool)}{len(taken)}"
        taken.add(mapping[name])

    counters = [s.var for _, s in walk(program.body) if isinstance(s, For)]
    for name in dict.fromkeys(counters):
        draw(name, LOOPS)
    for declared, pool in pools:
        for variable in declared:
            if variable.name not in mapping:
                draw(variable.name, pool)
    return renamed(program, mapping), random_style(rng)


def normalized(program: Program) -> Program:
    """A program with names by their order of first use: equal for programs equal but for names.

    Declarations stand in the order of use, too, and what is declared but not used is dropped.
    """
    order: dict[str, None] = {}
    known = set(named(program))

    def visit(value: Any) -> None:
        if isinstance(value, str):
            if value in known:
                order.setdefault(value)
        elif isinstance(value, tuple):
            for part in value:
                visit(part)

    visit(program.body)
    visit(tuple(array.shape for array in program.arrays if array.name in order))
    place = {name: number for number, name in enumerate(order)}

    def sorted_by_use(variables):
        used = [x for x in variables if x.name in place]
        return tuple(sorted(used, key=lambda x: place[x.name]))

    ordered = Program(
        sorted_by_use(program.sizes),
        sorted_by_use(program.arrays),
        sorted_by_use(program.scalars),
        program.body,
    )
    return _renamed(ordered, {name: f"v{number}" for name, number in place.items()})


def _renamed(program: Program, mapping: dict[str, str]) -> Program:
    def statement(value: Statement) -> Statement:
        return change(value)

    def change(value: Any) -> Any:
        if isinstance(value, Clause):
            own = value.name in ("name", "schedule", "default")
            inside = value.arguments if own else change(value.arguments)
            return value._replace(arguments=inside)
        if hasattr(value, "_fields"):
            # Text in a field is a name, but for operators, types and kinds.
            kept = ("dtype", "content", "directive", "update", "value", "step", "live")
            op = type(value).__name__ == "Op"
            fields = {
                field: part if field in kept or (op and field == "name") else change(part)
                for field, part in zip(value._fields, value)
            }
            if "value" in value._fields and not isinstance(value.value, int | float):
                fields["value"] = change(value.value)
            return type(value)(**fields)
        if isinstance(value, tuple):
            return tuple(change(part) for part in value)
        return mapping.get(value, value) if isinstance(value, str) else value

    return Program(
        change(program.sizes),
        change(program.arrays),
        change(program.scalars),
        tuple(statement(s) for s in program.body),
    )
