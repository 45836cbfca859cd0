"""Questions of T2: marked sources, answers in one form, grammars that hold them, proofs."""

import re

import numpy as np
import pytest

from jaxfm.parallel.grammars.automaton import regular
from jaxfm.tasks import completion
from jaxfm.tasks.hpc import records
from jaxfm.tasks.hpc.directives import PLACES, grammar_of, in_order, prompt, verified
from jaxfm.tasks.hpc.frontend.pragmas import parse_pragma
from jaxfm.tasks.hpc.graph import RELATIONS
from jaxfm.tasks.hpc.lexer import rename, restore
from jaxfm.tasks.hpc.records.pragma import not_trivial, question

TASK = records.record("pragma")
MADE = records.splits(TASK, 4, 28, 14, ("train", "other language", "renamed"))
ASKED = {name: [question(row) for row in rows] for name, rows in MADE.items()}


def test_labels_are_right_by_their_meaning_and_other_answers_are_not():
    for asked in ASKED.values():
        assert {v.verdict for v in verified([(q, q.answer) for q in asked])} == {"confirmed"}
    refused = [(q, "#pragma omp parallel for") for q in ASKED["train"] if not_trivial(q.answer)]
    refused += [(q, "none") for q in ASKED["train"] if q.answer != "none"]
    refused += [(q, "private(x)") for q in ASKED["train"][:2]]
    assert {v.verdict for v in verified(refused)} == {"refuted"}
    more = [(q, f"{q.answer} schedule(static, 2)") for q in ASKED["train"] if q.answer != "none"]
    assert {v.verdict for v in verified(more)} == {"confirmed"}


def test_each_source_has_one_place_before_the_loop_and_each_grammar_has_the_answer():
    for name, asked in ASKED.items():
        for q in asked:
            (line,) = [
                n for n, t in enumerate(q.source.splitlines()) if t.strip() == PLACES[q.language]
            ]
            assert re.match(r"\s*(for \(|do )", q.source.splitlines()[line + 1], re.IGNORECASE), (
                name
            )
        for q in asked[::5]:
            for each in (q, in_order(q)):
                found = regular(grammar_of(each))
                assert found.matches(each.answer.encode()) and found.matches(b"none")
                assert not found.matches(each.answer.encode() + b" private(nowhere)")


def test_a_prompt_has_the_names_of_its_source_and_notes_on_the_loop_that_is_asked_for():
    inner = "for(int i=0;i<9;i++){\n#pragma omp\nfor(int j=1;j<9;j++)\n a[i][j] = a[i][j-1];\n}\n"
    assert prompt(inner).splitlines()[-1] == "}"
    (line,) = prompt(inner, noted=True)[len(prompt(inner)) :].splitlines()
    assert line.split()[0] == "a"
    kinds = {RELATIONS[int(line.split()[1][n : n + 2])] for n in range(0, len(line) - 2, 2)}
    assert "distance 1" in kinds  # the outer loop's would be the same iteration
    assert prompt(inner.replace("#pragma omp\n", ""), noted=True).endswith("\na 07\n")
    for asked in ASKED.values():
        for q in asked:
            with_notes = prompt(q.source, noted=True)
            assert rename(with_notes).names == rename(q.source).names
            assert with_notes.startswith(prompt(q.source))
            assert PLACES[q.language] in with_notes.splitlines()


def test_answers_follow_names():
    for row in MADE["renamed"]:
        assert "zq" in row.source and ("(" not in row.label or "zq" in row.label)
    for q in ASKED["train"]:
        short, given = in_order(q), rename(q.source)
        assert short.source == given.text and restore(short.answer, given.names) == q.answer
        pragma = q.answer != "none" and parse_pragma(q.answer.removeprefix("#pragma"), "c")
        assert not pragma or pragma.directive == "parallel for"


def test_baselines_answer_in_the_names_of_the_loop():
    found = TASK.baselines["nearest"](MADE["train"], MADE["renamed"])
    for answer, row in zip(found, MADE["renamed"]):
        inside = re.findall(r"\bv\d+\b", answer)
        assert not inside and len(answer) > 3, row
    figures = TASK.metric([r.label for r in MADE["train"]], [r.label for r in MADE["train"]])
    assert figures == {"exact": 1.0, "exact_not_trivial": 1.0}


def test_completion_scores_the_tokens_of_answers_alone():
    """Against sums by hand; the prompt counts in the loss by its weight, in no metric."""
    rng = np.random.default_rng(0)
    tokens, begin, pad = np.array([[5, 1, 2, 3, 9], [5, 2, 4, 9, 0]]), np.array([3, 2]), 0
    logits = rng.normal(size=(2, 4, 10)).astype(np.float32)
    logits[1, 1, 4] = logits[1, 2, 9] = 9.0
    nats = (
        np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, tokens[:, 1:, None], 2)[..., 0]
    )
    answer = np.array([[0, 0, 1, 1], [0, 1, 1, 0]])
    prompt = np.array([[1, 1, 0, 0], [1, 0, 0, 0]])
    for share in (0.0, 0.25):
        task = completion(pad, share)
        inputs, targets, weight = task.prepare({"tokens": tokens, "begin": begin})
        assert (inputs == tokens[:, :-1]).all()
        total, count = task.loss(logits, targets, weight)
        mass = answer + share * prompt
        np.testing.assert_allclose([total, count], [(nats * mass).sum(), mass.sum()], rtol=1e-6)
        found = task.metrics(logits, targets, weight)
        np.testing.assert_allclose(found["loss"], [(nats * answer).sum(), 4], rtol=1e-6)
        exact = np.array([(logits[0].argmax(-1) == tokens[0, 1:])[2:].all(), True]).sum()
        np.testing.assert_allclose(found["exact_match"], [exact, 2])
    with pytest.raises(ValueError, match="0 or more"):
        completion(prompt_weight=-1.0)
