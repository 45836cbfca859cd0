"""Compiles C and Fortran in the sandbox."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from jaxfm.tasks.hpc.verifiers import sandbox


class CompileError(ValueError):
    """A compiler refused the text; the message is its first error."""


@functools.cache
def version(tool: str) -> str | None:
    """A tool's name and version; None where it is not installed."""
    if not shutil.which(tool):
        return None
    done = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or [tool])[0].strip()


def missing(tool: str, isolated: bool = True) -> str | None:
    """Why a tool cannot be used in the sandbox, as a sentence, or None."""
    if version(tool) is None:
        return f"{tool} is not installed."
    if isolated and not sandbox.kind().isolated:
        return sandbox.kind().reason
    return None


def compiled(
    compiler: str,
    flags: Sequence[str],
    files: Mapping[str, str | bytes],
    limits: sandbox.Limits = sandbox.Limits(seconds=60),  # noqa: B008
) -> bytes:
    """The program that a compiler makes of files of C and free-form Fortran.

    Raises:
        CompileError: It refuses them.
        sandbox.Refused: There is no sandbox.
    """
    sources = [name for name in files if name.endswith((".c", ".f90", ".o"))]
    libraries = [flag for flag in flags if flag.startswith(("-Wl,", "-l"))]
    options = [flag for flag in flags if flag not in libraries]
    runtime = ["-lgfortran"] if any(name.endswith(".f90") for name in files) else []
    command = [compiler, *options, "-o", "program", *sources, *libraries, *runtime, "-lm"]
    result = sandbox.run(command, files, limits, keep=["program"])
    if result.returncode != 0 or "program" not in result.files:
        lines = result.stderr.splitlines()
        first = next((line for line in lines if "error" in line), result.reason or "no reason")
        raise CompileError(f"{compiler} refuses it: {first.strip()}")
    return result.files["program"]
