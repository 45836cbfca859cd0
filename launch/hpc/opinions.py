"""What a trained model thinks of loops of which the proof can tell nothing."""

from __future__ import annotations

from collections.abc import Sequence

from jaxfm.launch.hpc.findings import UNKNOWN, Finding
from jaxfm.tasks.hpc.lexer import lex
from jaxfm.tasks.hpc.pipelines import SHIPPED, RacePipeline, pipeline

PACKAGE = "package"
_DIRECTIVES = {"c": "#pragma omp parallel for", "fortran": "!$omp parallel do"}


def open_model(name: str) -> RacePipeline:
    """The model of a folder, or with the name "package" the one that comes with jaxfm."""
    if name == PACKAGE and not (SHIPPED / "race-detection").is_dir():
        raise ValueError(
            "No model comes with this package; train one: launch.hpc train --out=models/races."
        )
    return pipeline("race-detection", None if name == PACKAGE else name)  # type: ignore[return-value]


def with_probabilities(
    findings: Sequence[Finding], data: bytes, language: str, races: RacePipeline
) -> list[Finding]:
    """Findings of a file, with a probability of race-free where the proof cannot tell.

    A loop without a directive is asked about under `parallel for`. A verdict stays as it is, and
    nothing that a model says is called shown. What is no loop, or is longer than what the model
    reads, gets no probability.

    Args:
        findings: Of `findings.advise` or `findings.check`.
        data: The content of the file.
        language: "c", "fortran" or "fortran-fixed".
        races: The model.
    """
    lines = data.decode("utf-8", "replace").split("\n")
    asked: dict[int, str] = {}
    for number, finding in enumerate(findings):
        text = _loop_text(finding, lines, "c" if language == "c" else "fortran")
        if finding.verdict == UNKNOWN and text and not races.reader.cut(text):
            asked[number] = text
    answers = dict(zip(asked, races(list(asked.values()))))
    return [
        f._replace(probability=round(1 - answers[k].probability, 4)) if k in answers else f
        for k, f in enumerate(findings)
    ]


def _loop_text(finding: Finding, lines: list[str], language: str) -> str:
    """The lines of a finding's loop with a directive in front; "" if there is no loop."""
    first = finding.directive_line or finding.first_line
    text = "\n".join(lines[first - 1 : finding.last_line])
    keywords = {p.text.lower() for p in lex(text) if p.kind == "keyword"}
    if not keywords & {"for", "do"}:
        return ""
    return text if finding.directive_line else f"{_DIRECTIVES[language]}\n{text}"
