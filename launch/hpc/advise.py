"""Says which loops of C and Fortran files can run in parallel, and with which OpenMP directive.

    python -m jaxfm.launch.hpc advise solver.c src/
    python -m jaxfm.launch.hpc advise --format=diff src/ | patch -p1
    python -m jaxfm.launch.hpc advise --write solver.c

For each loop, outer ones first: race-free with a directive (proved for all sizes by integer sets),
race if it ran in parallel (with the two lines and iterations), or "cannot tell" with the reason.
With --model=package, or folders of `train`, a model's directive and probability of race-free stand
where nothing is told; they are guesses, and no verdict or file changes for them.
Files are changed only with --write, which puts the proved directives in and touches nothing else.
Whether a loop is worth its threads is not judged.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Literal

from jaxfm.config import check as check_fields
from jaxfm.config import option
from jaxfm.launch.hpc import edits, formats, opinions
from jaxfm.launch.hpc.findings import Finding, advise, all_findings, language_of


@dataclasses.dataclass(frozen=True)
class AdviseConfig:
    """Files, and what may be assumed of them."""

    path: tuple[str, ...] = option((), "a file or a folder (--path= may be left out)", repeat=True)
    format: Literal["text", "json", "sarif", "diff"] = option("text", "how findings are shown")
    write: bool = option(False, "put the proved directives into the files")
    assume_no_alias: bool = option(False, "take it that no two pointers reach the same memory")
    assume_in_bounds: bool = option(
        False, "take it that each subscript stays within its dimension of an array"
    )
    time_limit_s: float = option(8.0, "seconds for the proofs of a file")
    model: tuple[str, ...] = option(
        (), "ask models where the proof cannot tell: 'package', or a folder of train", repeat=True
    )

    def __post_init__(self):
        check_fields(self)
        check_paths(self)
        if not all(self.model):
            raise ValueError("model='': give 'package' or a folder.")


CONFIG = AdviseConfig


def check_paths(config) -> None:
    """Checks what the commands share.

    Raises:
        ValueError: No path, or no time.
    """
    if not 0 < config.time_limit_s < float("inf"):
        raise ValueError(f"time_limit_s={config.time_limit_s}: give seconds above 0.")
    if not all(config.path):
        raise ValueError("path='': give a file or a folder.")


def assumptions(config) -> frozenset[str]:
    """What the user vouches for."""
    given = {"no_alias": config.assume_no_alias, "in_bounds": config.assume_in_bounds}
    return frozenset(name for name, value in given.items() if value)


def show(findings: list[Finding], form: str) -> None:
    """Prints findings in a format."""
    shown = {"text": formats.text, "json": formats.as_json, "sarif": formats.sarif}[form]
    sys.stdout.write(shown(findings))


def main(config: AdviseConfig) -> None:
    """Looks at every file and shows what it finds."""
    if not config.path:
        raise ValueError("Give a file or a folder: advise file.c.")
    found: list[Finding] = []
    options = {"assume": assumptions(config), "limit_s": config.time_limit_s}
    models = opinions.open_models(config.model)
    for path, data, findings in all_findings(config.path, advise, **options):
        findings = opinions.with_opinions(findings, data, language_of(path), models)
        lines = edits.insertions(findings, data, language_of(path))
        if config.format == "diff":
            sys.stdout.flush()
            sys.stdout.buffer.write(edits.unified_diff(path, data, lines))
        if config.write and lines:
            edits.write(path, data, lines)
        found += findings
    if config.format != "diff":
        show(found, config.format)
