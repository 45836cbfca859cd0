"""What a task is: examples, splits, metric, baselines; the tasks that there are."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxfm.plain_types import suggest
from jaxfm.tasks.hpc.generator import Item, generate
from jaxfm.tasks.hpc.lexer import lex, normalized
from jaxfm.tasks.hpc.naming import renamed

UNSEEN_FAMILIES = ("stencil", "guard", "scan", "critical", "sections")
SPLITS = (
    "train", "validation", "in distribution", "unseen coefficients", "unseen family",
    "longer bodies", "other language", "renamed",
)  # fmt: skip


class Example(NamedTuple):
    """A source and its answer.

    Attributes:
        source: What a model reads.
        label: The answer: 1 for a race, a directive's text, a number, costs by configuration; see
            the task's module.
        lines: The lines (from 1) of the racing pair; empty without one.
        family: The generator's.
        item: What the generator knows, for verifiers; None in rows that were read from a file.
    """

    source: str
    label: int | float | str | tuple[float, ...]
    lines: tuple[int, ...]
    family: str
    item: Item | None = None


Baseline = Callable[[Sequence[Example], Sequence[Example]], np.ndarray | list]
PlaceBaseline = Callable[[Sequence[Example], Sequence[Example]], list[list[int]]]


class Record(NamedTuple):
    """A task.

    Attributes:
        name: Of the task, for example "race-detection".
        examples: `(item, rng, language) -> examples` of one item, none where it has none.
        families: The generator's families that it draws from.
        metric: `(labels, predictions) -> figures by name`.
        baselines: By name, `(train, test) -> predictions` without any network.
        verifier: What confirms an answer: a module of `jaxfm.tasks.hpc`.
        place: `(test examples, ranked lines of each) -> figures by name`, where the task asks for
            places, too.
        place_baselines: By name, `(train, test) -> ranked lines of each`, the likeliest first.
    """

    name: str
    examples: Callable[[Item, random.Random, str], Iterable[Example]]
    families: tuple[str, ...]
    metric: Callable[[Sequence, Sequence], dict[str, float]]
    baselines: dict[str, Baseline]
    verifier: str
    place: Callable[[Sequence[Example], Sequence[Sequence[int]]], dict[str, float]] | None = None
    place_baselines: dict[str, PlaceBaseline] | None = None


_RECORDS: dict[str, Record] = {}


def register(record: Record) -> Record:
    """Adds a task.

    Raises:
        ValueError: It has no baseline, or its name is taken.
    """
    if not record.baselines or (record.place and not record.place_baselines):
        raise ValueError(
            f"The task {record.name!r} has no baseline; give it a trivial one, such as the "
            "majority, so that its figures say something."
        )
    if record.name in _RECORDS:
        raise ValueError(f"There is a task {record.name!r} already; choose another name.")
    _RECORDS[record.name] = record
    return record


def record(name: str) -> Record:
    """The task of a name.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in _RECORDS:
        raise ValueError(f"There is no task {name!r}. {suggest(name, _RECORDS)}")
    return _RECORDS[name]


def names() -> tuple[str, ...]:
    """The tasks that there are."""
    return tuple(_RECORDS)


def splits(
    task: Record, seed: int, train: int, test: int, names: Sequence[str] = SPLITS
) -> dict[str, list[Example]]:
    """Examples of each split, none with the normal form of one in a split before it.

    Args:
        task: Whose examples.
        seed: Decides everything.
        train, test: Items drawn for the training split, and for each other one.
        names: Of `SPLITS`; "train" always comes first. The training split is C and lacks
            `UNSEEN_FAMILIES`, which "unseen family" alone has.
    """
    seen: set[str] = set()
    found: dict[str, list[Example]] = {}
    for name in SPLITS:
        if name in names:
            rows = drawn(task, seed, name, 0, train if name == "train" else test)
            found[name] = fresh(rows, seen)
    return found


def drawn(task: Record, seed: int, name: str, start: int, count: int) -> list[Example]:
    """The examples of the items `start` to `start + count` of a split, duplicates among them."""
    hidden = name == "unseen family"
    items = generate(
        seed * len(SPLITS) + SPLITS.index(name), count,
        [f for f in task.families if (f in UNSEEN_FAMILIES) == hidden],
        coefficients="unseen" if name == "unseen coefficients" else "usual",
        statements=3 if name == "longer bodies" else 0,
        start=start,
    )  # fmt: skip
    language = "fortran" if name == "other language" else "c"
    rows: list[Example] = []
    for number, item in enumerate(items, start):
        rows += task.examples(item, random.Random(f"{seed}/{name}/{number}"), language)
    return [_obscured(row) for row in rows] if name == "renamed" else rows


def fresh(rows: Sequence[Example], seen: set[str]) -> list[Example]:
    """The rows whose normal form is not among those seen, to which theirs are added."""
    kept = []
    for row in rows:
        key = normalized(row.source)
        if key not in seen:
            seen.add(key)
            kept.append(row)
    return kept


def _obscured(row: Example) -> Example:
    """The same with identifiers that no other split uses, in an answer that is text, too."""
    new: dict[str, str] = {}
    for piece in lex(row.source):
        if piece.kind == "word":
            new.setdefault(piece.text, f"zq{len(new)}_{len(piece.text)}")
    change = lambda text: "".join(new.get(piece.text, piece.text) for piece in lex(text))
    if isinstance(row.label, str):
        assert row.item is not None  # a text is about a program
        item = row.item._replace(program=renamed(row.item.program, new))
        row = row._replace(label=change(row.label), item=item)
    return row._replace(source=change(row.source))
