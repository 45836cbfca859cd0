"""C programs around kernels in C or Fortran: what is compiled and run to judge programs.

A batch of kernels becomes one program. Its `main` runs each in a process of its own, which reads
the arrays from a file, calls the kernel and writes arrays and results to another, so that one that
crashes, hangs or races takes no other with it. Line numbers of the sources are led back to
statements.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from jaxfm.tasks.hpc.frontend.pragmas import parse_pragma
from jaxfm.tasks.hpc.frontend.source import Outside
from jaxfm.tasks.hpc.program import Block, Clause, For, If, Path, Pragma, Program, Statement, walk
from jaxfm.tasks.hpc.proofs.contents import contents, sizes_of
from jaxfm.tasks.hpc.render import Language, parameters, to_c, to_fortran
from jaxfm.tasks.hpc.verifiers import compile

BATCH = 25
SUFFIXES = {"c": ".c", "fortran": ".f90"}
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


class Ended(RuntimeError):
    """A limit ended a batch; the message says which."""


class Kernel(NamedTuple):
    """A function to call: a program written in a language, or a text that is to do the same.

    Attributes:
        program: Declares what is given to the function and what it leaves.
        text: A function called `kernel` with the parameters that `render.to_c` or `to_fortran`
            gives it; empty for the program itself.
        language: Of the function.
    """

    program: Program
    text: str = ""
    language: Language = "c"


class Batch(NamedTuple):
    """Source files, and the files that their programs read.

    Attributes:
        sources: The files of source by name.
        files: The arrays of kernel k as `in_k`.
        lines: By file and line: the kernel's number and the path of its statement.
    """

    sources: dict[str, str | bytes]
    files: dict[str, str | bytes]
    lines: dict[tuple[str, int], tuple[int, Path]]


def batch(kernels: Sequence[Kernel], seconds: int = 5, forked: bool = True) -> Batch:
    """Puts kernels into one program; each text has a file of its own.

    Args:
        kernels: What to run.
        seconds: After which each is stopped.
        forked: Whether each runs in a process of its own.
    """
    shared = {"c": "#include <math.h>\n", "fortran": ""}
    sources: dict[str, str | bytes] = {}
    files: dict[str, str | bytes] = {}
    lines: dict = {}
    main = HEAD
    for k, (program, text, language) in enumerate(kernels):
        suffix = SUFFIXES[language]
        if text:
            sources[f"kernel_{k}{suffix}"] = _included(language) + _called(text, k)
        else:
            write = to_c if language == "c" else to_fortran
            rendered = write(program, f"kernel_{k}")
            first = shared[language].count("\n")
            name = f"kernels{suffix}"
            lines |= {(name, first + at): (k, path) for path, at in rendered.lines.items()}
            shared[language] += rendered.text
        main += _caller(program, k, language)
        order = _order(language)
        files[f"in_{k}"] = b"".join(a.tobytes(order) for a in inputs(program).values())
    runs = ", ".join(f"run_{k}" for k in range(len(kernels)))
    if forked:
        main += MAIN.format(runs=runs, count=len(kernels), seconds=seconds)
    else:
        calls = "".join(f"    run_{k}();\n" for k in range(len(kernels)))
        main += f"int main(void)\n{{\n{calls}    return 0;\n}}\n"
    sources["batch.c"] = main
    sources |= {f"kernels{SUFFIXES[name]}": text for name, text in shared.items() if text}
    return Batch(sources, files, lines)


def _included(language: Language) -> str:
    """What stands before a text; its lines count from the next one."""
    return "#include <math.h>\n" if language == "c" else ""


def _called(text: str, k: int) -> str:
    """A text whose function has a number."""
    return re.sub(r"\bkernel\b", f"kernel_{k}", text, flags=re.IGNORECASE)


def _order(language: Language) -> Literal["C", "F"]:
    """How elements lie in memory."""
    return "C" if language == "c" else "F"


def inputs(program: Program) -> dict[str, np.ndarray]:
    """The arrays at the start."""
    return {array.name: contents(array, sizes_of(program)) for array in program.arrays}


def outputs(program: Program, data: bytes, language: Language = "c") -> dict[str, np.ndarray]:
    """Arrays and results out of the file that a run left; raises ValueError where it is short."""
    found, at = {}, 0
    shapes = {name: (array.shape, array.dtype) for name, array in inputs(program).items()}
    scalars = {s.name: s.dtype for s in program.scalars}
    for parameter in parameters(program):
        if parameter.kind == "result":
            shapes[parameter.name] = ((), np.dtype(DTYPES[scalars[parameter.name]]))
    for name, (shape, dtype) in shapes.items():
        count = int(np.prod(shape, dtype=int))
        values = np.frombuffer(data, dtype, count, at)
        found[name] = values.reshape(shape, order=_order(language))
        at += count * dtype.itemsize
    return found


def fortran() -> bool:
    """Whether there is a compiler of Fortran."""
    return compile.version("gfortran") is not None


def as_kernel(one: Program | Kernel) -> Kernel:
    """A program as a kernel in C; a kernel as it is."""
    return one if isinstance(one, Kernel) else Kernel(one)


def directives(kernel: Kernel) -> list[Pragma]:
    """The directives of a kernel; one that cannot be read has the directive "unreadable"."""
    if not kernel.text:
        found = (getattr(s, "pragma", None) for _, s in walk(kernel.program.body))
        return [pragma for pragma in found if pragma]
    joined = re.sub(r"\\\s*\n|&\s*\n\s*!\$omp\s*&?", " ", kernel.text, flags=re.IGNORECASE)
    sentinel = r"#\s*pragma" if kernel.language == "c" else r"!\$"
    read = []
    for line in re.findall(rf"^\s*{sentinel}(\s*omp\b.*)", joined, re.MULTILINE | re.IGNORECASE):
        try:
            pragma = parse_pragma(line, kernel.language)
        except Outside:
            pragma = Pragma("unreadable")
        read += [pragma] if pragma else []
    return read


def scattered(kernel: Kernel) -> Kernel:
    """A kernel whose iterations are dealt out so that neighbors meet; see `dealt`."""
    if kernel.text:
        given = r"\bschedule\s*\(\s*(?:dynamic|guided|auto|runtime)[^)\n]*\)"
        free = re.sub(given, "", kernel.text, flags=re.IGNORECASE)
        return kernel._replace(text=scheduled(free, kernel.language, "static, 1"))
    return kernel._replace(program=dealt(kernel.program))


def scheduled(text: str, language: Language, schedule: str) -> str:
    """A text whose loops without a schedule get one; directives of several lines stay."""
    start = r"#\s*pragma\s+omp" if language == "c" else r"!\$omp"
    loop = r"\s+(?:parallel\s*)?(?:for|do)\b(?![^\n]*\bschedule\b)[^\n]*?(?<![\\&])[ \t]*$"
    return re.sub(
        rf"^([ \t]*{start}{loop})", rf"\1 schedule({schedule})", text,
        flags=re.MULTILINE | re.IGNORECASE,
    )  # fmt: skip


def dealt(program: Program) -> Program:
    """Loops without a static schedule deal their iterations out one by one, two by two, in turn.

    A default or dynamic schedule may do so. Neighbors then meet in different threads, and equal
    iterations of two loops do, too; on an idle machine one thread might run a whole dynamic loop.
    """
    seen = 0

    def changed(pragma: Pragma) -> Pragma:
        nonlocal seen
        words = pragma.directive.split()
        if "for" not in words or "static" in pragma.named("schedule"):
            return pragma
        given = tuple(clause for clause in pragma.clauses if clause.name != "schedule")
        chunk = Clause("schedule", ("static", str(1 + seen % 2)))
        seen += 1
        return pragma._replace(clauses=(*given, chunk))

    return with_directives(program, changed)


def with_directives(program: Program, change: Callable[[Pragma], Pragma | None]) -> Program:
    """A program with other directives on its loops."""

    def changed(statement: Statement) -> Statement:
        if isinstance(statement, If):
            then, orelse = map(changed, statement.then), map(changed, statement.orelse)
            return statement._replace(then=tuple(then), orelse=tuple(orelse))
        if isinstance(statement, For) and statement.pragma:
            statement = statement._replace(pragma=change(statement.pragma))
        if isinstance(statement, (For, Block)):
            return statement._replace(body=tuple(map(changed, statement.body)))
        return statement

    return program._replace(body=tuple(map(changed, program.body)))


def statuses(stdout: str) -> dict[int, int]:
    """By kernel: its exit status, or minus the signal that ended it."""
    pairs = (line.split() for line in stdout.splitlines())
    return {int(pair[0]): int(pair[1]) for pair in pairs if len(pair) == 2}


def _caller(program: Program, k: int, language: Language) -> str:
    """A function that reads the arrays, calls the kernel and writes what it left."""
    before, after, arguments, types = [], [], [], []
    declared = inputs(program)
    arrays = {array.name: array for array in program.arrays}
    scalars = {s.name: s for s in (*program.sizes, *program.scalars)}
    for parameter in parameters(program):
        name = parameter.name
        if parameter.kind == "array":
            count, dtype = declared[name].nbytes, arrays[name].dtype
            before.append(f"{dtype} *{name} = malloc({max(count, 1)});")
            before.append(f"if (fread({name}, 1, {count}, file_) > {max(count, 1)}) return;")
            after.append(f"fwrite({name}, 1, {count}, file_);")
        else:
            dtype = "int" if parameter.kind == "size" else scalars[name].dtype
            before.append(f"{dtype} {name} = {scalars[name].value};")
        if parameter.kind == "result":
            after.append(f"fwrite(&{name}, sizeof {name}, 1, file_);")
        by_value = parameter.kind in ("size", "value") and language == "c"
        arguments.append(("" if by_value or parameter.kind == "array" else "&") + name)
        types.append(dtype if by_value else "void *")
    symbol = f"kernel_{k}" if language == "c" else f"kernel_{k}_"
    lines = [
        f'FILE *file_ = fopen("in_{k}", "rb");',
        *before,
        "fclose(file_);",
        f"{symbol}({', '.join(arguments)});",
        f'file_ = fopen("out_{k}", "wb");',
        *after,
        "fclose(file_);",
    ]
    body = "\n".join(f"    {line}" for line in lines)
    return (
        f"void {symbol}({', '.join(types) or 'void'});\nstatic void run_{k}(void)\n{{\n{body}\n}}\n"
    )
