"""The search for a prompt, end to end on a few rows of a file."""

import json

import numpy as np
import pytest

from jaxfm import hub
from jaxfm.data.keywords import keyword_rows
from jaxfm.data.standard_library import stdlib_documents
from jaxfm.launch import prompts
from jaxfm.launch.setup import DataConfig
from jaxfm.testing import random_variables, tiny_decoder
from jaxfm.tokenizer import ByteTokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    model = tiny_decoder(vocab_size=260, num_layers=1, max_len=128)
    hub.save(model, random_variables(model), folder / "model", ByteTokenizer())
    rows = [f"it was day {i},{('bad', 'good')[i % 2]}" for i in range(60)]
    (folder / "days.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    (folder / "templates.txt").write_text("{text} {label}\n{text}\\n{label}\n")
    return folder


def config(folder, name, **more):
    data = DataConfig(source=str(folder / "days.csv"), num_clients=3)
    settings = {
        "model": str(folder / "model"), "templates": str(folder / "templates.txt"), "data": data,
        "candidates": 4, "asked": 2, "shots": 1, "public": 4, "rounds": 2, "cohort_size": 2,
        "rows": 2, "test_examples": 4, "noise_multiplier": 4.0,
    }  # fmt: skip
    return prompts.PromptsConfig(run_dir=str(folder / name), **(settings | more))


def test_a_search_over_a_file_reports_its_ranking(folder, capsys):
    prompts.main(config(folder, "run"))
    said = capsys.readouterr().out
    assert "epsilon: 1.76 at delta=1e-05" in said
    part = json.loads((folder / "run" / "results.json").read_text())["prompts"]
    assert {row["template"] for row in part["ranking"]} <= {"{text} {label}", "{text}\n{label}"}
    assert part["bytes_up"] == 4 * 2 * 2 * 2
    assert "The ranking" in (folder / "run" / "report.html").read_text()
    prompts.main(config(folder, "run"))  # it is done: nothing is searched again
    assert "Continuing after round 2" in capsys.readouterr().out
    again = json.loads((folder / "run" / "results.json").read_text())["prompts"]
    assert again == part


def test_exemplars_belong_to_no_client_and_to_no_test(folder):
    setting = config(folder, "unused")
    data = prompts.load_data(setting.data, 0, prompts.ModelConfig(family=setting.model))
    problem = prompts.text_problem(setting, data)
    private = {text for client in problem.clients for text in client.texts}
    public, test = set(problem.pool.exemplars.texts), set(problem.test.texts)
    assert private and public and test
    assert private.isdisjoint(public | test) and public.isdisjoint(test)


def test_keywords_are_what_follows_in_the_file():
    documents = stdlib_documents(tiny=True)
    rows = keyword_rows(documents, length=40)
    whole = "\0".join(document.text for document in documents)
    words = ("return", "if", "for", "def")
    assert len({row.label for row in rows}) == 4
    for row in rows[:50]:
        assert len(row.text) == 40 and f"{row.text}{words[row.label]} " in whole
    assert rows == keyword_rows(documents[::-1], length=40)
    assert np.mean([row.text.endswith((" ", "\n")) for row in rows]) == 1


def test_what_cannot_be_searched_is_refused(folder):
    for match, more in {
        "asked=9: there are only candidates=4": {"asked": 9},
        "requires --model": {"model": ""},
        "clip=0": {"clip": 0.0},
        "delta=2": {"delta": 2.0},
        "cohort_size=5": {"cohort_size": 5},
    }.items():
        with pytest.raises(ValueError, match=match):
            config(folder, "refused", **more)
    with pytest.raises(ValueError, match="one for each of the classes bad, good"):
        prompts.main(config(folder, "words", words=("a", "b", "c")))
