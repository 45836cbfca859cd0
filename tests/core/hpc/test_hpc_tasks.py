import math

import numpy as np
import pytest

from jaxfm.tasks.hpc import records
from jaxfm.tasks.hpc.graph import RELATIONS, edges
from jaxfm.tasks.hpc.lexer import normalized
from jaxfm.tasks.hpc.operations import operations
from jaxfm.tasks.hpc.proofs.enumeration import at_any_size

RACES = records.record("race-detection")
MADE = records.splits(RACES, 3, 60, 24)


def test_no_two_splits_share_an_item_or_a_family_that_is_said_to_be_unseen():
    forms = [normalized(row.source) for name in MADE for row in MADE[name]]
    assert len(set(forms)) == len(forms)
    families = {name: {row.family for row in rows} for name, rows in MADE.items()}
    assert families["unseen family"] and not families["unseen family"] & families["train"]
    assert families["in distribution"] <= families["train"]
    assert all(row.item.coefficients == "unseen" for row in MADE["unseen coefficients"])
    assert all("for (" not in row.source for row in MADE["other language"])


def test_labels_are_what_the_proof_says_and_races_have_lines():
    for row in MADE["in distribution"]:
        assert row.label == int(at_any_size(row.item.program).conflict is not None)
        assert bool(row.lines) == bool(row.label)
        assert all(0 < line <= row.source.count("\n") for line in row.lines)


def test_the_splits_of_a_seed_are_the_same_again():
    again = records.splits(RACES, 3, 60, 24, ("train",))
    assert [row.source for row in again["train"]] == [row.source for row in MADE["train"]]


def test_baselines_predict_every_row():
    test = MADE["in distribution"]
    for baseline in RACES.baselines.values():
        figures = RACES.metric([r.label for r in test], baseline(MADE["train"], test))
        assert 0 <= figures["accuracy"] <= 1


def test_programs_show_whole_functions_and_ask_for_the_racing_lines():
    task = records.record("program-race")
    rows = records.splits(task, 2, 34, 17, ("train",))["train"]
    assert all(row.source.startswith("void kernel(") for row in rows)
    assert {row.family for row in rows} >= {"region", "tasks"}
    assert not {row.family for row in rows} & set(records.UNSEEN_FAMILIES)
    right = [row.lines for row in rows]
    assert set(task.place(rows, right).values()) == {1.0}
    reversed_pair = task.place(rows, [(0, *lines) for lines in right])
    assert reversed_pair == {"pair_hit_at_1": 0.0, "line_hit_at_1": 0.0, "line_mrr": 0.5}
    guessed = task.place(rows, task.place_baselines["last writes"](rows, rows))
    assert 0 < guessed["pair_hit_at_1"] <= guessed["line_hit_at_1"] < 1
    assert task.place([row for row in rows if not row.label], []) != guessed


def test_figures_of_races_known_by_hand():
    found = records.race.figures([1, 1, 0, 0, 0], [0.9, 0.2, 0.1, 0.7, 0.5])
    assert found["accuracy"] == 0.6 and found["f1"] == 0.5
    assert found["specificity"] == found["safe_precision"] == pytest.approx(2 / 3)


def test_costs_are_counts_of_the_shown_sizes():
    task = records.record("cost")
    made = records.splits(task, 4, 42, 14, ("train", "in distribution", "other language"))
    for row in (*made["train"], *made["other language"]):
        program = row.item.program
        assert row.label == pytest.approx(math.log10(records.cost.total(operations(program))))
        for size in program.sizes:
            assert f"{size.name} = {size.value}" in row.source
    test = made["in distribution"]
    for name, baseline in task.baselines.items():
        found = task.metric([row.label for row in test], baseline(made["train"], test))
        assert np.isfinite(list(found.values())).all(), name
    best = task.metric([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert best == {"spearman": 1.0, "pair_accuracy": 1.0, "log10_error": 0.0, "factor": 1.0}
    bare = [row._replace(item=None) for row in test]
    with pytest.raises(ValueError, match="have no programs"):
        task.baselines["linear"](bare, bare)
    again = task.baselines["words and sizes"](bare, bare)
    assert np.array_equal(again, task.baselines["words and sizes"](test, test))
    flat = task.metric([1.0, 2.0, 3.0], [2.0, 2.0, 2.0])
    assert (flat["spearman"], flat["pair_accuracy"]) == (0.0, 0.5)


def test_pragmas_are_asked_of_loops_that_have_none():
    task = records.record("pragma")
    rows = records.splits(task, 1, 24, 12, ("train",))["train"]
    assert rows and {row.label.partition(" p")[0] for row in rows} == {"none", "#pragma omp"}
    assert all("#pragma omp parallel for" not in row.source for row in rows)
    assert task.metric(["a", "b(c)"], ["a", "b"]) == {"exact": 0.5, "exact_not_trivial": 0.0}


def test_a_task_without_a_baseline_or_with_a_taken_name_is_refused():
    with pytest.raises(ValueError, match="has no baseline"):
        records.register(RACES._replace(name="new", baselines={}))
    placed = RACES._replace(name="new", place=records.race.places)
    with pytest.raises(ValueError, match="has no baseline"):
        records.register(placed)
    with pytest.raises(ValueError, match="is a task 'pragma' already"):
        records.register(RACES._replace(name="pragma"))
    with pytest.raises(ValueError, match="race-detection"):
        records.record("race-detecton")


@pytest.mark.parametrize("head", ["for (int i = 0; i < n; i += 2)", "do i = 1, n, 2"])
def test_a_step_counts_in_distances(head):
    braces = ("(", ")") if head.startswith("do") else ("[", "]")
    text = f"{head}\n  a[i] = a[i - 3] + b[i];".replace("[", braces[0]).replace("]", braces[1])
    first, second = text.index("a" + braces[0]), text.rindex("a" + braces[0])
    found = [RELATIONS[e.relation] for e in edges(text) if (e.first, e.second) == (first, second)]
    assert found == ["independent"]
