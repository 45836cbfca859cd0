"""Says whether the OpenMP loops of C and Fortran files are free of data races.

    python -m jaxfm.launch.hpc check solver.c src/

Each directive that shares work is race-free for all sizes, a race (with the two lines and
iterations), or "cannot tell" with the reason. The exit status is 1 if any of them races, with
--strict also if anything cannot be told, else 0.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Literal

from jaxfm.config import check as check_fields
from jaxfm.config import option
from jaxfm.launch.hpc.advise import assumptions, check_paths, show
from jaxfm.launch.hpc.findings import RACE, UNKNOWN, Finding, all_findings, check


@dataclasses.dataclass(frozen=True)
class CheckConfig:
    """Files, and what may be assumed of them."""

    path: tuple[str, ...] = option((), "a file or a folder (--path= may be left out)", repeat=True)
    format: Literal["text", "json", "sarif"] = option("text", "how findings are shown")
    strict: bool = option(False, "exit with status 1 also where something cannot be told")
    assume_no_alias: bool = option(False, "take it that no two pointers reach the same memory")
    assume_in_bounds: bool = option(
        False, "take it that each subscript stays within its dimension of an array"
    )
    time_limit_s: float = option(8.0, "seconds for the proofs of a file")

    def __post_init__(self):
        check_fields(self)
        check_paths(self)


CONFIG = CheckConfig


def main(config: CheckConfig) -> None:
    """Judges every directive, shows what is found, and exits with 1 where one races."""
    if not config.path:
        raise ValueError("Give a file or a folder: check file.c.")
    options = {"assume": assumptions(config), "limit_s": config.time_limit_s}
    found: list[Finding] = []
    for _, _, findings in all_findings(config.path, check, **options):
        found += findings
    show(found, config.format)
    wrong = {RACE, UNKNOWN} if config.strict else {RACE}
    if any(finding.verdict in wrong for finding in found):
        sys.exit(1)
