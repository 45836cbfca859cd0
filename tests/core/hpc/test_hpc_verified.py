"""An answer that is called verified stands before every verifier that is present."""

import re

import pytest

from jaxfm.tasks.hpc.generator import asked, generate
from jaxfm.tasks.hpc.program import Array, Assign, For, Judgement, Number, Op, Program, Ref, Scalar
from jaxfm.tasks.hpc.program import Var as V
from jaxfm.tasks.hpc.render import pragma_source
from jaxfm.tasks.hpc.verifiers.verified import combined, pragma_verified, pragmas_verified
from jaxfm.tasks.hpc.verifiers.verifier import VERIFIERS, present

PROOFS = [tool for tool in present() if not tool.executes]


def loop(*body):
    """A serial loop with a temporary t and a sum s that counts at the end."""
    arrays = tuple(Array(name, (Op("+", (V("n"), Number(1))),)) for name in "ab")
    scalars = (Scalar("s", "double"), Scalar("t", "double", 0, live=False))
    return Program((Scalar("n", "int", 20),), arrays, scalars, (For("i", Number(0), V("n"), body),))


HERE, NEXT = (Ref("a", (x,)) for x in (V("i"), Op("+", (V("i"), Number(1)))))
FREE = loop(Assign(HERE, Ref("b", (V("i"),))))
SUM = loop(Assign(V("t"), HERE), Assign(V("s"), V("t"), "+"))
CHAIN = loop(Assign(NEXT, HERE))


@pytest.mark.parametrize(
    ("program", "text", "verdict", "reason"),
    [
        (FREE, "#pragma omp parallel for", "confirmed", "for any sizes|for these sizes"),
        (FREE, "none", "refuted", "A directive makes"),
        (FREE, "#pragma omp parallel for private(a)", "cannot tell", "a is private"),
        (FREE, "#pragma omp parallel for private(zz)", "refuted", "zz, which is not declared"),
        (FREE, "#pragma omp parallel for private(t, t)", "refuted", "name t twice"),
        (FREE, "#pragma omp parallel for private(t) shared(t)", "refuted", "name t twice"),
        (FREE, "#pragma omp parallel for private(t", "refuted", "cannot be read"),
        (FREE, "#pragma omp parallel", "refuted", "no directive that makes a loop parallel"),
        (FREE, "a = b;", "refuted", "no directive of one line"),
        (FREE, "#pragma omp parallel for\nb", "refuted", "no directive of one line"),
        (SUM, "#pragma omp parallel for private(t) reduction(+: s)", "confirmed", ""),
        (SUM, "#pragma omp parallel for reduction(+: s)", "refuted", "t"),
        (SUM, "#pragma omp parallel for private(t, s)", "refuted", "s"),
        (SUM, "#pragma omp parallel for private(t) reduction(*: s)", "refuted", r"\*"),
        (CHAIN, "#pragma omp parallel for", "refuted", "a"),
        (CHAIN, "none", "confirmed", "No choice of clauses"),
    ],
)
def test_directives_as_models_write_them(program, text, verdict, reason):
    found = pragma_verified(program, text, verifiers=PROOFS)
    assert found.verdict == verdict, found
    assert re.search(reason, found.reason), found


def test_what_is_called_verified_passes_every_verifier_present():
    items = [item for item in generate(21, 40) if item.target is not None and item.pragma]
    answers = [(asked(item), item.pragma, item.target) for item in items]
    tools = present()
    for item, found in zip(items, pragmas_verified(answers, verifiers=tools)):
        assert found.verdict == "confirmed", (item.family, found)
        assert set(found.judgements) == {tool.name for tool in tools}
        assert "refuted" not in {judgement.verdict for judgement in found.judgements.values()}


def test_directives_of_fortran_and_sections_of_arrays_are_read():
    for item in generate(5, 14, ["histogram", "reduction"]):
        if item.pragma is None:
            continue
        for language in item.languages:
            text = pragma_source(item.pragma, item.program, language)
            found = pragma_verified(
                asked(item), text, item.target, verifiers=PROOFS, language=language
            )
            assert found.verdict == "confirmed", (text, found)


def test_one_refutation_suffices_and_silence_confirms_nothing():
    yes, no = Judgement("confirmed", "Yes.", "x"), Judgement("refuted", "No.", "x")
    doubt = Judgement("cannot tell", "Who knows.", "x")
    tools = VERIFIERS
    assert combined({"clauses": yes, "enumeration": no}, tools).verdict == "refuted"
    assert combined({"clauses": yes, "enumeration": doubt}, tools).verdict == "confirmed"
    alone = combined({"enumeration": yes}, tools)
    assert (alone.verdict, alone.reach) == ("cannot tell", "")
    silent = combined({"enumeration": yes, "same output": yes}, tools)
    assert (silent.verdict, silent.reach) == ("confirmed", "these sizes")
    assert combined({"clauses": doubt, "enumeration": yes}, tools).reason == "Who knows."
    assert combined({"clauses": yes, "integer sets": yes}, tools).reach == "all sizes"


def test_a_path_without_a_loop_is_an_error():
    with pytest.raises(ValueError, match=r"The statement at \(0, 0\) is no loop"):
        pragma_verified(FREE, "none", (0, 0))
