"""clang's ThreadSanitizer with Archer, which tells it what LLVM's OpenMP runtime orders.

Debian and Ubuntu have both in `clang` and `libomp-dev`. Runs, threads and schedules are those of
`thread_sanitizer`; silence is no proof here either. It compiles C alone.
"""

from __future__ import annotations

import functools
import pathlib
import shutil
from collections.abc import Sequence

from jaxfm.tasks.hpc.program import Judgement, Program
from jaxfm.tasks.hpc.verifiers import compile, harness, sandbox, thread_sanitizer
from jaxfm.tasks.hpc.verifiers.harness import Kernel
from jaxfm.tasks.hpc.verifiers.sandbox import Limits

FLAGS = ("-O0", "-g", "-fopenmp", "-fsanitize=thread", "-w")
OPTIONS = f"{thread_sanitizer.OPTIONS} ignore_noninstrumented_modules=1"
RACY = "int main(void)\n{\n    int s = 0;\n#pragma omp parallel num_threads(2)\n    s++;\n}\n"
RIGHT = RACY.replace("    s++", "#pragma omp single\n    s++")


@functools.cache
def library() -> str | None:
    """Where Archer's library stands: beside the clang that is found first."""
    clang = shutil.which("clang")
    if clang is None:
        return None
    root = pathlib.Path(clang).resolve().parents[1]
    found = sorted(root.glob("lib*/**/libarcher.so"))
    return str(found[0]) if found else None


@functools.cache
def available(limits: Limits = Limits()) -> str | None:  # noqa: B008
    """Why the tool cannot be used, or None; it must tell a small racy program from a right one."""
    if reason := compile.missing("clang", limits.isolated):
        return reason
    if library() is None:
        return "Archer's library (libarcher.so, in libomp-dev) is not installed beside clang."
    given: dict[str, str | bytes] = {"suppressions": thread_sanitizer.SUPPRESSIONS}
    for text, status in ((RACY, thread_sanitizer.RACE), (RIGHT, 0)):
        try:
            given["program"] = compile.compiled("clang", FLAGS, {"smoke.c": text}, limits)
            done = sandbox.run(["./program"], given, limits, environment=_environment())
        except (compile.CompileError, sandbox.Refused) as error:
            return str(error)
        if done.returncode != status:
            return f"Archer fails on a program of a few lines: {done.stderr.strip()[:200]}"
    return None


def name() -> str:
    """The tool's name and version."""
    return f"Archer of {compile.version('clang')}"


def verify(
    programs: Sequence[Program | Kernel],
    threads: Sequence[int] = thread_sanitizer.THREADS,
    limits: Limits = Limits(seconds=120),  # noqa: B008
) -> list[Judgement]:
    """Judges programs; see the module. "Cannot tell" where one does not run, with the reason."""
    if reason := available():
        return [Judgement("cannot tell", reason, "Archer")] * len(programs)
    kernels = [harness.as_kernel(one) for one in programs]
    judge = functools.partial(
        thread_sanitizer.judged, compiler="clang", flags=FLAGS, tool=name(), threads=threads,
        limits=limits, files={}, environment=_environment(),
    )  # fmt: skip
    found = iter(judge([kernel for kernel in kernels if kernel.language == "c"]))
    other = Judgement("cannot tell", "It compiles C, not Fortran.", name())
    return [next(found) if kernel.language == "c" else other for kernel in kernels]


def _environment() -> dict[str, str]:
    return {"OMP_TOOL_LIBRARIES": library() or "", "TSAN_OPTIONS": OPTIONS}
