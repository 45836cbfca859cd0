"""Tools that compile and run programs in the sandbox: agreement with labels, and their edges."""

import numpy as np
import pytest

from jaxfm.tasks.hpc.generator import asked, generate
from jaxfm.tasks.hpc.operations import operations
from jaxfm.tasks.hpc.program import (
    Array,
    Assign,
    Clause,
    For,
    Number,
    Op,
    Pragma,
    Program,
    Ref,
    Scalar,
    Var,
)
from jaxfm.tasks.hpc.verifiers import (
    archer,
    auto_parallelizer,
    cachegrind,
    harness,
    same_output,
    thread_sanitizer,
)
from jaxfm.tasks.hpc.verifiers.harness import Kernel


def needs(tool):
    return pytest.mark.skipif(tool.available() is not None, reason=str(tool.available()))


I, N = Var("i"), Var("n")
A, B, S = Ref("a", (I,)), Ref("b", (I,)), Var("s")
SUM = Clause("reduction", ("s",), "+")


def loop(*body, clauses=(), directive="parallel for"):
    arrays = tuple(Array(name, (Op("+", (N, Number(1))),)) for name in "ab")
    over = For("i", Number(0), N, body, 1, Pragma(directive, tuple(clauses)))
    return Program((Scalar("n", "int", 40),), arrays, (Scalar("s", "double"),), (over,))


COPY = loop(Assign(A, B))
ADD = loop(Assign(S, A, "+"), clauses=[SUM])
RACE = loop(Assign(S, A, "+"))
WRONG = loop(Assign(S, A, "+"), clauses=[Clause("private", ("s",))])


@needs(archer)
def test_archer_agrees_with_labels():
    items = generate(31, 17)
    found = archer.verify([item.program for item in items])
    assert [j.verdict == "refuted" for j in found] == [item.racy for item in items]
    assert "cannot tell" not in {j.verdict for j in found} and "clang" in found[0].tool


@needs(archer)
def test_archer_leaves_fortran_alone():
    found = archer.verify([Kernel(COPY, language="fortran"), Kernel(RACE)], threads=(3,))
    assert [j.verdict for j in found] == ["cannot tell", "refuted"]


@needs(thread_sanitizer)
@pytest.mark.skipif(not harness.fortran(), reason="gfortran is not installed.")
def test_thread_sanitizer_agrees_with_labels_in_fortran():
    items = [item for item in generate(32, 17) if "fortran" in item.languages]
    kernels = [Kernel(item.program, language="fortran") for item in items]
    found = thread_sanitizer.verify(kernels)
    wrong = [
        item.family
        for item, j in zip(items, found)
        if j.verdict == "cannot tell" or (j.verdict == "refuted") > item.racy
    ]
    missed = sum(j.verdict != "refuted" for item, j in zip(items, found) if item.racy)
    assert not wrong and missed <= 1


@needs(thread_sanitizer)
def test_gcc_alone_calls_a_right_program_of_two_regions_racy():
    """The wrong label tool of `sites`: it does not see that a region ends before the next."""
    two = COPY._replace(body=(*COPY.body, *loop(Assign(B, A)).body))
    assert thread_sanitizer.plain([two])[0].verdict == "refuted"
    assert thread_sanitizer.verify([two])[0].verdict == "confirmed"


@needs(same_output)
def test_results_are_those_of_the_serial_program():
    strange = loop(Assign(A, B), directive="parallel fro")
    found = same_output.verify([COPY, ADD, WRONG, strange])
    verdicts = [j.verdict for j in found]
    assert verdicts == ["confirmed", "confirmed", "refuted", "cannot tell"]
    assert "s differs with" in found[2].reason and "gcc" in found[0].tool


@needs(same_output)
@pytest.mark.skipif(not harness.fortran(), reason="gfortran is not installed.")
def test_fortran_leaves_the_same_results_as_c():
    items = [item for item in generate(33, 25) if "fortran" in item.languages and not item.racy]
    found = same_output.verify([Kernel(item.program, language="fortran") for item in items])
    assert {j.verdict for j in found} == {"confirmed"}


@needs(auto_parallelizer)
def test_the_compiler_is_precise_and_timid():
    items = [item for item in generate(34, 50) if item.target is not None]
    found = auto_parallelizer.verify([asked_again(item) for item in items])
    parallel = [
        item.pragma is not None for item, j in zip(items, found) if j.verdict != "cannot tell"
    ]
    assert {j.verdict for j in found} == {"confirmed", "cannot tell"}
    assert sum(parallel) >= 0.9 * len(parallel)
    assert sum(parallel) < sum(item.pragma is not None for item in items)


def asked_again(item):
    """The loop of an item with a bare directive, which says which loop is meant."""
    from jaxfm.tasks.hpc.proofs.clauses import with_pragma

    return with_pragma(asked(item), item.target, Pragma("parallel for"))


@needs(cachegrind)
def test_counts_repeat_and_order_programs_as_operations_do():
    programs = [COPY._replace(sizes=(Scalar("n", "int", n),)) for n in (10, 100, 1000)]
    found = cachegrind.counts(programs)
    assert found == cachegrind.counts(programs)
    counted = [operations(program).statements for program in programs]
    assert counted == [10, 100, 1000]
    assert found[0].instructions < found[1].instructions < found[2].instructions
    assert found[2].writes - found[1].writes == 900
    small = cachegrind.counts(programs, {**cachegrind.CACHES, "D1": "128,2,64"})
    assert small[2].first_misses > found[2].first_misses
    assert small[2].cycles > small[2].instructions


def test_counts_are_read_by_function():
    text = "events: Ir Dr\nfl=x.c\nfn=f\n3 10 2\n4 5 1\nfn=g\n9 7 0\nfn=f\n5 1 1\nsummary: 23 4\n"
    assert cachegrind._by_function(text) == {"f": {"Ir": 16, "Dr": 4}, "g": {"Ir": 7, "Dr": 0}}


def test_numbers_are_equal_but_for_rounding_and_integers_entirely():
    one = np.array([1.0, 1e6, np.nan])
    assert same_output.equal(one, one * (1 + 1e-12))
    assert not same_output.equal(one, one + 1.0)
    assert not same_output.equal(one, np.array([1.0, 1e6, 0.0]))
    assert not same_output.equal(np.array([1, 2]), np.array([1, 3]))


def test_directives_of_texts_are_read_over_several_lines():
    c = "#pragma omp parallel for \\\n  private(x)\n for(;;) {\n#pragma omp odd (\n}"
    found = harness.directives(Kernel(COPY, c))
    assert found[0] == Pragma("parallel for", (Clause("private", ("x",)),))
    fortran = "!$OMP PARALLEL DO &\n!$omp& private(x)\ndo i = 1, n\n!$omp end parallel do\n"
    found = harness.directives(Kernel(COPY, fortran, "fortran"))
    assert [pragma.directive for pragma in found] == ["parallel for", "end parallel for"]
    assert found[0].named("private") == ("x",)


@needs(thread_sanitizer)
def test_a_crash_is_no_race():
    text = "void kernel(int n, double *a, double *b, double *s) { *(volatile int *)8 = 1; }\n"
    found = thread_sanitizer.verify([Kernel(COPY, text)], threads=(3,))
    assert found[0].verdict == "cannot tell" and "SEGV" in found[0].reason
