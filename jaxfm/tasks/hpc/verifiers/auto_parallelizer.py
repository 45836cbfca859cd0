"""gcc's auto-parallelizer as a baseline: which serial loops does a compiler dare to parallelize?

It is no verifier of directives. "Confirmed" says that gcc makes the loop parallel; it never
refutes, and "cannot tell" is what it says of most loops. It may make a loop parallel that the plain
directive would not, since it makes copies of its own. Arrays are given as `restrict`, which the
user would have to vouch for, and reductions may be reordered (`-ffast-math`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from jaxfm.tasks.hpc.program import For, Judgement, Path, Program, walk
from jaxfm.tasks.hpc.verifiers import compile, harness, sandbox
from jaxfm.tasks.hpc.verifiers.harness import Kernel
from jaxfm.tasks.hpc.verifiers.sandbox import Limits

FLAGS = (
    "-c", "-w", "-O2", "-ffast-math", "-ftree-parallelize-loops=4",
    "--param", "parloops-min-per-thread=2", "-fno-tree-vectorize", "-fno-tree-loop-distribution",
    "-fno-tree-loop-distribute-patterns", "-fopt-info-loop-optimized",
)  # fmt: skip
FOUND = re.compile(r"kernels\.c:(\d+):\d+: optimized: parallelizing (?:inner|outer) loop")


def available(limits: Limits = Limits()) -> str | None:  # noqa: B008
    """Why it cannot be used, or None."""
    return compile.missing("gcc", limits.isolated)


def name() -> str:
    """The tool's name and version."""
    return f"auto-parallelizer of {compile.version('gcc')}"


def verify(
    programs: Sequence[Program],
    limits: Limits = Limits(seconds=60),  # noqa: B008
) -> list[Judgement]:
    """Says of each program whether gcc makes its loops with directives parallel without them."""
    if reason := available(limits):
        return [Judgement("cannot tell", reason, "auto-parallelizer")] * len(programs)
    found: list[Judgement] = []
    for first in range(0, len(programs), harness.BATCH):
        part = programs[first : first + harness.BATCH]
        made = harness.batch([Kernel(serial(program)) for program in part])
        text = _restricted(str(made.sources["kernels.c"]), part)
        command = ["gcc", *FLAGS, "kernels.c", "-o", "kernels.o"]
        done = sandbox.run(command, {"kernels.c": text}, limits)
        lines = [int(number) for number in FOUND.findall(done.stderr)]
        parallel = {made.lines[at] for n in lines if (at := ("kernels.c", n)) in made.lines}
        found += [_judgement(k, program, parallel, done) for k, program in enumerate(part)]
    return found


def _judgement(k: int, program: Program, parallel: set[tuple[int, Path]], done) -> Judgement:
    if done.returncode != 0:
        return Judgement("cannot tell", done.reason or "gcc refuses the batch.", name())
    asked = [path for path, s in walk(program.body) if isinstance(s, For) and s.pragma]
    if asked and all((k, path) in parallel for path in asked):
        return Judgement("confirmed", "gcc makes it parallel.", name())
    return Judgement("cannot tell", "gcc does not make it parallel.", name())


def serial(program: Program) -> Program:
    """A program without directives on its loops."""
    return harness.with_directives(program, lambda pragma: None)


def _restricted(text: str, programs: Sequence[Program]) -> str:
    """A batch whose functions take arrays as `restrict`."""
    for k, program in enumerate(programs):
        head = re.search(rf"^void kernel_{k}\(.*$", text, re.MULTILINE)
        assert head is not None
        line = head[0]
        for array in program.arrays:
            line = re.sub(rf"\b{array.name}\[", f"{array.name}[restrict ", line, count=1)
        text = text[: head.start()] + line + text[head.end() :]
    return text
