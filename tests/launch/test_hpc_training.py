"""Training, scoring and asking encoders of code, on tiny models."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxfm.launch.hpc import commands, evaluate, opinions, train, training
from jaxfm.launch.hpc.findings import RACE, UNKNOWN, Finding
from jaxfm.tasks import hpc
from jaxfm.tasks.hpc import dataracebench, pipelines
from jaxfm.tasks.hpc import reader as readers
from jaxfm.tasks.hpc.reader import Reader, Reading
from jaxfm.tasks.hpc.records import record, splits
from jaxfm.tasks.hpc.tokenizers import LexerTokenizer

READING = Reading(LexerTokenizer(renames=True), 96, 64)
SHAPE = {"embed_dim": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 8}
LOOP = "#pragma omp parallel for\nfor (int i = 1; i < n; i++)\n  a[i] = a[i - 1];"
ROWS = splits(record("race-detection"), 1, 40, 12, ("train", "in distribution"))


@pytest.fixture(scope="module")
def reader():
    model = training.encoder("race-detection", READING, **SHAPE)
    variables = jax.jit(model.init)(jax.random.key(0))
    return Reader("race-detection", model, variables, READING, {"safe_below": 0.3, "items": 40})


def test_training_lowers_the_loss_and_the_folder_says_the_same(tmp_path):
    said: list[str] = []
    settings = training.Fit(steps=40, batch_size=8, learning_rate=1e-2, buckets=1, chunk=4)
    rows, test = ROWS["train"], ROWS["in distribution"]
    made = training.fit("race-detection", rows, test, READING, SHAPE, settings, said.append)
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in said]
    assert len(losses) == 10 and losses[-1] < losses[0]
    assert made.facts["rows"] == len(rows) and -1 <= made.facts["safe_below"] <= 1
    readers.save(made, tmp_path / "model")
    again = readers.load(tmp_path / "model")
    assert again.facts == made.facts and again.task == made.task
    np.testing.assert_array_equal(training.predict(made, test), training.predict(again, test))


def test_groups_hold_every_row_once_without_its_padding():
    arrays = training.arrays_of("program-race", ROWS["train"], READING)
    found = training.groups(arrays, 3, 4)
    assert len(found) == 3 and sum(len(g["label"]) for g in found) == len(ROWS["train"])
    for name in ("mask", "where"):
        assert sum(g[name].sum() for g in found) == arrays[name].sum()
    assert sum((g["edges"][..., 2] > 0).sum() for g in found) == (arrays["edges"][..., 2] > 0).sum()
    assert found[0]["tokens"].shape[1] < found[-1]["tokens"].shape[1]
    assert len(training.groups(arrays, 3, len(ROWS["train"]))) == 1


@pytest.mark.parametrize("task", ["tuning", "similarity"])
def test_costs_and_forms_are_learned(task):
    names = ("train", "in distribution")
    rows, test = (splits(record(task), 1, 60, 60, names)[name] for name in names)
    settings = training.Fit(steps=60, batch_size=16, learning_rate=1e-2, buckets=1, chunk=6)
    said: list[str] = []
    made = training.fit(task, rows, test, READING, SHAPE, settings, said.append)
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in said]
    assert losses[-1] < losses[0]
    predictions = training.predict(made, test)
    if task == "similarity":
        assert predictions.shape == (len(test), len(test))
        arrays = training.arrays_of(task, [*rows[:3], *rows[4:8]], READING)
        assert arrays["tokens"].shape[:2] == (1, 4)  # the first program lacks a form
        np.testing.assert_array_equal(arrays["group"][0][:3], arrays["group"][0][0])
        assert arrays["group"][0][3] != arrays["group"][0][0]
    else:
        assert set(predictions) <= set(range(len(rows[0].label)))
    found = evaluate.scores(made, {"train": rows, "in distribution": test}, names[1:])
    figures = found["in distribution"]
    assert set(figures) == {"rows", "model", *record(task).baselines}
    assert set(figures["model"]) == set(figures["chance"])


def test_the_threshold_of_race_free_is_the_highest_that_is_precise_enough():
    labels = np.array([0, 0, 0, 1, 0, 1])
    chances = np.array([0.1, 0.2, 0.3, 0.35, 0.4, 0.9])
    assert training.safe_below(labels, chances, 0.9) == (0.3, 1.0, 0.75)
    assert training.safe_below(labels, chances, 0.8)[0] == 0.4
    assert training.safe_below(np.ones(3, int), chances[:3], 0.9) == (-1.0, 0.0, 0.0)
    figures = training.safe_figures(labels, chances, 0.3)
    assert figures == {"safe_precision": 1.0, "safe_recall": 0.75}


def test_a_pipeline_answers_one_and_several_and_refuses_what_is_no_text(reader):
    races = hpc.pipeline("race-detection", reader)
    one = races(LOOP)
    several = races([LOOP, LOOP.replace("a[i - 1]", "b[i]"), LOOP])
    assert one == several[0] == several[2] and 0 <= one.probability <= 1
    assert races([]) == []
    assert races(LOOP + "\n  b[i] = 2;" * 90).verdict == "cannot tell"
    for wrong in ("", "  \n", 3):
        with pytest.raises(ValueError, match="Give the text of a loop"):
            races([wrong])
    with pytest.raises(ValueError, match="There is no pipeline 'race-detecton'"):
        hpc.pipeline("race-detecton")
    with pytest.raises(FileNotFoundError, match="no trained reader"):
        hpc.pipeline("race-detection", "nowhere")


def test_verdicts_follow_the_thresholds(reader):
    answer = pipelines.RacePipeline(reader)._answer
    assert [answer(LOOP, p).verdict for p in (0.2, 0.4, 0.6)] == [
        "race-free", "cannot tell", "race"
    ]  # fmt: skip


def test_a_model_is_asked_only_where_the_proof_cannot_tell(reader):
    text = "void f(int n)\n{\n  for (int i = 0; i < n; i++)\n    g(i);\n  return;\n}\n"
    races = pipelines.RacePipeline(reader)
    loop = Finding("a.c", "f", 3, 4, UNKNOWN, "A call.")
    other = [loop._replace(verdict=RACE), loop._replace(first_line=1, last_line=1)]
    found = opinions.with_probabilities([loop, *other], text.encode(), "c", races)
    expected = (
        1 - races("#pragma omp parallel for\n" + "\n".join(text.split("\n")[2:4])).probability
    )
    assert found[0] == loop._replace(probability=pytest.approx(expected, abs=1e-4))
    assert found[1:] == other
    assert opinions.with_probabilities([], b"\xff", "c", races) == []


def test_scores_stand_beside_the_baselines(reader):
    found = evaluate.scores(reader, ROWS, ("in distribution",))["in distribution"]
    assert set(found) == {"rows", "model", "majority", "1-5-grams"}
    assert {"accuracy", "safe_precision", "safe_recall"} <= set(found["model"])


def test_dataracebench_is_read_without_comments_and_names(tmp_path, reader):
    files = {
        "DRB001-chain-orig-yes.c": f"/* a[i]@3 */ int main() {{ // race\n{LOOP}\n}}\n",
        "DRB002-chain-var-no.c": "int main() {\n  return 0;\n}\n",
        "sub/DRB003-other-no.f95": "program p\n!$omp parallel do\ndo i = 1, 9 ! safe\n"
        "a(i) = 1\nend do\nend program\n",
        "notes.txt": "no program",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    first, second, third = dataracebench.read_folder(tmp_path)
    assert [p.label for p in (first, second, third)] == [1, 0, 0]
    assert first.group == second.group != third.group
    assert first.loops == (LOOP,) and not second.loops and "safe" not in third.loops[0]
    assert "race" not in first.source and "@" not in first.source
    figures = evaluate.benchmark_scores(reader, str(tmp_path))
    assert figures["programs"] == 3 and figures["support"] == pytest.approx(2 / 3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no program of DataRaceBench"):
        dataracebench.read_folder(tmp_path / "empty")


def test_wrong_settings_are_refused(tmp_path):
    module, words = commands.command(["train", "--task=pragmas"])
    assert module is train and words[1:] == ["--task=pragmas"]
    with pytest.raises(ValueError, match="train one of race-detection, program-race, cost, tuning"):
        train.TrainConfig(task="pragmas")
    with pytest.raises(ValueError, match="give 16 tokens or more, or 0"):
        train.TrainConfig(max_len=8)
    with pytest.raises(ValueError, match="learning_rate=nan"):
        train.TrainConfig(learning_rate=float("nan"))
    with pytest.raises(ValueError, match="train reads no files"):
        commands.command(["train", "a.c"])
    with pytest.raises(ValueError, match="Give a folder for the model"):
        train.main(train.TrainConfig())
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is not empty"):
        train.main(train.TrainConfig(out=str(tmp_path)))
    with pytest.raises(ValueError, match="evaluate reads no files"):
        commands.command(["evaluate", "--test=3", "--", "a.c"])


def test_what_is_not_given_is_the_task_s_own():
    full = train.TrainConfig(task="pragma", steps=7, model=train.Shape(num_layers=1)).complete()
    own = train.RECIPES["pragma"]
    assert (full.steps, full.max_len, full.data.items) == (7, own.max_len, own.items)
    assert dataclasses.astuple(full.model) == (own.shape[0], 1, *own.shape[2:])
    assert full.complete() == full


def test_a_folder_that_is_no_reader_is_refused(tmp_path, reader):
    readers.save(reader, tmp_path / "model")
    file = tmp_path / "model" / readers.FILE
    told = json.loads(file.read_text())
    file.write_text(json.dumps(told | {"max_len": 200}))
    with pytest.raises(ValueError, match="do not fit a model of 96 tokens"):
        readers.load(tmp_path / "model")
    file.write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        readers.load(tmp_path / "model")


def test_the_model_of_the_package_is_small_and_knows_plain_loops():
    folder = pipelines.SHIPPED / "race-detection"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8_000_000
    races = hpc.pipeline("race-detection")
    safe = LOOP.replace("a[i - 1]", "b[i]")
    shared = LOOP.replace("a[i] = a[i - 1]", "s += b[i]")
    reduced = shared.replace("for\n", "for reduction(+: s)\n", 1)
    chances = [answer.probability for answer in races([LOOP, safe, shared, reduced])]
    assert [chance > 0.5 for chance in chances] == [True, False, True, False]
