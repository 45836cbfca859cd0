"""Sets of questions for T2: the splits of `records`, with loops that no directive makes right."""

from __future__ import annotations

import random
from collections.abc import Sequence

from jaxfm.tasks.hpc.directives import Question, question
from jaxfm.tasks.hpc.families import LOOPS
from jaxfm.tasks.hpc.generator import generate
from jaxfm.tasks.hpc.lexer import lex, normalized, rename
from jaxfm.tasks.hpc.naming import named, renamed
from jaxfm.tasks.hpc.records import SPLITS, UNSEEN_FAMILIES


def questions(
    seed: int, train: int, test: int, names: Sequence[str] = SPLITS
) -> dict[str, list[Question]]:
    """Questions of each split, none with the normal form of one in a split before it.

    Args:
        seed: Decides everything.
        train, test: Programs drawn for the training split, and for each other one.
        names: Of `records.SPLITS`, which says what they are; all are drawn in its order.
    """
    seen: set[str] = set()
    found: dict[str, list[Question]] = {}
    for place, name in enumerate(SPLITS):
        if name not in names:
            continue
        hidden = name == "unseen family"
        items = generate(
            seed * len(SPLITS) + place, train if name == "train" else test,
            [family for family in LOOPS if (family in UNSEEN_FAMILIES) == hidden],
            coefficients="unseen" if name == "unseen coefficients" else "usual",
            statements=3 if name == "longer bodies" else 0,
        )  # fmt: skip
        rng = random.Random(f"{seed}/{name}")
        found[name] = []
        for item in items:
            made = question(item, rng, "fortran" if name == "other language" else "c")
            if made is None or (key := normalized(made.source)) in seen:
                continue
            seen.add(key)
            found[name].append(obscured(made) if name == "renamed" else made)
    return found


def obscured(asked: Question) -> Question:
    """The same with identifiers that no other split uses."""
    new = {name: f"zq{number}_{len(name)}" for number, name in enumerate(named(asked.program))}
    return with_names(asked, new)


def in_order(asked: Question) -> Question:
    """The same with names v0, v1, ... by the order of their first use, as `lexer.rename` gives."""
    new = {name: short for short, name in rename(asked.source).names.items()}
    unused = (name for name in named(asked.program) if name not in new)
    return with_names(asked, new | {name: f"v{len(new) + k}" for k, name in enumerate(unused)})


def with_names(asked: Question, new: dict[str, str]) -> Question:
    """The same with other names."""
    change = lambda text: "".join(new.get(piece.text, piece.text) for piece in lex(text))
    return asked._replace(
        source=change(asked.source), answer=change(asked.answer),
        program=renamed(asked.program, new),
    )  # fmt: skip
