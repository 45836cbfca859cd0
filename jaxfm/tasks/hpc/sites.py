"""Centers whose code differs by dialect and whose labels come from unequal tools."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from jaxfm.tasks.hpc.generator import generate
from jaxfm.tasks.hpc.naming import normalized, restyle
from jaxfm.tasks.hpc.render import to_c, to_fortran

FALSE_ALARMS = 141 / 145
"""Share of race-free loops that gcc's ThreadSanitizer calls racy, as it does not see libgomp's
ordering: measured with gcc 12.2 on generated loops, many regions in a process."""

Labels = Literal["proof", "false alarms", "inverted"]


class Dialect(NamedTuple):
    """What a site writes: families of the generator, the language, and its share of all items."""

    families: tuple[str, ...]
    language: Literal["c", "fortran"]
    share: float


DIALECTS = {
    "dense Fortran": Dialect(("line", "nest", "stencil", "triangle"), "fortran", 0.4),
    "sparse C": Dialect(("indirect", "histogram", "guard", "inner loop"), "c", 0.3),
    "reductions": Dialect(("reduction", "scan", "carried", "temporary"), "c", 0.2),
    "tasks and regions": Dialect(("tasks", "region", "sections"), "c", 0.1),
}


class Example(NamedTuple):
    """A source, its family, whether it truly races, and what the site's tool calls it."""

    source: str
    family: str
    racy: bool
    label: bool


class Sites(NamedTuple):
    """Training examples by site, and test examples by family, whose labels are all proved."""

    train: dict[str, list[Example]]
    test: dict[str, list[Example]]


def sites(
    seed: int,
    count: int,
    test_per_family: int,
    *,
    labels: Mapping[str, Labels] | None = None,
    dialects: Mapping[str, Dialect] = DIALECTS,
) -> Sites:
    """Draws all sites; no test item equals a training item but for names.

    Args:
        seed: Decides everything.
        count: Training items of all sites together, split by `Dialect.share`.
        test_per_family: Items of each family of any site, fewer where most drawn ones were in
            training; a half is asked for in Fortran.
        labels: How some sites label: "proof" (all others), "false alarms" (a share `FALSE_ALARMS`
            of race-free items is called racy), "inverted".

    Raises:
        ValueError: A site or a way to label that there is not, or counts below 1.
    """
    labels = labels or {}
    for name, how in labels.items():
        if name not in dialects or how not in ("proof", "false alarms", "inverted"):
            raise ValueError(
                f"'{name}' cannot label by '{how}'; sites are {', '.join(dialects)}, and labels "
                "proof, false alarms, inverted."
            )
    if count < 1 or test_per_family < 1:
        raise ValueError(f"Give at least one item, not {count} and {test_per_family} a family.")
    rng, seen, train = random.Random(f"{seed}/sites"), set(), {}
    for number, (name, dialect) in enumerate(dialects.items()):
        drawn = generate(1000 * seed + number, round(count * dialect.share), dialect.families)
        seen |= {normalized(item.program) for item in drawn}
        how = labels.get(name, "proof")
        train[name] = [_example(item, rng, dialect.language, how) for item in drawn]
    test = {}
    families = dict.fromkeys(f for dialect in dialects.values() for f in dialect.families)
    for family in families:
        drawn = generate(1000 * seed + 999, 4 * test_per_family, [family])
        fresh = [item for item in drawn if normalized(item.program) not in seen]
        test[family] = [
            _example(item, rng, rng.choice(("c", "fortran")), "proof")
            for item in fresh[:test_per_family]
        ]
    return Sites(train, test)


def unseen(dialect: Dialect, test: Mapping[str, Sequence[Example]]) -> list[Example]:
    """The test examples of families that a site has never seen."""
    return [x for family, xs in test.items() if family not in dialect.families for x in xs]


def _example(item, rng: random.Random, language: str, how: Labels) -> Example:
    program, style = restyle(item.program, rng)
    write = to_fortran if language == "fortran" and language in item.languages else to_c
    alarm = how == "false alarms" and not item.racy and rng.random() < FALSE_ALARMS
    label = not item.racy if how == "inverted" else item.racy or alarm
    return Example(write(program, style=style).text, item.family, item.racy, label)
