"""A translation is verified by building and running it, and what is not one is not run."""

import re

import pytest

from jaxfm.tasks.hpc.generator import generate
from jaxfm.tasks.hpc.program import Array, Assign, For, Number, Op, Program, Ref, Scalar, Var
from jaxfm.tasks.hpc.proofs.enumeration import judge
from jaxfm.tasks.hpc.render import to_c, to_fortran
from jaxfm.tasks.hpc.verifiers import harness, same_output, verifier
from jaxfm.tasks.hpc.verifiers.harness import Kernel
from jaxfm.tasks.hpc.verifiers.translation import (
    built,
    refusal,
    resized,
    translation_verified,
    translations_verified,
)

needs_gcc = pytest.mark.skipif(
    same_output.available() is not None, reason=str(same_output.available())
)
TOOLS = [verifier.VERIFIERS[name] for name in ("ThreadSanitizer", "same output")]
A = Ref("a", (Var("i"),))
SUM = Program(
    (Scalar("n", "int", 30),), (Array("a", (Var("n"),)),), (Scalar("s", "double"),),
    (For("i", Number(0), Var("n"),
         (Assign(A, Op("*", (A, Number(2.0)))), Assign(Var("s"), A, "+"))),),
)  # fmt: skip
HEAD = "void kernel(int n, double a[n], double *result)\n{\n    double s = *result;\n"
LOOP = "for (int i = 0; i < n; i++) { a[i] = 2.0 * a[i]; s += a[i]; }\n    *result = s;\n}\n"
RIGHT = f"{HEAD}#pragma omp parallel for reduction(+: s)\n{LOOP}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (HEAD + LOOP, "no parallel directive"),
        (RIGHT + RIGHT, "one function called kernel"),
        (RIGHT.replace("kernel", "other"), "one function called kernel"),
        ('#include "/etc/passwd"\n' + RIGHT, "no directive of OpenMP"),
        ("#include <unistd.h>\n" + RIGHT, "no directive of OpenMP"),
        ("#define for while\n" + RIGHT, "no directive of OpenMP"),
        ("%:include <unistd.h>\n" + RIGHT, "%:"),
        ("#pragma GCC poison for\n" + RIGHT, "no directive of OpenMP"),
        (RIGHT.replace("s += a[i]", "system(0)"), "calls system"),
        (RIGHT.replace("s += a[i]", "asm(0)"), "contains `asm`"),
        (RIGHT.replace("void", "__attribute__((constructor)) void", 1), "contains `__attribute__`"),
        (RIGHT.replace("2.0", "'a'"), "contains `'`"),
        ("#include <math.h>\n" + RIGHT, ""),
        (RIGHT.replace("s += a[i]", "s += fmin(a[i], 1.0) /* system(0) */"), ""),
        ("static double f(double x) { return x; }\n" + RIGHT.replace("a[i];", "f(a[i]);", 1), ""),
        ("void kernel(int n)\n{\n#pragma omp \\\n parallel\n    n++;\n}", ""),
    ],
)  # fmt: skip
def test_what_is_no_translation_is_refused_before_it_is_built(text, reason):
    found = refusal(Kernel(SUM, text))
    assert re.search(reason, found) if reason else found == "", found


def test_what_is_no_translation_in_fortran():
    text = to_fortran(SUM).text
    parallel = text.replace("do i", "!$omp parallel do reduction(+: s)\n do i", 1)
    good = Kernel(SUM, parallel, "fortran")
    assert refusal(good) == ""
    assert "no parallel" in refusal(good._replace(text=text))
    for line in ("call system(n)", "open(1)", "include 'x'", "call execute_command_line(n)"):
        assert refusal(good._replace(text=parallel.replace("implicit none", line)))


@needs_gcc
def test_translations_are_built_compared_and_watched():
    texts = [
        RIGHT,
        RIGHT.replace(" reduction(+: s)", ""),
        RIGHT.replace("reduction(+: s)", "private(s)"),
        RIGHT.replace("2.0 *", "3.0 *"),
        RIGHT.replace("a[i] = 2", "b[i] = 2"),
        RIGHT.replace("i < n", "i < 30"),
        RIGHT.replace("i++", "i += 0 * n"),
        "no code at all",
    ]
    found = translations_verified([(SUM, text) for text in texts], verifiers=TOOLS)
    assert [v.verdict for v in found] == ["confirmed"] + ["refuted"] * 7
    assert found[4].judgements["compiler"].verdict == "refuted" and "b" in found[4].reason
    assert found[7].judgements.keys() == {"text"}
    # Only larger sizes than the program's own tell these two apart.
    assert found[5].judgements["same output"].verdict == "refuted"


@needs_gcc
def test_every_right_program_is_a_translation_of_its_serial_form():
    items = generate(41, 17)
    found = translations_verified(
        [(item.program, to_c(item.program).text) for item in items], verifiers=TOOLS
    )
    assert [v.verdict == "confirmed" for v in found] == [not item.racy for item in items]


@needs_gcc
@pytest.mark.skipif(not harness.fortran(), reason="gfortran is not installed.")
def test_a_translation_to_fortran():
    text = to_fortran(SUM).text
    right = text.replace("do i", "!$omp parallel do reduction(+: s)\n do i", 1)
    wrong = right.replace("reduction(+: s)", "private(s)")
    assert translation_verified(SUM, right, "fortran", verifiers=TOOLS).verdict == "confirmed"
    assert translation_verified(SUM, wrong, "fortran", verifiers=TOOLS).verdict == "refuted"
    assert built([Kernel(SUM, "subroutine kernel\nx = = 1", "fortran")])[0].verdict == "refuted"


def test_programs_stay_within_their_arrays_at_larger_sizes():
    for item in generate(42, 68):
        for number in (1, 2):
            larger = resized(Kernel(item.program), number).program
            assert judge(larger).verdict != "cannot tell"
            assert all(b.value > a.value for a, b in zip(item.program.sizes, larger.sizes))


def test_schedules_are_put_into_texts():
    assert "parallel for reduction(+: s) schedule(runtime)\n" in harness.scheduled(
        RIGHT, "c", "runtime"
    )
    given = RIGHT.replace("for red", "for schedule(dynamic, 4) red")
    assert harness.scheduled(given, "c", "runtime") == given
    assert "schedule(static, 1)" in harness.scattered(Kernel(SUM, given)).text
    assert "dynamic" not in harness.scattered(Kernel(SUM, given)).text
    several = (
        "#pragma omp parallel for \\\n  private(x)\n#pragma omp parallel\n#pragma omp barrier\n"
    )
    assert harness.scheduled(several, "c", "static") == several
    fortran = "!$omp parallel do\n do i = 1, n\n!$omp end parallel do\n"
    changed = harness.scheduled(fortran, "fortran", "static")
    assert changed.splitlines() == ["!$omp parallel do schedule(static)", *fortran.splitlines()[1:]]
