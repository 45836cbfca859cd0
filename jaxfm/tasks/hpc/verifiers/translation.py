"""Whether a function that a model wrote is a right parallel form of a serial one (T8).

The text must be one function called `kernel` with the parameters of the serial one, at least one
parallel directive, and calls of nothing but mathematics and OpenMP. It is then built, run on inputs
of several sizes with several numbers of threads and schedules, compared with the serial program,
and watched for races; where the front end reads its loops, their proof is asked, too. What is built
and run is built and run in the sandbox.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence

from jaxfm.tasks.hpc.frontend import lift, loops
from jaxfm.tasks.hpc.frontend.verdict import judge_given
from jaxfm.tasks.hpc.program import Judgement, Program
from jaxfm.tasks.hpc.render import Language
from jaxfm.tasks.hpc.verifiers import compile, harness, sandbox
from jaxfm.tasks.hpc.verifiers.harness import Kernel
from jaxfm.tasks.hpc.verifiers.sandbox import Limits
from jaxfm.tasks.hpc.verifiers.verified import Verified, combined
from jaxfm.tasks.hpc.verifiers.verifier import VERIFIERS, Verifier, present

LONGEST = 20_000
MATHEMATICS = {
    "c": "fabs fabsf sqrt sqrtf exp expf log pow sin cos tan fmin fmax fminf fmaxf floor ceil abs",
    "fortran": "abs sqrt exp log sin cos tan min max mod floor ceiling dble real int sign merge "
    "sum product minval maxval dot_product matmul spread reshape size",
}
STATEMENTS = "if for while do switch return sizeof else then where elsewhere case select call"
OUTSIDE = {
    "c": r"\b(?:asm|goto|extern|_Pragma|__\w+)\b|[\"'@`$]|%:|\?\?|##",
    "fortran": r"\b(?:bind|include|open|read|write|print|execute_command_line|block)\b|[\"'@`#]",
}
COMMENTS = {"c": r"//[^\n]*|/\*.*?\*/", "fortran": r"!(?!\$)[^\n]*"}
DIRECTIVES = {"c": r"^[ \t]*#[^\n]*", "fortran": r"^[ \t]*!\$[^\n]*"}
HEADS = {"c": r"\bvoid\s+(\w+)\s*\(", "fortran": r"^\s*subroutine\s+(\w+)"}
INCLUDES = r"#\s*include\s*<(?:math|omp|stdlib|stdbool)\.h>"


def translation_verified(
    program: Program,
    text: str,
    language: Language = "c",
    *,
    verifiers: Sequence[Verifier] | None = None,
) -> Verified:
    """Whether a text is a right parallel form of a program; see `translations_verified`."""
    return translations_verified([(program, text)], language, verifiers=verifiers)[0]


def translations_verified(
    answers: Sequence[tuple[Program, str]],
    language: Language = "c",
    *,
    verifiers: Sequence[Verifier] | None = None,
) -> list[Verified]:
    """Whether texts are right parallel forms of programs; see the module.

    Args:
        answers: A program, whose own directives do not count, and a text for it.
        language: Of the texts.
        verifiers: Those that may run texts; all that are present otherwise.

    Returns:
        What all say. Of `judgements`, "text" says whether it was admitted, "compiler" whether it
        was built.
    """
    tools = present() if verifiers is None else list(verifiers)
    claims = VERIFIERS | {tool.name: tool for tool in tools}
    kernels = [Kernel(program, text, language) for program, text in answers]
    found: list[dict[str, Judgement]] = []
    for kernel in kernels:
        reason = refusal(kernel)
        found.append(
            {"text": Judgement("refuted", reason, "reader of translations")} if reason else {}
        )
    steps: list[tuple[str, Callable[[Sequence], list[Judgement]]]]
    steps = [("compiler", built), ("integer sets", _proved)]
    steps += [(tool.name, _on_sizes if tool.claim == "same results" else tool.verify)
              for tool in tools if tool.executes]  # fmt: skip
    for name, ask in steps:
        left = [k for k, judgements in enumerate(found) if not _refuted(judgements)]
        for k, judgement in zip(left, ask([kernels[k] for k in left]) if left else ()):
            found[k][name] = judgement
    return [combined(judgements, claims) for judgements in found]


def _refuted(judgements: dict[str, Judgement]) -> bool:
    return any(judgement.verdict == "refuted" for judgement in judgements.values())


def refusal(kernel: Kernel) -> str:
    """Why a text is no parallel function that may be built, as a sentence; empty if it is one."""
    language, text = kernel.language, kernel.text
    if not text.strip() or len(text) > LONGEST or "\0" in text:
        return f"It is empty, longer than {LONGEST} characters, or no text."
    flags = re.MULTILINE | re.DOTALL | re.IGNORECASE
    plain = re.sub(COMMENTS[language], " ", re.sub(r"\\\s*\n", " ", text), flags=flags)
    for line in re.findall(DIRECTIVES[language], plain, re.MULTILINE):
        pragma = re.match(
            r"\s*#\s*pragma\s+omp\b" if language == "c" else r"\s*!\$omp\b", line, re.I
        )
        if not pragma and not re.fullmatch(INCLUDES, line.strip()):
            return f"It has the line `{line.strip()[:60]}`, which is no directive of OpenMP."
    code = re.sub(DIRECTIVES[language], " ", plain, flags=re.MULTILINE)
    if odd := re.search(OUTSIDE[language], code, flags):
        return f"It contains `{odd[0]}`, which a translation may not."
    defined = [name.lower() for name in re.findall(HEADS[language], code, flags)]
    if defined.count("kernel") != 1:
        return "It does not define one function called kernel."
    declared = {array.name for array in kernel.program.arrays}
    own = {*MATHEMATICS[language].split(), *STATEMENTS.split(), *defined, *declared}
    for called in re.findall(r"\b([A-Za-z_]\w*)\s*\(", code):
        name = called.lower() if language == "fortran" else called
        if name not in own and not name.startswith("omp_") and not _local(name, code, language):
            return f"It calls {called}, which is neither mathematics nor OpenMP."
    words = {word for pragma in harness.directives(kernel) for word in pragma.directive.split()}
    return "" if "parallel" in words else "It has no parallel directive."


def _local(name: str, code: str, language: Language) -> bool:
    """Whether a name is a function of the text's own, or in Fortran an array that it declares."""
    if language == "c":
        return bool(
            re.search(rf"\b(?:void|int|long|float|double)\s+{name}\s*\([^;]*?\)\s*\{{", code)
        )
    known = r"integer|real|double\s+precision|logical|dimension|intent|kind|subroutine|function"
    return name in re.split(r"\|", known) or bool(
        re.search(rf"::[^\n]*\b{name}\s*\(|\bfunction\s+{name}\b", code, re.IGNORECASE)
    )


def built(kernels: Sequence[Kernel]) -> list[Judgement]:
    """Whether texts compile; those of one call in one sandbox."""
    if reason := compile.missing("gcc"):
        return [Judgement("cannot tell", reason, "gcc")] * len(kernels)
    files: dict[str, str | bytes] = {}
    for k, kernel in enumerate(kernels):
        head = "#include <math.h>\n" if kernel.language == "c" else ""
        files[f"kernel_{k}{harness.SUFFIXES[kernel.language]}"] = head + kernel.text
    script = 'for f in kernel_*.c kernel_*.f90; do [ -e "$f" ] && gcc -fopenmp -w -c "$f" -o x.o ' \
             '2>"$f.err" && echo "$f"; done; grep -m 1 -H -i error: *.err; true'  # fmt: skip
    done = sandbox.run(["sh", "-c", script], files, Limits(seconds=30 + 5 * len(kernels)))
    good = set(done.stdout.split())
    tool = str(compile.version("gcc"))
    found = []
    for k, kernel in enumerate(kernels):
        name = f"kernel_{k}{harness.SUFFIXES[kernel.language]}"
        told = re.search(rf"^{re.escape(name)}\.err:.*?[Ee]rror: (.*)$", done.stdout, re.MULTILINE)
        if name in good:
            found.append(Judgement("confirmed", "It compiles.", tool))
        elif done.reason:
            found.append(Judgement("cannot tell", done.reason, tool))
        else:
            why = f"It does not compile: {told[1]}." if told else "It does not compile."
            found.append(Judgement("refuted", why, tool))
    return found


def _on_sizes(kernels: Sequence[Kernel]) -> list[Judgement]:
    """Equality of results for the sizes of each program, and for larger ones."""
    several = [[resized(kernel, k) for k in range(3)] for kernel in kernels]
    asked = VERIFIERS["same output"].verify([one for group in several for one in group])
    found = []
    for first in range(0, len(asked), 3):
        group = asked[first : first + 3]
        order = ("refuted", "cannot tell", "confirmed")
        found.append(min(group, key=lambda judgement: order.index(judgement.verdict)))
    return found


def resized(kernel: Kernel, number: int) -> Kernel:
    """A kernel with its own sizes (0), or with larger ones."""
    larger = tuple(
        size._replace(value=int(size.value) * (number + 1) // max(number, 1) + 2 * number)
        if number else size
        for size in kernel.program.sizes
    )  # fmt: skip
    return kernel._replace(program=kernel.program._replace(sizes=larger))


def _proved(kernels: Sequence[Kernel]) -> list[Judgement]:
    """The proof for all sizes, where the text's only directives are those of single loops."""
    return [_proof(kernel) for kernel in kernels]


def _proof(kernel: Kernel) -> Judgement:
    tell = lambda reason: Judgement("cannot tell", reason, "integer sets of the front end")
    if not all(map(importlib.util.find_spec, ("tree_sitter", "islpy"))):
        return tell("The parsers and integer sets are not installed; pip install 'jaxfm[hpc]'.")
    try:
        found = [loop for loop in loops(kernel.text, kernel.language) if loop.directive]
    except (ValueError, ImportError) as reason:
        return tell(str(reason))
    begun = [p for p in harness.directives(kernel) if not p.directive.startswith("end ")]
    if len(found) != len(begun):
        return tell("It has directives besides those of loops.")
    assume = frozenset(("no_alias", "in_bounds"))
    last = tell("It has no loop with a directive.")
    for loop in found:
        lifted = lift(loop, assume=assume)
        if isinstance(lifted, str) or lifted.pragma is None:
            return tell(lifted if isinstance(lifted, str) else "A directive cannot be read.")
        last = judge_given(lifted, lifted.pragma, assume=assume).judgement
        if last.verdict != "confirmed":
            return last
    return last
