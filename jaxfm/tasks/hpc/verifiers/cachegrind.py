"""Counts of a serial run by valgrind's cachegrind: instructions, reads, writes, cache misses.

They repeat exactly, on a busy machine as on an idle one, which no measured time does. The caches
are simulated with the sizes given here, never with those of the machine; a kernel finds in them
what was left when its arrays were read from a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxfm.tasks.hpc.program import Program
from jaxfm.tasks.hpc.verifiers import compile, harness, sandbox
from jaxfm.tasks.hpc.verifiers.harness import Kernel
from jaxfm.tasks.hpc.verifiers.sandbox import Limits

FLAGS = ("-O1", "-g", "-w", "-fno-inline", "-ffp-contract=off")
CACHES = {"I1": "32768,8,64", "D1": "32768,8,64", "LL": "1048576,16,64"}
"""Size in bytes, ways and line of the simulated caches: the first two levels, and the last."""
EVENTS = ("Ir", "Dr", "Dw", "D1mr", "D1mw", "DLmr", "DLmw")


class Counts(NamedTuple):
    """Events of one run of a kernel, without the functions of libraries that it calls.

    Attributes:
        instructions: Executed.
        reads, writes: Of data.
        first_misses: Reads and writes that the first level of data lacks.
        last_misses: Those that the last level lacks, too.
    """

    instructions: int
    reads: int
    writes: int
    first_misses: int
    last_misses: int

    @property
    def cycles(self) -> int:
        """A plain estimate: an instruction costs 1, a first miss 10 more, a last one 100 more."""
        return self.instructions + 10 * self.first_misses + 100 * self.last_misses


def available(limits: Limits = Limits()) -> str | None:  # noqa: B008
    """Why it cannot be used, or None."""
    missing = compile.missing
    return missing("valgrind", limits.isolated) or missing("gcc", limits.isolated)


def name() -> str:
    """The tool's name and version."""
    return f"cachegrind of {compile.version('valgrind')} with {compile.version('gcc')}"


def counts(
    programs: Sequence[Program],
    caches: dict[str, str] | None = None,
    limits: Limits = Limits(seconds=120),  # noqa: B008
) -> list[Counts]:
    """Counts serial runs of programs.

    Args:
        programs: What to run, without OpenMP.
        caches: Other caches than `CACHES`.
        limits: Of each run of a batch.

    Raises:
        RuntimeError: valgrind or gcc cannot be used, or a program fails; the message says why.
    """
    if reason := available(limits):
        raise RuntimeError(reason)
    found: list[Counts] = []
    for first in range(0, len(programs), harness.BATCH):
        kernels = [Kernel(program) for program in programs[first : first + harness.BATCH]]
        made = harness.batch(kernels, forked=False)
        binary = compile.compiled("gcc", FLAGS, made.sources, limits)
        sizes = [f"--{cache}={text}" for cache, text in (caches or CACHES).items()]
        command = ["valgrind", "--tool=cachegrind", "--cache-sim=yes", *sizes]
        command += ["--cachegrind-out-file=counts", "./program"]
        given: dict[str, str | bytes] = {"program": binary, **made.files}
        done = sandbox.run(command, given, limits, keep=["counts"])
        if done.returncode != 0 or "counts" not in done.files:
            last = (done.stderr.strip().splitlines() or ["no reason"])[-1]
            raise RuntimeError(f"cachegrind fails: {done.reason or last}")
        events = _by_function(done.files["counts"].decode(errors="replace"))
        found += [_counts(events.get(f"kernel_{k}", {})) for k in range(len(kernels))]
    return found


def _by_function(text: str) -> dict[str, dict[str, int]]:
    """The events of each function of cachegrind's file."""
    names: list[str] = []
    found: dict[str, dict[str, int]] = {}
    current: dict[str, int] = {}
    for line in text.splitlines():
        if line.startswith("events:"):
            names = line.split()[1:]
        elif line.startswith("fn="):
            current = found.setdefault(line[3:], dict.fromkeys(names, 0))
        elif line[:1].isdigit():
            for event, value in zip(names, line.split()[1:]):
                current[event] += int(value)
    return found


def _counts(events: dict[str, int]) -> Counts:
    ir, dr, dw, *misses = (events.get(event, 0) for event in EVENTS)
    return Counts(ir, dr, dw, misses[0] + misses[1], misses[2] + misses[3])
