"""Pragmas name only what the loop has, each clause once, in both languages."""

import pytest

from jaxfm.parallel.grammars.automaton import regular
from jaxfm.tasks.hpc.pragma_grammar import pragma_grammar


def test_clauses_name_only_the_loops_variables():
    found = regular(pragma_grammar(["t", "s"], ["a"], depth=2))
    good = ["none", "#pragma omp parallel for", "#pragma omp parallel for private(t, a) "
            "reduction(+: s) collapse(2) schedule(static, 8)"]  # fmt: skip
    bad = ["", "private(x)", "private(t, t)", "private(t) private(s)",
           "reduction(+: a)", "collapse(3)"]  # fmt: skip
    assert all(found.matches(text.encode()) for text in good)
    assert not any(found.matches(f"#pragma omp parallel for {text}".encode()) for text in bad)
    fortran = regular(pragma_grammar(["t"], language="fortran"))
    assert fortran.matches(b"!$omp parallel do lastprivate(t)")
    with pytest.raises(ValueError, match="give one of"):
        pragma_grammar([], language="basic")
