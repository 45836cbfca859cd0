"""Directives put into files: as a unified diff, or into the file itself.

Only whole lines are put in; every other byte stays, line ends and encodings included.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import stat
import tempfile
from collections.abc import Sequence

from jaxfm.errors import writing
from jaxfm.launch.hpc.findings import Finding
from jaxfm.tasks.hpc.frontend.source import Language

_CONTEXT = 3
_FIXED_WIDTH, _FREE_WIDTH = 72, 120


def insertions(findings: Sequence[Finding], data: bytes, language: Language) -> dict[int, bytes]:
    """The lines to put in, by the line (from 1) before which they come."""
    lines = _lines(data)
    end = b"\r\n" if b"\r\n" in data else b"\n"
    found = {}
    for finding in findings:
        if finding.insert and finding.pragma:
            line = lines[finding.insert - 1]
            indent = line[: len(line) - len(line.lstrip(b" \t"))]
            found[finding.insert] = _written(finding.pragma, indent, end, language)
    return found


def edited(data: bytes, lines: dict[int, bytes]) -> bytes:
    """A file with lines put in."""
    parts = _lines(data)
    return b"".join(lines.get(k, b"") + part for k, part in enumerate(parts, 1))


def unified_diff(path: pathlib.Path, data: bytes, lines: dict[int, bytes]) -> bytes:
    """A unified diff that `patch -p1` applies; empty where nothing is put in."""
    if not lines:
        return b""
    old = _lines(data)
    name = os.fsencode(path.as_posix().lstrip("/"))
    out = [b"--- a/" + name + b"\n", b"+++ b/" + name + b"\n"]
    groups: list[list[int]] = []
    for at in sorted(lines):
        near = groups and at - groups[-1][-1] <= 2 * _CONTEXT
        groups[-1].append(at) if near else groups.append([at])
    added = 0
    for group in groups:
        first = max(group[0] - _CONTEXT, 1)
        last = min(group[-1] + _CONTEXT - 1, len(old))
        new = [line for at in group for line in lines[at].splitlines(keepends=True)]
        length = last - first + 1
        head = f"@@ -{first},{length} +{first + added},{length + len(new)} @@\n"
        out.append(head.encode())
        for k in range(first, last + 1):
            out += [b"+" + line for line in lines.get(k, b"").splitlines(keepends=True)]
            out.append(b" " + old[k - 1])
            if not old[k - 1].endswith(b"\n"):
                out.append(b"\n\\ No newline at end of file\n")
        added += len(new)
    return b"".join(out)


def write(path: pathlib.Path, data: bytes, lines: dict[int, bytes]) -> None:
    """Puts lines into a file at once, or not at all.

    Args:
        path: The file.
        data: What it held when it was read.
        lines: What to put in.
    Raises:
        ValueError: The file has changed since.
        OSError: It cannot be written.
    """
    real = pathlib.Path(os.path.realpath(path))
    mode = stat.S_IMODE(real.stat().st_mode)
    with writing(real):
        handle, name = tempfile.mkstemp(prefix=f".{real.name}.", dir=real.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(edited(data, lines))
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, mode)
            if real.read_bytes() != data:
                raise ValueError(f"{path} has changed since it was read; run the command again.")
            os.replace(name, real)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)


def _lines(data: bytes) -> list[bytes]:
    """Lines as the parser counts them, which end with a line feed only."""
    parts = data.split(b"\n")
    lines = [part + b"\n" for part in parts[:-1]]
    return [*lines, parts[-1]] if parts[-1] else lines


def _written(pragma: str, indent: bytes, end: bytes, language: Language) -> bytes:
    """A directive as lines of a file; long ones in Fortran are continued."""
    if language == "c":
        return indent + pragma.encode() + end
    fixed = language == "fortran-fixed"
    start = b"" if fixed else indent
    width = _FIXED_WIDTH if fixed else max(_FREE_WIDTH - len(indent), 60)
    rows, row = [], ""
    for word in pragma.split(" "):
        if row and len(row) + len(word) + 3 > width:
            rows.append(row)
            row = f"!$omp& {word}"
        else:
            row = f"{row} {word}".lstrip()
    rows.append(row)
    tail = b"" if fixed else b" &"
    return (tail + end).join(start + r.encode() for r in rows) + end
