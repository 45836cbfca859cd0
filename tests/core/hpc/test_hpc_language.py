"""T7's baselines against plain dictionaries; T8's labels, and directives put into a function."""

import collections
import math
import random

import numpy as np

from jaxfm.tasks.hpc import records
from jaxfm.tasks.hpc.directives import parsed
from jaxfm.tasks.hpc.records.contract import Example
from jaxfm.tasks.hpc.records.language import ngrams
from jaxfm.tasks.hpc.records.translation import questions, translated

LANGUAGE, TRANSLATION = records.record("language"), records.record("translation")


def example(text):
    return Example(text, len(text.encode()), (), "", None)


def by_dictionaries(known: bytes, text: bytes, order: int) -> float:
    found: list = [collections.defaultdict(collections.Counter) for _ in range(order + 1)]
    for k in range(order + 1):
        padded = b"\0" * k + known
        for i in range(len(known)):
            found[k][padded[i : i + k]][padded[i + k]] += 1
    bits = 0.0
    for i in range(len(text)):
        p = 1 / 256
        for k in range(order + 1):
            after = found[k].get((b"\0" * k + text)[i : i + k])
            if after:
                p = (after[text[i]] + len(after) * p) / (sum(after.values()) + len(after))
        bits -= math.log2(p)
    return bits


def test_the_ngram_model_is_the_one_of_dictionaries():
    rng = random.Random(0)
    word = lambda n: "".join(rng.choice("ab é") for _ in range(n))
    train, test = [example(word(60)) for _ in range(5)], [example(word(30)) for _ in range(3)]
    test.append(example("xyz"))
    known = "".join(row.source for row in train).encode()
    for order in (0, 2, 7):
        expected = [by_dictionaries(known, row.source.encode(), order) for row in test]
        np.testing.assert_allclose(ngrams(train, test, order), expected, rtol=1e-9)


def test_baselines_of_the_language_task_are_ordered():
    made = records.splits(LANGUAGE, 0, 80, 20, ("train", "in distribution"))
    train, test = made["train"], made["in distribution"]
    bits = {
        name: LANGUAGE.metric([row.label for row in test], baseline(train, test))["bits_per_byte"]
        for name, baseline in LANGUAGE.baselines.items()
    }
    assert 0 < bits["n-grams"] < bits["xz"] < bits["uniform"] == 8.0


def test_the_label_of_a_translation_is_the_serial_function_with_its_directives():
    made = records.splits(TRANSLATION, 2, 28, 14, ("train", "other language"))
    for name, language in (("train", "c"), ("other language", "fortran")):
        assert made[name]
        for row in made[name]:
            directive = lambda line: line.strip().lower().startswith(("#pragma", "!$omp"))
            lines = str(row.label).splitlines()
            assert [x for x in lines if not directive(x)] == row.source.splitlines()
            assert any(map(directive, lines)) and not any(map(directive, row.source.splitlines()))
            answers = [(q.path, q.answer) for q in questions(row.item.program, language)]
            whole = translated(row.item.program, answers, language)
            assert sum(map(directive, whole.splitlines())) == sum(map(directive, lines))
    copy = TRANSLATION.baselines["copy"](made["train"], made["train"])
    assert TRANSLATION.metric([row.label for row in made["train"]], copy)["exact"] == 0.0
    assert parsed("#pragma omp parallel for reduction(+: h[0:n])", "c").named("reduction") == ("h",)
