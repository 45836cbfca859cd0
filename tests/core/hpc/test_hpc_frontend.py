"""Loops of real files: parsed, lifted, and never called race-free where they may race."""

import random

import pytest

pytest.importorskip("tree_sitter", reason="needs jaxfm[hpc]")
pytest.importorskip("tree_sitter_c", reason="needs jaxfm[hpc]")
pytest.importorskip("tree_sitter_fortran", reason="needs jaxfm[hpc]")
pytest.importorskip("islpy", reason="needs jaxfm[hpc]")

from jaxfm.tasks.hpc.frontend import lift, loops
from jaxfm.tasks.hpc.frontend.pragmas import parse_pragma, write_pragma
from jaxfm.tasks.hpc.frontend.source import Outside
from jaxfm.tasks.hpc.frontend.verdict import judge_given, judge_serial

HEAD = """#define N 100
#define SQ(x) ((x) * (x))
struct pair { double x; };
double g[N][N], *gp; volatile double vol[10]; int count; static double acc;
void f(int n, int m, int k, unsigned u, double *restrict a, double *restrict b,
       double c[restrict n][m], int *restrict idx, double *p, double *q, double **rows,
       struct pair *s, double t, double x) {
  int i, j; double fixed[100][100];
"""


def judged(body, language="c", first=0, **options):
    """The verdict, the reason and the directive of the first loop of a function."""
    text = f"{HEAD}{body}\n}}\n" if language == "c" and "void " not in body else body
    loop = loops(text, language)[first]
    lifted = lift(loop, **options)
    if isinstance(lifted, str):
        return "cannot tell", lifted, ""
    assume = frozenset(options.get("assume", ()))
    if lifted.pragma is not None:
        verdict = judge_given(lifted, lifted.pragma, assume=assume)
    else:
        verdict = judge_serial(lifted, assume=assume)
    written = write_pragma(verdict.pragma, loop.source.language)
    return verdict.judgement.verdict, verdict.judgement.reason, written


PARALLEL = [
    ("for (i = 0; i < n; i++) a[i] = b[i];", "parallel for"),
    ("for (int i = n; i > 0; i -= 2) a[i] = a[i] * b[i + 1];", "parallel for"),
    ("for (i = 0; n >= i; i = i + 1) { t = a[i]; a[i] = t * t; }", "parallel for private(t)"),
    ("for (i = 0; i < n; i++) for (j = 0; j < m; j++) c[i][j] += b[j];", "for private(j)"),
    ("for (i = 0; i < n; i++) t += a[i];", "reduction(+: t)"),
    ("for (i = 0; i < n; i++) t = a[i] + t;", "reduction(+: t)"),
    ("for (i = 0; i < n; i++) t = t - a[i] + 2;", "reduction(+: t)"),
    ("for (i = 0; i < n; i++) if (a[i] > t) t = a[i];", "reduction(max: t)"),
    ("for (i = 0; i < n; i++) t = fmin(t, a[i]);", "reduction(min: t)"),
    ("for (i = 0; i < n; i++) t = a[i] < t ? a[i] : t;", "reduction(min: t)"),
    ("for (i = 0; i < n; i++) { int z = 2 * i; a[z] = a[z + 1]; }", "parallel for"),
    ("for (i = 0; i < n; i++) { if (i % 2 == 0) a[i] = a[i + 1]; }", "parallel for"),
    ("for (i = 0; i < n; i++) a[i] = a[i + n];", "parallel for"),
    ("for (i = 0; i < n; i++) *(a + i) = sqrt(b[i]);", "parallel for"),
    ("for (i = 0; i < n; i++) { if (b[i] > 0) t = 1; else t = 2; a[i] = t; }", "private(t)"),
    ("for (i = 0; i < n; i++) { double z = 0; for (j = 0; j < m; j++) z += c[i][j]; a[i] = z; }",
     "parallel for private(j)"),
    ("for (i = 0; i < n; i++) for (j = 0; j < m; j++) a[i * m + j] = 0;", "private(j)"),
    ("for (i = 0; i < N; i++) for (j = 0; j <= i; j++) g[i][j] = 0;", "private(j)"),
    ("for (i = 0; i < n; i++) acc += a[i];", "reduction(+: acc)"),
    ("for (i = 0; i < n; i++) { double z = 0; for (j = idx[i]; j < idx[i + 1]; j++) z += b[j];"
     " a[i] = z; }", "private(j)"),
    ("for (i = 0; i < n; i++) p[i] = idx[i];", "parallel for"),
    ("double *w = malloc(n * 8); for (i = 0; i < n; i++) w[i] = p[i];", "parallel for"),
    ("for (unsigned i = 0; i < u; i++) a[i] = 1;", "parallel for"),
    ("#pragma omp parallel for reduction(+: t) \\\n  schedule(static, 4)\n"
     "for (i = 0; i < n; i++) t += a[i];", "reduction(+: t)"),
    ("#pragma omp parallel for\nfor (i = 0; i < n; i++)\n#pragma omp atomic\ncount += 1;", "for"),
    ("#pragma omp parallel for\nfor (i = 0; i < n; i++) {\n#pragma omp critical (x)\n{ t += 1; }}",
     "for"),
    ("#pragma omp parallel private(t)\n{ double z;\n#pragma omp for\n"
     "for (i = 0; i < n; i++) { z = b[i]; t = z; a[i] = t; } }", "for"),
    ("#pragma omp parallel for collapse(2)\n"
     "for (i = 0; i < n; i++) for (j = 0; j < m; j++) c[i][j] = 1;", "collapse(2)"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "directive"), PARALLEL)
def test_race_free_loops_are_proved(body, directive):
    verdict, reason, written = judged(body)
    assert (verdict, directive in written) == ("confirmed", True), (reason, written)


RACES = [
    "for (i = 1; i < n; i++) a[i] = a[i - 1];",
    "for (i = 0; i < n; i++) a[0] = b[i];",
    "for (i = 0; i < n; i++) { a[i] = t; t = b[i]; }",
    "for (i = 0; i < n; i++) { if (b[i] > 0) t = b[i]; a[i] = t; }",
    "for (i = 0; i < n; i++) if (x > 0) if (x < 1) a[0] = 1;",
    "for (i = 0; i < n; i++) count += a[i];",  # each step rounds, so it is no reduction
    "for (i = 1; i < 100; i++) for (j = 0; j < 100; j++) fixed[i][j] = fixed[i][j - 1];",
    "#pragma omp parallel for\nfor (i = 0; i < n; i++) t += a[i];",
    "#pragma omp parallel for\nfor (i = 0; i < n; i++) for (j = 0; j < m; j++) c[i][j] = 1;",
    "#pragma omp parallel for private(j) collapse(2)\n"
    "for (i = 0; i < n; i++) for (j = 0; j < m; j++) a[i] += 1;",
    "#pragma omp parallel for\nfor (i = 0; i < n; i++) {\n#pragma omp atomic\n t += 1; t = 2; }",
    "#pragma omp parallel for\nfor (i = 0; i < n; i++) {\n#pragma omp critical (x)\n"
    "t += 1;\n#pragma omp critical (y)\nt += 1; }",
]


@pytest.mark.parametrize("body", RACES)
def test_races_are_found_with_their_lines(body):
    verdict, reason, _ = judged(body)
    assert verdict == "refuted" and "line" in reason.lower(), reason


OUTSIDE = [
    ("for (i = 0; i < n; i++) p[i] = q[i];", "p and q may be the same memory"),
    ("for (i = 0; i < n; i++) gp[i] = p[i];", "may be the same memory"),
    ("double *w = malloc(n), *v = w; for (i = 0; i < n; i++) w[i] = v[i];", "w and v may"),
    ("double *w = a; for (i = 0; i < n; i++) a[i] = w[i + 1];", "a and w may"),
    ("double *restrict w = a; for (i = 0; i < n; i++) a[i] = w[i + 1];", "a and w may"),
    ("gp = a; for (i = 0; i < n; i++) a[i] = gp[i + 1];", "a and gp may"),
    ("int *w = (int *)a; for (i = 0; i < n; i++) a[i] = w[i + 1];", "a and w may"),
    ("double *w = &t; for (i = 0; i < n; i++) { t = b[i]; x += *w; }", "w may point to t"),
    ("for (i = 0; i < n; i++) rows[i][0] = 1;", "array of pointers"),
    ("for (i = 0; i < n; i++) a[idx[i]] = 1;", "not linear"),
    ("for (i = 0; i < n; i++) a[i * i] = 1;", "not linear"),
    ("for (i = 0; i < n; i++) a[i] = foo(i);", "calls foo"),
    ("for (i = 0; i < n; i++) foo();", "calls foo"),
    ("for (i = 0; i < n; i++) { if (i == k) break; a[i] = 1; }", "leaves a loop early"),
    ("for (i = 0; i < n; i++) { if (i == k) continue; a[i] = 1; }", "continues"),
    ("for (i = 0; i < n; i++) { if (i == k) return; a[i] = 1; }", "returns"),
    ("for (i = 0; i < n; i++) { again: a[i] = 1; if (t > 1) goto again; }", "label"),
    ("for (i = 0; i < n; i++) { while (t > 0) t -= 1; }", "while"),
    ("for (i = 0; i < n; i++) a[i] = SQ(i);", "SQ"),
    ("for (i = 0; i < n; i++) a[i] = UNKNOWN;", "does not declare"),
    ("for (i = 0; i < n; i++) { n--; a[i] = 1; }", "depend on n"),
    ("for (i = 0; i < n; i++) { i++; a[i] = 1; }", "changes i"),
    ("for (i = 0; i < idx[0]; i++) idx[i] = 1;", "depend on idx"),
    ("for (unsigned i = 0; i < u; i++) for (unsigned z = 0; z < u; z++) a[i * u + z] = 1;", "wrap"),
    ("for (i = 0; i < n; i++) { a++; }", "pointer a"),
    ("for (i = 0; i < n; i++) { *a++ = 1; }", "computed"),
    ("for (i = 0; i < n; i++) s[i].x = 1;", "structure"),
    ("for (i = 0; i < n; i++) vol[i] = 1;", "volatile"),
    ("for (i = 0; i < n; i++) { static double z; z = b[i]; a[i] = z; }", "static"),
    ("for (i = 0; i < n; i++) { double z[3]; z[0] = b[i]; a[i] = z[0]; }", "array"),
    ("for (i = 0; i < n; i++) { int i = 3; a[i] = 0; }", "declared twice"),
    ("for (double z = 0; z < n; z += 1) a[0] = z;", "integer"),
    ("for (i = 0; i < t; i++) a[i] = 1;", "real number"),
    ("for (unsigned char z = 0; z < 9; z++) a[z] = 1;", "32 bits"),
    ("for (unsigned i = u - 1; i >= 0; i--) a[i] = 1;", "may wrap"),
    ("for (unsigned i = u; i > 0; i -= 2) a[i] = 1;", "may wrap"),
    ("for (unsigned i = 0; i < u; i++) a[2 * i] = 1;", "may wrap"),
    ("for (unsigned i = 0; i < u; i++) if (i - 1 < 0) a[0] = 1;", "not known"),
    ("for (i = 0; i < n; i++) for (j = 0; j <= m; j++) c[i][j] = 1;", "leave its dimension"),
    ("for (i = 0; i < n; i++) for (j = 0; j < m; j++) fixed[i][j] = 1;", "extent is 100"),
    ("for (i = 0; i < n; i++) for (j = 0; j <= m; j++) a[i * m + j] = 1;", "leave"),
    ("for (i = 0; i < n; i++) a[i] = a[i + k];", "for some values"),
    ("for (i = 0; i < n; i++) a[i] = i, b[i] = 2;", "comma"),
    ("for (i = 0; i < n; i++) a[i] = b[i] = 2;", "assigns inside"),
    ("for (i = 0; i < n; i++)\n#ifdef A\na[i] = 1;\n#else\na[0] = 1;\n#endif\n", ""),
    ("for (i = 0; i < n; i++) { x = b[i]; if (x > 2) t = x; } acc = t;", "unset"),
    ("for (i = 0; i < n; i++) a[i] = 1; count = i;", "read after it"),
    ("int *w = &count; for (i = 0; i < n; i++) w[i] = count;", "may point to count"),
    ("#pragma omp simd\nfor (i = 0; i < n; i++) a[i] = 1;", "simd"),
    ("#pragma omp for\nfor (i = 0; i < n; i++) a[i] = 1;", "not in this function"),
    ("#pragma omp parallel\n{\n#pragma omp parallel for\nfor (i = 0; i < n; i++) a[i] = 1; }",
     "inside other"),
    ("#pragma omp parallel\n{\n#pragma omp single\n{\n#pragma omp for\n"
     "for (i = 0; i < n; i++) a[i] = 1; }}", "inside other"),
    ("#pragma omp parallel for private(fixed)\nfor (i = 0; i < n; i++) fixed[0][0] = 1;", "array"),
    ("#pragma omp parallel for\nfor (i = 0; i < n; i++) {\n#pragma omp task\na[i] = 1; }", "task"),
    ("#pragma omp parallel for ordered\nfor (i = 0; i < n; i++) a[i] = 1;", "ordered"),
    ("#pragma omp target teams distribute parallel for\nfor (i = 0; i < n; i++) a[i] = 1;", ""),
]  # fmt: skip


@pytest.mark.parametrize(("body", "says"), OUTSIDE)
def test_what_is_outside_is_never_called_race_free(body, says):
    verdict, reason, _ = judged(body)
    assert verdict == "cannot tell", reason
    assert says in reason
    assert reason.endswith(".")


@pytest.mark.parametrize(
    ("body", "assume"),
    [
        ("for (i = 0; i < n; i++) p[i] = q[i];", ["no_alias"]),
        ("for (i = 0; i < n; i++) for (j = 0; j < m; j++) fixed[i][j] = 1;", ["in_bounds"]),
    ],
)
def test_the_user_may_vouch_for_what_cannot_be_seen(body, assume):
    assert judged(body, assume=assume)[0] == "confirmed"
    with pytest.raises(ValueError, match="assume='alias': give some of no_alias, in_bounds"):
        judged(body, assume=["alias"])


@pytest.mark.parametrize("seed", range(60))
def test_the_proof_agrees_with_running_the_loop(seed):
    draw = random.Random(seed)
    low, count, step = draw.randint(0, 3), draw.randint(2, 9), draw.choice([1, 2, 3])
    size = [draw.randint(1, 3) for _ in range(2)] + [draw.randint(0, 6) for _ in range(2)]
    inner = draw.choice([1, 1, 3])
    refs = [(draw.choice([0, 1, 2, -1, 3]), draw.choice([0, 1, 2]), draw.randint(20, 26))
            for _ in range(2)]  # fmt: skip
    guard = draw.choice(["", "if (i % 2 == 0) ", f"if (i > {size[2]} || j != 1) "])
    write, read = (f"a[{ci} * i + {cj} * j + {d}]" for ci, cj, d in refs)
    text = (
        f"void f(double *restrict a) {{ for (int i = {low}; i < {low + count * step}; i += {step}) "
        f"for (int j = 0; j < {inner}; j++) {guard}{write} = {read}; }}"
    )
    touched = []  # brute force: the place of each access, by the iteration of the outer loop
    for i in range(low, low + count * step, step):
        for j in range(inner):
            holds = not guard or (i % 2 == 0 if "%" in guard else i > size[2] or j != 1)
            if holds:
                places = [ci * i + cj * j + d for ci, cj, d in refs]
                touched += [(i, places[0], True), (i, places[1], False)]
    races = any(
        one[1] == other[1] and one[0] != other[0] and (one[2] or other[2])
        for one in touched
        for other in touched
    )
    assert judged(text)[0] == ("refuted" if races else "confirmed"), text


FORTRAN = """subroutine f(a, n, lda, x, idx)
  implicit none
  integer, intent(in) :: n, lda, idx(n)
  real(8), intent(inout) :: a(lda, *), x(0:n)
  real(8) :: b(:,:), t, s
  real(8), pointer :: p(:), q(:)
  integer :: i, j, k
  t = 0; s = 0
{}
end subroutine
"""


@pytest.mark.parametrize(
    ("body", "verdict", "says"),
    [
        ("do i = 1, n\nt = x(i)\nx(i) = t\nend do", "confirmed", "private(t)"),
        ("do j = 1, n\ndo i = 1, lda\na(i, j) = 0\nend do\nend do", "confirmed", "!$omp"),
        ("do j = 1, n\ndo i = 1, n\na(i, j) = 0\nend do\nend do", "cannot tell", "lda"),
        ("DO J = 1, N\nDO I = 1, N\nB(I, J) = B(I, J) + 1\nEND DO\nEND DO", "confirmed", ""),
        ("do i = 1, n\ns = s + x(i)\nend do\nx(1) = s", "confirmed", "reduction(+: s)"),
        ("do i = n, 1, -1\nx(i) = x(i - 1)\nend do", "refuted", "reads x"),
        ("do i = 1, n\nx(idx(i)) = 1\nend do", "cannot tell", "not linear"),
        ("do i = 1, n\ncall g(x(i))\nend do", "cannot tell", "calls g"),
        ("do i = 1, n\nx(i) = g(i)\nend do", "cannot tell", "calls g"),
        ("do i = 1, n\nif (x(i) > 0) exit\nx(i) = 1\nend do", "cannot tell", "early"),
        ("do i = 1, n\nx(:) = 1\nend do", "cannot tell", "not read"),
        ("do i = 1, n\nx = 1\nend do", "cannot tell", "whole of x"),
        ("do i = 1, n\np(i) = q(i)\nend do", "cannot tell", "same memory"),
        ("do i = 1, n\n!$ x(1) = i\nx(i) = 1\nend do", "cannot tell", "OpenMP"),
        ("!$omp parallel do &\n!$omp& private(t)\ndo i = 1, n\nt = x(i)\nx(i) = t\nend do",
         "confirmed", "private(t)"),
        ("!$omp parallel do\ndo i = 1, n\nt = x(i)\nx(i) = t\nend do", "refuted", "writes t"),
        ("!$omp parallel\n!$omp do\ndo i = 1, n\nx(i) = 1\nend do\n!$omp end parallel",
         "confirmed", ""),
        ("!$omp parallel do default(private)\ndo i = 1, n\nt = x(i)\nend do", "cannot tell",
         "default"),
        ("do i = 1, n\nk = ior(k, idx(i))\nend do\nx(1) = k", "confirmed", "reduction(ior: k)"),
        ("!$omp do\ndo i = 1, n\nx(i) = 1\nend do", "cannot tell", "not in this function"),
        ("!$omp parallel do\ndo i = 1, n\n!$omp atomic\ns = s + 1\nend do", "confirmed", ""),
    ],
)  # fmt: skip
def test_fortran(body, verdict, says):
    found, reason, written = judged(FORTRAN.format(body), "fortran")
    assert found == verdict, reason
    assert says in reason + written


def test_fixed_form_with_labels_and_continuations():
    text = (
        "      subroutine f(a,n)\nc comment\n      real a(n)\n      do 10 i=1,n\n"
        "      a(i)=a(i)+\n     &  1.0\n10    continue\nc$omp parallel do\nc$omp&private(k)\n"
        "      do 20 i=1,n\n20    a(1)=a(i)                                 "
        "                        noise\n      end\n"
    )
    first, second = loops(text, "fortran-fixed")
    assert (first.first_line, first.last_line, second.first_line) == (4, 7, 10)
    assert second.directive == "omp parallel do private(k)" and second.directive_line == 8
    assert judged(text, "fortran-fixed")[0] == "confirmed"
    assert judged(text, "fortran-fixed", first=1)[0] == "refuted"


@pytest.mark.parametrize(
    "text",
    [
        "#pragma omp parallel for private(i, j) reduction(+: s) schedule(static, 4)",
        "#pragma omp for nowait",
        "#pragma omp critical",
        "!$omp parallel do lastprivate(t)",
    ],
)
def test_directives_are_written_as_they_are_read(text):
    language = "c" if text.startswith("#") else "fortran"
    pragma = parse_pragma(text.removeprefix("#pragma").removeprefix("!$"), language)
    assert write_pragma(pragma, language) == text
    with pytest.raises(Outside, match="cannot be read"):
        parse_pragma("omp parallel for private(i", "c")


def test_where_loops_stand():
    text = "void f(int n) {\n  for (int i = 0; i < n; i++)\n    for (;;) { }\n}\n"
    outer, inner = loops(text, "c")
    assert (outer.function, outer.first_line, outer.last_line, outer.parent) == ("f", 2, 3, None)
    assert inner.parent == 0 and inner.text == "for (;;) { }"
    assert "does not begin" in lift(inner)


@pytest.mark.parametrize(
    "text",
    [
        "", "for (", "void f( { for (i = 0; i < n; i++) a[i] = 1; }", "}}}}", "#define",
        "void f(int n, double *a) { for (int i = 0; i < n; i++) a[" + "(" * 500 + "i" + ")" * 500
        + "] = 1; }",
        "void f(int n, double *a) { for (int i = 0; i < n; i++) a[i] = " + "1 + " * 3000 + "1; }",
        "void f(int n, double *a) {" + "for (int i = 0; i < n; i++) {" * 1000 + "a[i] = 1;"
        + "}" * 1001,
        "void f(int n, double *a) { for (int i = 0; i < n; i++) " + "if (n) " * 1000 + "a[0] = 1;}",
        "#define for while\nvoid f(int n, double *a) { for (int i = 0; i < n; i++) a[i] = 1; }",
        "\ufefffor (i = 0; i < n; i++) a[i] = 1;", "int x = 'é';\n\x01\x02 for (;;);",
    ],
)  # fmt: skip
def test_malformed_text_gives_reasons(text):
    for loop in loops(text, "c"):
        lifted = lift(loop)
        if loop.parent is None:
            assert isinstance(lifted, str) and lifted.endswith(".")
    for language in ("fortran", "fortran-fixed"):
        for loop in loops(text, language):
            lift(loop)


@pytest.mark.parametrize(
    ("data", "says"),
    [(b"\x7fELF\0\0", "null bytes"), ("for (;;);".encode("utf-16"), "UTF-16")],
)
def test_what_is_no_text_is_refused(data, says):
    with pytest.raises(ValueError, match=says):
        loops(data, "c")
    with pytest.raises(ValueError, match="language='cobol': give one of"):
        loops(b"", "cobol")
