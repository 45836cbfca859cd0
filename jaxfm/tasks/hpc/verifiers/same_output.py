"""Whether a parallel program leaves what the serial one does, in runs with several schedules.

The reference is the program in C, compiled without OpenMP. Loops without a schedule of their own
get `schedule(runtime)`, so that one binary runs with all of them. Numbers may differ by rounding,
since a reduction adds in another order. Equal results are no proof, neither of the next run nor of
the absence of races; unequal ones refute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jaxfm.tasks.hpc.program import Clause, Judgement, Pragma, Program
from jaxfm.tasks.hpc.verifiers import compile, harness, sandbox
from jaxfm.tasks.hpc.verifiers.harness import Kernel
from jaxfm.tasks.hpc.verifiers.sandbox import Limits

RUNS = ((1, "static"), (3, "static,1"), (7, "dynamic,1"), (4, "guided"))
"""Numbers of threads, and the schedule of loops that have none."""
FLAGS = ("-O1", "-ffp-contract=off", "-w")
TOLERANCE = {"float32": 1e-4, "float64": 1e-9}


def available(limits: Limits = Limits()) -> str | None:  # noqa: B008
    """Why it cannot be used, or None."""
    return compile.missing("gcc", limits.isolated)


def name() -> str:
    """The tool's name and version."""
    return f"equal output with {compile.version('gcc')}"


def verify(
    programs: Sequence[Program | Kernel],
    runs: Sequence[tuple[int, str]] = RUNS,
    limits: Limits = Limits(seconds=60),  # noqa: B008
) -> list[Judgement]:
    """Compares programs with their serial results; see the module.

    Returns:
        "confirmed": equal in all runs. "refuted": another result, a crash or an endless run where
        the serial program ends. "cannot tell": one of the two does not compile or run.
    """
    if reason := available(limits):
        return [Judgement("cannot tell", reason, "equal output")] * len(programs)
    found: list[Judgement] = []
    for first in range(0, len(programs), harness.BATCH):
        kernels = [harness.as_kernel(one) for one in programs[first : first + harness.BATCH]]
        found += _judged(kernels, runs, limits)
    return found


def _judged(kernels: Sequence[Kernel], runs, limits: Limits) -> list[Judgement]:
    """Judgements of one batch; one by one where it does not compile."""
    serial = [Kernel(kernel.program) for kernel in kernels]
    try:
        wanted = _left(serial, FLAGS, [{}], limits)[0]
        variables = [
            {"OMP_NUM_THREADS": str(n), "OMP_SCHEDULE": schedule, "OMP_DYNAMIC": "false"}
            for n, schedule in runs
        ]
        parallel = [flexible(kernel) for kernel in kernels]
        seen = _left(parallel, (*FLAGS, "-fopenmp"), variables, limits)
    except (compile.CompileError, harness.Ended) as error:
        if len(kernels) == 1:
            return [Judgement("cannot tell", str(error), name())]
        return [judgement for one in kernels for judgement in _judged([one], runs, limits)]
    return [
        _judgement(kernel, wanted[k], [left[k] for left in seen], runs)
        for k, kernel in enumerate(kernels)
    ]


def _left(
    kernels: Sequence[Kernel],
    flags: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    limits: Limits,
) -> list[list[dict[str, np.ndarray] | str]]:
    """What each kernel leaves in each environment, or why it leaves nothing, as a sentence."""
    made = harness.batch(kernels)
    binary = compile.compiled("gcc", flags, made.sources, limits)
    keep = [f"out_{k}" for k in range(len(kernels))]
    found = []
    for environment in environments:
        given: dict[str, str | bytes] = {"program": binary, **made.files}
        done = sandbox.run(["./program"], given, limits, environment=environment, keep=keep)
        if done.reason and len(kernels) > 1:
            raise harness.Ended(done.reason)  # one of them did it; each is run by itself
        ended = harness.statuses(done.stdout)
        found.append([_read(kernel, k, ended, done) for k, kernel in enumerate(kernels)])
    return found


def _read(kernel: Kernel, k: int, ended: dict[int, int], done: sandbox.Result):
    """What kernel k left."""
    if ended.get(k) != 0:
        return done.reason or f"It ended with status {ended.get(k)}."
    try:
        return harness.outputs(kernel.program, done.files.get(f"out_{k}", b""), kernel.language)
    except ValueError:
        return "It left too few results."


def _judgement(kernel: Kernel, wanted, seen, runs) -> Judgement:
    tool = name()
    if isinstance(wanted, str):
        return Judgement("cannot tell", f"The serial program fails. {wanted}", tool)
    for (threads, schedule), left in zip(runs, seen):
        with_ = f"with {threads} threads and {schedule}"
        if isinstance(left, str):
            return Judgement("refuted", f"It fails {with_}. {left}", tool)
        for variable, values in wanted.items():
            if not equal(values, left[variable]):
                return Judgement("refuted", f"{variable} differs {with_}.", tool)
    return Judgement("confirmed", f"{len(runs)} runs left the serial results.", tool)


def equal(wanted: np.ndarray, found: np.ndarray) -> bool:
    """Whether numbers are equal but for rounding; integers must be equal."""
    tolerance = TOLERANCE.get(wanted.dtype.name)
    if tolerance is None:
        return bool(np.array_equal(wanted, found))
    finite = np.abs(wanted[np.isfinite(wanted)])
    scale = float(finite.max()) if finite.size else 0.0
    return bool(np.allclose(found, wanted, rtol=tolerance, atol=tolerance * scale, equal_nan=True))


def flexible(kernel: Kernel) -> Kernel:
    """A kernel whose loops without a schedule take that of the environment."""
    if kernel.text:
        return kernel._replace(text=harness.scheduled(kernel.text, kernel.language, "runtime"))

    def changed(pragma: Pragma) -> Pragma:
        if "for" not in pragma.directive.split() or pragma.named("schedule"):
            return pragma
        return pragma._replace(clauses=(*pragma.clauses, Clause("schedule", ("runtime",))))

    return kernel._replace(program=harness.with_directives(kernel.program, changed))
