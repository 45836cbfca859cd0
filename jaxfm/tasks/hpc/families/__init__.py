"""Kinds of generated programs, one file each: a function that draws one on a sheet."""

from __future__ import annotations

from collections.abc import Callable

from jaxfm.tasks.hpc.families import (
    carried,
    criticals,
    guarded,
    histograms,
    indirect,
    inner,
    lines,
    nests,
    reductions,
    regions,
    scans,
    sections,
    stencils,
    tasks,
    temporaries,
    triangles,
)
from jaxfm.tasks.hpc.families.build import Draft, Sheet

LOOPS: dict[str, Callable[[Sheet], Draft]] = {
    "line": lines.draw,
    "nest": nests.draw,
    "stencil": stencils.draw,
    "triangle": triangles.draw,
    "indirect": indirect.draw,
    "guard": guarded.draw,
    "temporary": temporaries.draw,
    "last value": temporaries.draw_last,
    "reduction": reductions.draw,
    "scan": scans.draw,
    "carried": carried.draw,
    "inner loop": inner.draw,
    "histogram": histograms.draw,
    "critical": criticals.draw,
}
PROGRAMS: dict[str, Callable[[Sheet], Draft]] = {
    "region": regions.draw,
    "sections": sections.draw,
    "tasks": tasks.draw,
}
FAMILIES = LOOPS | PROGRAMS
