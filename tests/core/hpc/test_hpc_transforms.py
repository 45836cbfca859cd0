"""The interpreter against compiled C, legal transformations against it, and the task of alikes."""

import numpy as np
import pytest

from jaxfm.tasks.hpc import records
from jaxfm.tasks.hpc.generator import asked, generate
from jaxfm.tasks.hpc.interpreter import accesses, results
from jaxfm.tasks.hpc.program import Array, Assign, For, Number, Op, Program, Ref, Scalar, Var
from jaxfm.tasks.hpc.transforms import free, interchanged, tiled_nest, variants
from jaxfm.tasks.hpc.verifiers import same_output
from jaxfm.tasks.hpc.verifiers.harness import Kernel

I, J, N = Var("i"), Var("j"), Var("n")


def over(var, *body):
    return For(var, Number(0), N, body)


def program(*body, n=5):
    arrays = (Array("a", (N, N)), Array("b", (N, N)), Array("k", (N,), "int", "permutation"))
    scalars = (Scalar("s", "double"), Scalar("t", "int", 7, live=False))
    return Program((Scalar("n", "int", n),), arrays, scalars, body)


@pytest.mark.skipif(same_output.available() is not None, reason=str(same_output.available()))
def test_the_interpreter_leaves_what_compiled_c_leaves():
    programs = [item.program for item in generate(51, 51)]
    left = same_output._left([Kernel(p) for p in programs], same_output.FLAGS, [{}], LIMITS)[0]
    for wanted, one in zip(left, programs):
        found = results(one)
        assert found.keys() == wanted.keys()
        for name, values in wanted.items():
            assert np.allclose(found[name], values, rtol=1e-4, atol=1e-4, equal_nan=True)


LIMITS = same_output.Limits(seconds=60)


def test_results_known_by_hand():
    half = Assign(Var("t"), Op("/", (Var("t"), Number(2))))
    add = Assign(Var("s"), Op("+", (Var("t"), Number(0.5))), "+")
    found = results(program(over("i", half, add)))
    assert found["s"] == 3 + 1 + 0 + 0 + 0 + 5 * 0.5
    back = Assign(Var("s"), Op("%", (Op("-", (Number(7),)), Number(4))))
    assert results(program(back))["s"] == -3
    with pytest.raises(ValueError, match="an element is outside"):
        accesses(program(over("i", Assign(Ref("k", (Op("+", (I, N)),)), Number(1)))))
    with pytest.raises(ValueError, match="an element is outside"):
        results(program(over("i", Assign(Ref("k", (Op("-", (I, N)),)), Number(1)))))
    with pytest.raises(ValueError, match="divided by zero"):
        results(program(Assign(Var("t"), Op("/", (Var("t"), Op("-", (N, N)))))))


def test_places_are_told_in_their_order():
    copy = Assign(Ref("a", (J, I)), Ref("b", (I, J)))
    places = accesses(program(over("i", over("j", copy)), n=3))
    first_of_b = 16  # 9 elements, rounded up to a multiple of 8
    expected = [(first_of_b + 3 * i + j, 3 * j + i) for i in range(3) for j in range(3)]
    assert places.tolist() == [place for pair in expected for place in pair]


def test_legal_transformations_change_no_result():
    kinds = set()
    for item in generate(52, 140):
        if item.target is None or not free(asked(item), item.target):
            continue
        wanted = results(asked(item))
        for kind, form in variants(asked(item), item.target):
            found = results(form)
            kinds.add(kind)
            assert all(same_output.equal(wanted[name], found[name]) for name in wanted), kind
    assert kinds == {"reversed", "tiled", "unrolled", "interchanged", "split"}


def test_loops_that_need_their_order_have_no_variants_and_nests_keep_their_points():
    before = Op("-", (I, Number(1)))
    chain = For("i", Number(1), N, (Assign(Ref("k", (I,)), Ref("k", (before,))),))
    assert not free(program(chain), (0,))
    nest = over("i", over("j", Assign(Ref("a", (I, J)), Ref("b", (I, J)))))
    plain = sorted(accesses(program(nest, n=7)))
    for form in (interchanged(nest), tiled_nest(nest, 3, ("x", "y"))):
        assert sorted(accesses(program(form, n=7))) == plain


def test_forms_are_alike_in_results_and_near_misses_are_not():
    task = records.record("similarity")
    rows = records.splits(task, 6, 40, 14, ("train",))["train"]
    labels = [row.label for row in rows]
    assert max(labels.count(label) for label in labels if label > 0) == 3
    assert all(labels.count(label) == 1 for label in labels if label < 0)
    for baseline in task.baselines.values():
        found = task.metric(labels, baseline(rows, rows))
        assert all(0 <= value <= 1 for value in found.values())


def test_figures_of_similarities_known_by_hand():
    labels = [5, 5, 5, -5, 9]
    same = np.equal.outer(labels, labels).astype(float)
    assert records.similarity.figures(labels, same) == {"map_at_r": 1, "auc": 1, "near_miss": 1}
    wrong = records.similarity.figures(labels, -same)
    assert wrong == {"map_at_r": 0, "auc": 0, "near_miss": 0}
    near = same.copy()
    near[0, 3] = 2.0
    found = records.similarity.figures(labels, near)
    assert found["map_at_r"] == pytest.approx((0.25 + 1 + 1) / 3)
    assert found["near_miss"] == pytest.approx(4 / 6)
