"""C programs around kernels: what is compiled and run to judge programs.

A batch of programs becomes one file. Its `main` runs each kernel in a process of its own, which
reads the arrays from a file, calls the kernel and writes arrays and results to another, so that one
that crashes, hangs or races takes no other with it. Line numbers of the file are led back to
statements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxfm.tasks.hpc.program import Block, Clause, For, If, Path, Program, Statement
from jaxfm.tasks.hpc.proofs.contents import contents, sizes_of
from jaxfm.tasks.hpc.render import parameters, to_c

BATCH = 25
DTYPES = {"double": np.float64, "float": np.float32, "int": np.int32, "long": np.int64}
HEAD = """#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>
"""
MAIN = """int main(void)
{{
    void (*runs[])(void) = {{{runs}}};
    for (int k = 0; k < {count}; k++) {{
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {{
            alarm({seconds});
            dprintf(2, "=== %d\\n", k);
            runs[k]();
            _exit(0);
        }}
        int status = 0;
        waitpid(child, &status, 0);
        printf("%d %d\\n", k, WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status));
    }}
    return 0;
}}
"""


class Batch(NamedTuple):
    """A file of C and the files that its programs read.

    Attributes:
        text: The file.
        files: The arrays of program k as `in_k`.
        lines: By line of the file: the program's number and the path of its statement.
    """

    text: str
    files: dict[str, bytes]
    lines: dict[int, tuple[int, Path]]


def batch(programs: Sequence[Program], kernels: Sequence[str] = (), seconds: int = 5) -> Batch:
    """Puts programs into one file.

    Args:
        programs: What to run.
        kernels: Declarations of functions `kernel_0`, ... to call instead of the programs' own.
        seconds: After which each is stopped.
    """
    text, files = HEAD, {}
    lines: dict = {}
    for k, program in enumerate(programs):
        if kernels:
            text += kernels[k]
        else:
            rendered = to_c(program, f"kernel_{k}")
            first = text.count("\n")
            lines |= {first + line: (k, path) for path, line in rendered.lines.items()}
            text += rendered.text
        text += _caller(program, k)
        files[f"in_{k}"] = b"".join(a.tobytes() for a in inputs(program).values())
    runs = ", ".join(f"run_{k}" for k in range(len(programs)))
    return Batch(text + MAIN.format(runs=runs, count=len(programs), seconds=seconds), files, lines)


def inputs(program: Program) -> dict[str, np.ndarray]:
    """The arrays at the start."""
    return {array.name: contents(array, sizes_of(program)) for array in program.arrays}


def outputs(program: Program, data: bytes) -> dict[str, np.ndarray]:
    """Arrays and results out of the file that a run left; raises ValueError where it is short."""
    found, at = {}, 0
    shapes = {name: (array.shape, array.dtype) for name, array in inputs(program).items()}
    scalars = {s.name: s.dtype for s in program.scalars}
    for parameter in parameters(program):
        if parameter.kind == "result":
            shapes[parameter.name] = ((), np.dtype(DTYPES[scalars[parameter.name]]))
    for name, (shape, dtype) in shapes.items():
        count = int(np.prod(shape, dtype=int))
        found[name] = np.frombuffer(data, dtype, count, at).reshape(shape)
        at += count * dtype.itemsize
    return found


def scattered(program: Program) -> Program:
    """Loops without a static schedule deal their iterations out one by one, two by two, in turn.

    A default or dynamic schedule may do so. Neighbors then meet in different threads, and equal
    iterations of two loops do, too; on an idle machine one thread might run a whole dynamic loop.
    """
    seen = 0

    def changed(statement: Statement) -> Statement:
        nonlocal seen
        if isinstance(statement, If):
            then, orelse = map(changed, statement.then), map(changed, statement.orelse)
            return statement._replace(then=tuple(then), orelse=tuple(orelse))
        if isinstance(statement, For) and statement.pragma:
            words, given = statement.pragma.directive.split(), statement.pragma.clauses
            if "for" in words and "static" not in statement.pragma.named("schedule"):
                given = tuple(clause for clause in given if clause.name != "schedule")
                chunk = Clause("schedule", ("static", str(1 + seen % 2)))
                seen += 1
                pragma = statement.pragma._replace(clauses=(*given, chunk))
                statement = statement._replace(pragma=pragma)
        if isinstance(statement, (For, Block)):
            return statement._replace(body=tuple(map(changed, statement.body)))
        return statement

    return program._replace(body=tuple(map(changed, program.body)))


def statuses(stdout: str) -> dict[int, int]:
    """By program: its exit status, or minus the signal that ended it."""
    pairs = (line.split() for line in stdout.splitlines())
    return {int(pair[0]): int(pair[1]) for pair in pairs if len(pair) == 2}


def _caller(program: Program, k: int) -> str:
    """A function that reads the arrays, calls the kernel and writes what it left."""
    before, after, arguments = [], [], []
    declared = inputs(program)
    arrays = {array.name: array for array in program.arrays}
    scalars = {s.name: s for s in (*program.sizes, *program.scalars)}
    for parameter in parameters(program):
        name = parameter.name
        if parameter.kind == "array":
            size = max(declared[name].nbytes, 1)
            before.append(f"{arrays[name].dtype} *{name} = malloc({size});")
            before.append(f"if (fread({name}, 1, {declared[name].nbytes}, file_) > {size}) return;")
            after.append(f"fwrite({name}, 1, {declared[name].nbytes}, file_);")
        else:
            dtype = "int" if parameter.kind == "size" else scalars[name].dtype
            before.append(f"{dtype} {name} = {scalars[name].value};")
        if parameter.kind == "result":
            after.append(f"fwrite(&{name}, sizeof {name}, 1, file_);")
        prefix = {"result": "&", "array": "(void *)"}.get(parameter.kind, "")
        arguments.append(prefix + name)
    lines = [
        f'FILE *file_ = fopen("in_{k}", "rb");',
        *before,
        "fclose(file_);",
        f"kernel_{k}({', '.join(arguments)});",
        f'file_ = fopen("out_{k}", "wb");',
        *after,
        "fclose(file_);",
    ]
    body = "\n".join(f"    {line}" for line in lines)
    return f"static void run_{k}(void)\n{{\n{body}\n}}\n"
