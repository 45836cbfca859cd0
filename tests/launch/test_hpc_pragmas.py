"""A decoder of directives: trained and kept by `train`, and its guesses about loops of files."""

import json

import numpy as np
import pytest

from jaxfm.launch.hpc import evaluate, formats, opinions, pragmas, train
from jaxfm.launch.hpc.completions import Completer
from jaxfm.launch.hpc.findings import RACE, UNKNOWN, Finding
from jaxfm.tasks.hpc import reader as readers
from jaxfm.tasks.hpc.graph import assigned
from jaxfm.tasks.hpc.pipelines import RacePipeline
from jaxfm.tasks.hpc.tokenizers import LexerTokenizer
from jaxfm.testing import random_variables, tiny_decoder

TOKENIZER = LexerTokenizer()
LOOP = "for (int i = 0; i < n; i++) {\n  t = g(i);\n  double u = t;\n  s += u;\n  a[i] = u;\n}"


@pytest.fixture(scope="module")
def writer():
    model = tiny_decoder(vocab_size=TOKENIZER.vocab_size, num_layers=1, max_len=512)
    return Completer(model, random_variables(model), TOKENIZER, True, {"max_len": 160})


@pytest.mark.parametrize(
    ("loop", "names"),
    [
        (LOOP, ["t", "s"]),
        ("for(i=0;i<n;i++) for(j=0;j<n;j++) c[i][j]+=x;", ["j"]),
        ("for(i=0;i<n;i++) {int z, m = 3; m++; z = m; k = z;}", ["k"]),
        ("for(i=0;i<n;i++) {real *p = &a[i], q = 3; const real *r = p; *p = q; o = *r * (w = 2);}",
         ["o", "w"]),
        ("for(i=0;i<n;i++) {p->x = 3; c.y = 2; c.z[i] = 1; if (a) b = 3; else d = 4;}", ["b", "d"]),
        ("while(1) x=3;", ["x"]),
        ("", []),
    ],
)  # fmt: skip
def test_only_scalars_that_a_loop_assigns_and_does_not_declare_are_named(loop, names):
    assert assigned(loop) == names


def test_training_writes_a_folder_that_says_the_same(tmp_path):
    shape = train.Shape(embed_dim=8, num_layers=1, num_heads=2, mlp_dim=8)
    data = train.DataSettings(items=60, validation=8)
    out = tmp_path / "pragmas"
    config = train.TrainConfig(
        out=str(out), task="pragma", steps=10, batch_size=4, max_len=120, data=data, model=shape
    )
    train.main(config)
    made = pragmas.load(out)
    assert made.noted and made.facts["steps"] == 10 and made.facts["items"] == 60
    assert set(made.facts["validation"]) >= {"loss", "exact_match"}
    again = tmp_path / "again"
    pragmas.save(made, again)
    loops = [LOOP, LOOP.replace("g(i)", "b[i]")]
    assert pragmas.guesses(made, loops) == pragmas.guesses(pragmas.load(again), loops)
    said: list[str] = []
    evaluate.main(evaluate.EvaluateConfig(model=str(out), test=4), said.append)
    assert sum("programs)" in line for line in said) == len(evaluate.TESTS)
    assert any("model: verified_at_1" in line for line in said)
    with pytest.raises(ValueError, match="this model writes directives"):
        evaluate.main(evaluate.EvaluateConfig(model=str(out), dataracebench_dir="."))
    with pytest.raises(FileNotFoundError, match="holds no decoder of directives"):
        pragmas.load(tmp_path)
    for wrong, said in (
        ({"task": "pragma"}, "cannot be read"),
        ({"task": "cost", "noted": 1, "facts": {"max_len": 9}}, "answers 'cost'"),
    ):
        (again / pragmas.FILE).write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=said):
            pragmas.load(again)


def test_guesses_name_what_the_loop_has_whatever_the_decoder_knows(writer):
    loops = [LOOP, "for (int i = 0; i < n; i++) h(i);", LOOP + "\n x = 1;" * 90]
    first, second, third = pragmas.guesses(writer, loops)
    for said, names in ((first, {"t", "s"}), (second, set())):
        assert said == "none" or said.startswith("#pragma omp parallel for")
        inside = (part.split(")")[0].split(": ")[-1] for part in said.split("(")[1:])
        named = {n for part in inside for n in part.split(", ") if not n.isdigit()}
        assert named - {"static", "dynamic", "guided"} <= names
    assert third is None and pragmas.guesses(writer, []) == []


def test_a_long_loop_is_left_out_before_its_accesses_are_paired(writer, monkeypatch):
    def fail(text):
        raise AssertionError("notes of a long loop")

    monkeypatch.setattr("jaxfm.tasks.hpc.directives.notes", fail)
    long = "for (int i = 0; i < n; i++) {\n" + "  a[i] = a[i] + 1;\n" * 2000 + "}"
    assert pragmas.guesses(writer, [long]) == [None]


def test_a_guess_stands_where_nothing_is_told_and_changes_no_verdict(writer):
    data = f"void f()\n{{\n{LOOP}\n}}\n".encode()
    told = Finding("a.c", "f", 3, 8, UNKNOWN, "A call.")
    others = [told._replace(verdict=RACE), told._replace(directive_line=2)]
    found = opinions.with_opinions([told, *others], data, "c", opinions.Models(writer=writer))
    assert found[1:] == others and found[0]._replace(guess="") == told
    assert found[0].guess == pragmas.guesses(writer, [LOOP])[0]
    assert opinions.with_opinions([told], data, "fortran", opinions.Models(writer=writer)) == [told]
    assert not formats.text([told]).count("guess")
    shown = formats.text([told._replace(guess="#pragma omp parallel for", probability=0.5)])
    assert "no proof: #pragma omp parallel for, race-free by 0.50" in shown
    shown = formats.text([told._replace(guess="#pragma omp parallel for", probability=0.2)])
    assert (
        "leave it serial, for with #pragma omp parallel for it would be race-free by 0.2" in shown
    )
    assert "no proof: leave it serial" in formats.text([told._replace(guess="none")])


def test_models_are_opened_by_what_their_folders_hold(tmp_path, writer):
    pragmas.save(writer, tmp_path / "writer")
    found = opinions.open_models([str(tmp_path / "writer")])
    assert found.races is None and isinstance(found.writer, Completer)
    with pytest.raises(ValueError, match="give one model for each task"):
        opinions.open_models([str(tmp_path / "writer")] * 2)
    with pytest.raises(FileNotFoundError, match="holds no trained reader"):
        opinions.open_models([str(tmp_path)])
    assert opinions.open_models([]) == opinions.Models()


def test_the_models_of_the_package_know_plain_loops():
    models = opinions.open_models([opinions.PACKAGE])
    assert isinstance(models.races, RacePipeline) and models.writer is not None
    assert isinstance(models.races.reader, readers.Reader)
    body = "{\n  t = b[i] * 2;\n  c[i] = t + t;\n}"
    private = f"for (int i = 0; i < n; i++) {body}"
    summed = "for (int i = 0; i < n; i++) s += b[i];"
    carried = "for (int i = 1; i < n; i++) a[i] = a[i - 1] + b[i];"
    said = pragmas.guesses(models.writer, [private, summed, carried])
    assert said == [
        "#pragma omp parallel for private(t)", "#pragma omp parallel for reduction(+: s)", "none"
    ]  # fmt: skip
    size = sum(leaf.nbytes for leaf in _leaves(models.writer.variables))
    assert size < 8e6


def _leaves(tree):
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
