"""Judgements for all sizes agree with enumerations for some, wherever both speak."""

import collections

import pytest

pytest.importorskip("islpy", reason="needs jaxfm[hpc]")

from jaxfm.tasks.hpc.families import LOOPS
from jaxfm.tasks.hpc.generator import generate
from jaxfm.tasks.hpc.program import Pragma, Standalone
from jaxfm.tasks.hpc.proofs.enumeration import judge
from jaxfm.tasks.hpc.proofs.integer_sets import for_all_sizes
from jaxfm.tasks.hpc.render import loop_source


def at(program, value):
    """The program with all sizes set to a value."""
    return program._replace(sizes=tuple(s._replace(value=value) for s in program.sizes))


def test_integer_sets_agree_with_enumerations_of_several_sizes():
    told = collections.Counter()
    for item in generate(8, 14 * 12, LOOPS):
        verdict = for_all_sizes(item.program).verdict
        seen = {judge(at(item.program, n)).verdict for n in (1, 2, 5, 9, 14, 24)}
        told[verdict] += 1
        text = loop_source(item.program).text
        if verdict == "confirmed":
            assert "refuted" not in seen and not item.racy, text
        elif verdict == "refuted":  # a conflict is nearer than 24 iterations in what is generated
            assert "refuted" in seen | {judge(item.program).verdict}, text
    assert told["confirmed"] > 30 and told["refuted"] > 30, told


def test_other_directives_cannot_be_told():
    program = generate(0, 1, ["line"])[0].program
    program = program._replace(body=(*program.body, Standalone(Pragma("barrier"))))
    found = for_all_sizes(program)
    assert found.verdict in ("cannot tell", "refuted")
    barrier = program._replace(body=(Standalone(Pragma("barrier")),))
    assert for_all_sizes(barrier).verdict == "cannot tell"
