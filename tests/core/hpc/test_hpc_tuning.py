"""Costs of configurations: the cache and the schedules against plain simulations, and the task."""

import numpy as np
import pytest

from jaxfm.tasks.hpc import records, tuning
from jaxfm.tasks.hpc.program import Array, Assign, For, Number, Program, Ref, Scalar, Var
from jaxfm.tasks.hpc.tuning import GRID, Configuration, costs, fits, misses
from jaxfm.tasks.hpc.verifiers import cachegrind

I, J, N = Var("i"), Var("j"), Var("n")


def nest(first, second, n=40):  # no power of two, whose rows would meet in one place
    copy = Assign(Ref("a", (first, second)), Ref("b", (first, second)))
    loop = For("i", Number(0), N, (For("j", Number(0), N, (copy,)),))
    return Program((Scalar("n", "int", n),), (Array("a", (N, N)), Array("b", (N, N))), (), (loop,))


def cheapest(program):
    found = costs(program, (0,))
    return GRID[int(np.argmin(found))]


def test_misses_are_those_of_a_plain_simulation():
    rng = np.random.default_rng(0)
    for high in (100, 400, 5000):
        places = rng.integers(high, size=600)
        held, count = {}, 0
        for place in places.tolist():
            line = place // 8
            count += held.get(line % tuning.SETS) != line
            held[line % tuning.SETS] = line
        assert misses(places) == count
    assert misses(np.arange(80)) == 10 and misses(np.zeros(0, np.int64)) == 0


def test_columns_are_better_walked_as_rows():
    assert cheapest(nest(I, J)).form == "given"
    assert cheapest(nest(J, I)).form in ("interchanged", "tiled")


def test_every_iteration_is_run_once_by_some_thread():
    for how in GRID:
        for count in (0, 1, 5, 32):
            threads = tuning._dealt([1] * count, how)
            run = sorted(k for thread in threads for chunk in thread for k in chunk)
            assert run == list(range(count))
    even = tuning._dealt([1] * 10, Configuration("given", 1, "static", 0))
    assert [len(chunk) for thread in even for chunk in thread] == [3, 3, 3, 1]
    first = tuning._dealt([1000, *[1] * 15], Configuration("given", 1, "dynamic", 4))
    assert [len(thread) for thread in first] == [1, 1, 1, 1]
    heavy = tuning._dealt([1000, *[1] * 27], Configuration("given", 1, "dynamic", 4))
    assert len(heavy[0]) == 1 and sum(map(len, heavy)) == 7


def test_triangles_are_better_dealt_out():
    row = Assign(Ref("a", (I, J)), Ref("b", (I, J)))
    loop = For("i", Number(0), N, (For("j", Number(0), I, (row,)),))
    program = nest(I, J)._replace(body=(loop,))
    by = dict(zip(GRID, costs(program, (0,))))
    assert by["given", 1, "static", 1] < by["given", 1, "static", 0]
    assert by["given", 1, "static", 0] == by["tiled", 1, "static", 0]  # which does not apply


def test_what_the_model_does_not_know_is_not_asked():
    program = nest(I, J)
    inner = program.body[0].body[0]
    assert fits(program, (0,)) and not fits(program, (0, 0))
    twice = program.body[0]._replace(body=(inner, inner))
    assert not fits(program._replace(body=(twice,)), (0,))
    assert not fits(program._replace(body=(program.body[0]._replace(step=2),)), (0,))


def test_tasks_have_a_best_choice_and_baselines():
    task = records.record("tuning")
    made = records.splits(task, 3, 40, 30, ("train", "in distribution", "other language"))
    assert all(len(row.label) == len(GRID) for row in made["train"])
    assert all(min(row.label) > 0 for row in made["train"])
    test = made["in distribution"]
    labels = [row.label for row in test]
    best = task.metric(labels, [int(np.argmin(label)) for label in labels])
    assert best == {"regret": 0.0, "best": 1.0, "within_5_percent": 1.0}
    for baseline in task.baselines.values():
        assert task.metric(labels, baseline(made["train"], test))["regret"] >= 0
    assert task.metric([(2.0, 1.0), (1.0, 3.0)], [0, 0])["regret"] == 0.5


@pytest.mark.skipif(cachegrind.available() is not None, reason=str(cachegrind.available()))
def test_misses_order_forms_as_cachegrind_does():
    """The same cache, one thread: rows, tiles, columns."""
    cache = {**cachegrind.CACHES, "D1": f"{64 * tuning.SETS},1,64"}
    given = nest(J, I, 40)
    forms = [tuning.formed(given, (0,), form) for form in ("interchanged", "tiled", "given")]
    real = [found.first_misses for found in cachegrind.counts(forms, cache)]
    model = [misses(np.concatenate(tuning._reached(form, (0,)))) for form in forms]
    assert np.argsort(real).tolist() == np.argsort(model).tolist() == [0, 1, 2]
