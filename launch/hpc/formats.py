"""Findings as text, JSON and SARIF 2.1.0."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jaxfm
from jaxfm.launch.hpc.findings import RACE, RACE_FREE, UNKNOWN, WITH, Finding
from jaxfm.tasks.hpc.pragma_grammar import NONE

_RULES = {
    RACE: ("hpc/race", "error", "Two iterations of a parallel loop may access one place at once."),
    WITH: ("hpc/parallel", "note", "A loop can run in parallel with the proposed directive."),
    RACE_FREE: ("hpc/race-free", "none", "A parallel loop has no data race."),
    UNKNOWN: ("hpc/unknown", "none", "Nothing can be told of a loop."),
}


def text(findings: Sequence[Finding]) -> str:
    """A few lines for each finding."""
    lines = []
    for finding in findings:
        where = f"{finding.path}:{finding.first_line}"
        inside = f" ({finding.function})" if finding.function else ""
        told = finding.verdict
        if told == WITH:
            told = f"race-free with {finding.pragma}"
        if finding.verdict == RACE and not finding.directive_line:
            told = "race if it ran in parallel"
        lines.append(f"{where}{inside}: {told}")
        lines.append(f"    {finding.reason}")
        if finding.verdict == RACE and finding.pragma:
            lines.append(f"    It is race-free with {finding.pragma}")
        lines += [f"    {note}" for note in finding.notes if finding.verdict != RACE]
        if finding.verified_by:
            lines.append(f"    shown by: {finding.verified_by}")
        if said := _guessed(finding):
            lines.append(f"    a model's guess, no proof: {said}")
    return "".join(f"{line}\n" for line in lines)


def _guessed(finding: Finding) -> str:
    """What models say of a loop, in words."""
    by = "" if finding.probability is None else f"race-free by {finding.probability:.2f}"
    if finding.guess in ("", NONE):
        serial = "leave it serial" if finding.guess else ""
        return "; ".join(filter(None, (serial, by)))
    if finding.probability is not None and finding.probability < 0.5:
        return f"leave it serial, for with {finding.guess} it would be {by}"
    return f"{finding.guess}, {by}" if by else finding.guess


def as_json(findings: Sequence[Finding]) -> str:
    """A JSON array with an object for each finding."""
    return json.dumps([f._asdict() for f in findings], indent=2) + "\n"


def sarif(findings: Sequence[Finding]) -> str:
    """A SARIF log with one run."""
    rules = [
        {"id": name, "shortDescription": {"text": says}, "defaultConfiguration": {"level": level}}
        for name, level, says in _RULES.values()
    ]
    driver = {"name": "jaxfm", "version": jaxfm.__version__, "rules": rules}
    log = {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "results": [_result(f) for f in findings]}],
    }
    return json.dumps(log, indent=2) + "\n"


def _result(finding: Finding) -> dict[str, Any]:
    name, level, _ = _RULES[finding.verdict]
    if finding.verdict == RACE and not finding.directive_line:
        level = "none"  # a serial loop does not race
    said = finding.reason if not finding.pragma else f"{finding.reason} {finding.pragma}"
    result: dict[str, Any] = {
        "ruleId": name,
        "level": level,
        "kind": {"error": "fail", "note": "informational"}.get(
            level, "pass" if finding.verdict == RACE_FREE else "notApplicable"
        ),
        "message": {"text": said},
        "locations": [_location(finding.path, finding.first_line, finding.last_line)],
        "properties": {
            "verdict": finding.verdict, "function": finding.function, "pragma": finding.pragma,
            "verifiedBy": finding.verified_by, "probability": finding.probability,
            "guess": finding.guess,
        },
    }  # fmt: skip
    if result["kind"] == "informational":
        result["kind"], result["level"] = "fail", "note"  # a level needs the kind "fail"
    if finding.lines:
        result["relatedLocations"] = [
            {"id": k, **_location(finding.path, line, line)} for k, line in enumerate(finding.lines)
        ]
    return result


def _location(path: str, first: int, last: int) -> dict[str, Any]:
    region = {"startLine": max(first, 1), "endLine": max(last, first, 1)}
    uri = pathlib.PurePath(path).as_posix().replace("%", "%25").replace(" ", "%20")
    return {"physicalLocation": {"artifactLocation": {"uri": uri}, "region": region}}
