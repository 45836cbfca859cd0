"""What trained models think of loops of which the proof can tell nothing."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from jaxfm.launch.hpc import pragmas
from jaxfm.launch.hpc.completions import Completer
from jaxfm.launch.hpc.findings import UNKNOWN, Finding
from jaxfm.tasks.hpc.lexer import lex
from jaxfm.tasks.hpc.pipelines import SHIPPED, RacePipeline, pipeline
from jaxfm.tasks.hpc.pragma_grammar import NONE

PACKAGE = "package"
_DIRECTIVES = {"c": "#pragma omp parallel for", "fortran": "!$omp parallel do"}


class Models(NamedTuple):
    """Who is asked.

    Attributes:
        races: Whether a loop races under its directive.
        writer: Which directive a loop of C should have.
    """

    races: RacePipeline | None = None
    writer: Completer | None = None


def open_models(names: Sequence[str]) -> Models:
    """The models of folders; with the name "package" those that come with jaxfm.

    Raises:
        FileNotFoundError: A folder holds no model.
        ValueError: None comes with this package, or two are for one task.
    """
    found = Models()
    for name in names:
        folders = [pathlib.Path(name)]
        if name == PACKAGE:
            folders = sorted(f for f in SHIPPED.glob("*") if f.is_dir())
            if not folders:
                raise ValueError(
                    "No model comes with this package; train one: launch.hpc train --out=FOLDER."
                )
        for folder in folders:
            if (folder / pragmas.FILE).exists():
                opened: Models = Models(writer=pragmas.load(folder))
            else:
                opened = Models(races=pipeline("race-detection", folder))  # type: ignore[arg-type]
            for field, model in opened._asdict().items():
                if model is not None and getattr(found, field) is not None:
                    raise ValueError(f"model={name!r}: give one model for each task.")
                found = found._replace(**{field: model}) if model is not None else found
    return found


def with_opinions(
    findings: Sequence[Finding], data: bytes, language: str, models: Models
) -> list[Finding]:
    """Findings of a file with what models say where the proof cannot tell.

    First a decoder writes a directive for loops of C that have none, then a reader gives the
    probability that each loop is race-free under the directive that it has, or was written.
    See `with_probabilities`.
    """
    if models.writer is not None and language == "c":
        findings = with_guesses(findings, data, models.writer)
    if models.races is not None:
        findings = with_probabilities(findings, data, language, models.races)
    return list(findings)


def with_guesses(findings: Sequence[Finding], data: bytes, writer: Completer) -> list[Finding]:
    """Findings of a file of C, with a decoder's directive for loops of which nothing is told.

    A loop that has a directive, or is longer than what the decoder was trained on, gets none. A
    verdict stays as it is, and no file is changed for a guess.
    """
    lines = data.decode("utf-8", "replace").split("\n")
    asked = {
        number: text
        for number, f in enumerate(findings)
        if f.verdict == UNKNOWN and not f.directive_line and (text := _loop(f, lines))
    }
    said = dict(zip(asked, pragmas.guesses(writer, list(asked.values()))))
    return [f._replace(guess=said.get(k) or "") for k, f in enumerate(findings)]


def with_probabilities(
    findings: Sequence[Finding], data: bytes, language: str, races: RacePipeline
) -> list[Finding]:
    """Findings of a file, with a probability of race-free where the proof cannot tell.

    A loop without a directive is asked about under the guessed one, or `parallel for`. A verdict
    stays as it is, and nothing that a model says is called shown. What is no loop, or is longer
    than what the model reads, gets no probability.

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
    text = _loop(finding, lines)
    if not text or finding.directive_line:
        return text
    guessed = finding.guess if finding.guess != NONE else ""
    return f"{guessed or _DIRECTIVES[language]}\n{text}"


def _loop(finding: Finding, lines: list[str]) -> str:
    """The lines of a finding's loop, with the directive that it has; "" if there is no loop."""
    first = finding.directive_line or finding.first_line
    text = "\n".join(lines[first - 1 : finding.last_line])
    keywords = {p.text.lower() for p in lex(text) if p.kind == "keyword"}
    return text if keywords & {"for", "do"} else ""
