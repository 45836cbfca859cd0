"""gcc's ThreadSanitizer, with a shim that shows it what libgomp orders.

Each program runs with several odd numbers of threads and scattered iterations, and is stopped at
its first race. A race is "refuted". Silence is "confirmed" in the sense of this tool: no race was
seen in those runs, which is no proof. `plain` leaves out the shim: gcc's own tool, which calls most
programs of several regions racy, and is kept as an example of a dishonest labeller.
"""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Mapping, Sequence

from jaxfm.tasks.hpc.program import Judgement, Program
from jaxfm.tasks.hpc.verifiers import compile, harness, sandbox
from jaxfm.tasks.hpc.verifiers.harness import Kernel
from jaxfm.tasks.hpc.verifiers.sandbox import Limits

SHIM = pathlib.Path(__file__).with_name("runtime_shim.c")
RACE = 66  # the exit status that TSAN_OPTIONS asks for
THREADS = (7, 5)
OPTIONS = (
    "halt_on_error=1 exitcode=66 atexit_sleep_ms=0 die_after_fork=0 report_signal_unsafe=0 "
    "suppress_equal_addresses=0 suppress_equal_stacks=0 suppressions=suppressions"
)
SUPPRESSIONS = "called_from_lib:libgomp.so\n"  # what libgomp allocates for itself
FLAGS = ("-O0", "-g", "-fopenmp", "-fsanitize=thread", "-w")
KNOWN = {"parallel", "for", "sections", "section", "single", "master", "masked", "barrier", "simd"}
KNOWN |= {"critical", "atomic", "read", "write", "update", "capture", "ordered", "task", "taskwait"}
KNOWN |= {"taskgroup", "flush"}


def available(limits: Limits = Limits()) -> str | None:  # noqa: B008
    """Why the tool cannot be used, or None."""
    if reason := compile.missing("gcc", limits.isolated):
        return reason
    try:
        _shim(limits)
    except (compile.CompileError, sandbox.Refused) as error:
        return str(error)
    return None


def name() -> str:
    """The tool's name and version."""
    return f"ThreadSanitizer of {compile.version('gcc')} with the shim of jaxfm"


def verify(
    programs: Sequence[Program | Kernel],
    threads: Sequence[int] = THREADS,
    limits: Limits = Limits(seconds=120),  # noqa: B008
) -> list[Judgement]:
    """Judges programs; see the module. "Cannot tell" where one does not run, with the reason."""
    if reason := available(limits):
        return [Judgement("cannot tell", reason, "ThreadSanitizer")] * len(programs)
    flags = (*FLAGS, "-fno-inline-atomics", *(f"-Wl,--wrap={symbol}" for symbol in _symbols()))
    return judged(programs, "gcc", flags, name(), threads, limits, {"shim.o": _shim(limits)})


def plain(
    programs: Sequence[Program | Kernel],
    threads: Sequence[int] = (7,),
    limits: Limits = Limits(seconds=120),  # noqa: B008
) -> list[Judgement]:
    """Judges programs as gcc's tool does by itself, which knows nothing of OpenMP's order."""
    if reason := compile.missing("gcc", limits.isolated):
        return [Judgement("cannot tell", reason, "ThreadSanitizer")] * len(programs)
    tool = f"ThreadSanitizer of {compile.version('gcc')}"
    return judged(programs, "gcc", FLAGS, tool, threads, limits, {})


def judged(
    programs: Sequence[Program | Kernel],
    compiler: str,
    flags: Sequence[str],
    tool: str,
    threads: Sequence[int],
    limits: Limits,
    files: Mapping[str, str | bytes],
    environment: Mapping[str, str] | None = None,
) -> list[Judgement]:
    """Compiles batches with a sanitizer, runs each program and reads its exit status."""
    found: list[Judgement] = []
    for first in range(0, len(programs), harness.BATCH):
        part = programs[first : first + harness.BATCH]
        made = harness.batch([harness.scattered(harness.as_kernel(one)) for one in part])
        try:
            binary = compile.compiled(compiler, flags, {**made.sources, **files}, limits)
            runs = _runs(made, binary, threads, limits, environment or {}, len(part))
        except (compile.CompileError, harness.Ended) as error:
            if len(part) == 1:
                found.append(Judgement("cannot tell", str(error), tool))
            else:  # which one is it?
                for one in part:
                    found += judged(
                        [one], compiler, flags, tool, threads, limits, files, environment
                    )
            continue
        for k, one in enumerate(part):
            found.append(_judgement(k, harness.as_kernel(one), made, runs, tool, threads))
    return found


def _runs(made, binary, threads, limits, environment, count) -> list[sandbox.Result]:
    """A run of a batch with each number of threads; raises `Ended` where one ends the others."""
    runs = []
    for threads_count in threads:
        variables = {
            "OMP_NUM_THREADS": str(threads_count),
            "OMP_DYNAMIC": "false",
            "TSAN_OPTIONS": OPTIONS,
            **environment,
        }
        given: dict[str, str | bytes] = {"program": binary, "suppressions": SUPPRESSIONS}
        done = sandbox.run(["./program"], {**given, **made.files}, limits, environment=variables)
        if done.reason and count > 1:
            raise harness.Ended(done.reason)
        runs.append(done)
    return runs


def _judgement(k, kernel, made, runs, tool, threads) -> Judgement:
    """What the runs say of kernel k of a batch."""
    used = {word for pragma in harness.directives(kernel) for word in pragma.directive.split()}
    used.discard("end")
    if used - KNOWN:
        return Judgement(
            "cannot tell", f"It does not know {', '.join(sorted(used - KNOWN))}.", tool
        )
    for run in runs:
        status = harness.statuses(run.stdout).get(k)
        report = run.stderr.partition(f"=== {k}\n")[2].partition("=== ")[0]
        if status == RACE and "ThreadSanitizer: data race" in report:
            where = re.findall(r"(kernels\.c|kernels\.f90):(\d+)", report)
            met = [made.lines[at] for name, n in where if (at := (name, int(n))) in made.lines]
            places = list(dict.fromkeys(path for _, path in met))[:2]
            told = " and ".join(map(str, places)) or "unknown"
            return Judgement("refuted", f"Two threads meet at the statements {told}.", tool)
        if status != 0:
            error = re.search(r"ERROR: (ThreadSanitizer: \w+)", report)
            ended = f"It ended with {error[1]}." if error else f"It ended with status {status}."
            why = run.reason or ended
            return Judgement("cannot tell", why, tool)
    counts = " and ".join(map(str, threads))
    return Judgement("confirmed", f"No race was seen with {counts} threads.", tool)


@functools.cache
def _symbols() -> tuple[str, ...]:
    """The entry points that the shim wraps."""
    text = SHIM.read_text()
    pattern = r"\b((?:GOMP|omp)_[a-z_]+)\b"
    return tuple(sorted(set(re.findall(pattern, text))))


@functools.cache
def _shim(limits: Limits) -> bytes:
    """The shim, compiled without instrumentation."""
    command = ["gcc", "-O1", "-c", "-w", "-o", "shim.o", "shim.c"]
    result = sandbox.run(command, {"shim.c": SHIM.read_text()}, limits, keep=["shim.o"])
    if "shim.o" not in result.files:
        raise compile.CompileError(f"gcc refuses the shim: {result.stderr.strip()[:200]}")
    return result.files["shim.o"]
