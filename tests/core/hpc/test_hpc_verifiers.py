"""Tools agree with labels where they can tell."""

import pytest

from jaxfm.tasks.hpc.generator import generate
from jaxfm.tasks.hpc.program import (
    Array,
    Assign,
    Block,
    For,
    Number,
    Pragma,
    Program,
    Ref,
    Scalar,
    Standalone,
    Var,
)
from jaxfm.tasks.hpc.verifiers import harness, thread_sanitizer

needs_gcc = pytest.mark.skipif(
    thread_sanitizer.available() is not None, reason=str(thread_sanitizer.available())
)


@needs_gcc
def test_thread_sanitizer_agrees_with_labels():
    items = generate(11, 34)
    found = thread_sanitizer.verify([item.program for item in items])
    assert "cannot tell" not in {judgement.verdict for judgement in found}
    alarms = {index for index, judgement in enumerate(found) if judgement.verdict == "refuted"}
    racy = {index for index, item in enumerate(items) if item.racy}
    assert alarms == racy


def around(*body):
    """A program of one size, n, and two arrays."""
    arrays = (Array("a", (Var("n"),), "float"), Array("b", (Var("n"),), "float"))
    return Program((Scalar("n", "int", 21),), arrays, (), body)


@needs_gcc
def test_the_end_of_a_region_waits_for_its_tasks():
    task = Block(Pragma("task"), (Assign(Ref("a", (Var("i"),)), Ref("b", (Var("i"),))),))
    single = Block(Pragma("single"), (For("i", Number(0), Var("n"), (task,)),))
    found = thread_sanitizer.verify([around(Block(Pragma("parallel"), (single,)))])
    assert found[0].verdict == "confirmed"


@needs_gcc
def test_a_plain_read_beside_an_atomic_update_of_a_float_is_a_race():
    first = Ref("a", (Number(0),))
    update = Block(Pragma("atomic"), (Assign(first, Ref("b", (Var("i"),)), "+"),))
    read = Assign(Ref("b", (Var("i"),)), first)
    racy, right = ((read, update), (update,))
    loops = [For("i", Number(0), Var("n"), x, 1, Pragma("parallel for")) for x in (racy, right)]
    found = thread_sanitizer.verify([around(loop) for loop in loops])
    assert [judgement.verdict for judgement in found] == ["refuted", "confirmed"]


@needs_gcc
def test_what_the_shim_does_not_know_is_not_judged():
    program = generate(11, 1)[0].program
    odd = Block(Pragma("target"), program.body)
    verdicts = thread_sanitizer.verify([program._replace(body=(odd,))], threads=(3,))
    assert verdicts[0].verdict == "cannot tell" and "target" in verdicts[0].reason


def test_iterations_are_scattered_unless_the_schedule_is_static():
    for item in generate(4, 17):
        changed = harness.dealt(item.program)
        assert changed == harness.dealt(changed)
        assert len(changed.body) == len(item.program.body)
    alone = Standalone(Pragma("barrier"))
    program = generate(4, 1)[0].program._replace(body=(alone,))
    assert harness.dealt(program) == program
