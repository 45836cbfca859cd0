"""Models of folders from the command line: trained further, written again, started from."""

import csv
import json

import jax
import numpy as np
import pytest
from absl import flags
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jaxfm import hub
from jaxfm.config import define_flags, from_flags
from jaxfm.launch import federate
from jaxfm.launch.federate_config import FederateConfig
from jaxfm.testing import random_variables, tiny_decoder, tiny_encoder
from jaxfm.tokenizer import HuggingFaceTokenizer, load_tokenizer

WORDS = ["good", "bad", "the", "a", "film", "was", "very", "not", "dull", "fine"]
CLASSES = ("negative", "positive")
ARCHITECTURES = {
    "bert": "BertForSequenceClassification", "llama": "LlamaForSequenceClassification",
}  # fmt: skip
NAMES = ["bert", pytest.param("llama", marks=pytest.mark.slow)]
MOODS = ("good", "bad", "dull", "fine")


def word_tokenizer(*special, before=(), after=(), **roles):
    """A tokenizer of whole words, with special tokens first and some of them around a text."""
    vocab = {word: number for number, word in enumerate([*special, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=special[0]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if before or after:
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after], special_tokens=[(s, vocab[s]) for s in special]
        )
    inner = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=special[0], **roles)
    return HuggingFaceTokenizer(inner)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny BERT without a head, a tiny Llama that continues text, and films in a CSV file."""
    root = tmp_path_factory.mktemp("models")
    cls, sep = "[CLS]", "[SEP]"
    roles = {"pad_token": "[PAD]", "cls_token": cls, "sep_token": sep}
    tokenizer = word_tokenizer("[UNK]", "[PAD]", cls, sep, before=[cls], after=[sep], **roles)
    bert = tiny_encoder(head="pooler", pad_id=1)
    hub.save(bert, random_variables(bert), root / "bert", tokenizer)
    tokenizer = word_tokenizer("<unk>", "<s>", "</s>", bos_token="<s>", eos_token="</s>")
    hub.save(tiny_decoder(), random_variables(tiny_decoder()), root / "llama", tokenizer)
    rng = np.random.default_rng(0)
    with (root / "films.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number in range(160):
            words = [*rng.choice(WORDS[2:], rng.integers(2, 6)), WORDS[number % 2]]
            writer.writerow([" ".join(rng.permutation(words)), CLASSES[1 - number % 2]])
    return root


def command(*words):
    """The config of a command line."""
    values = flags.FlagValues()
    define_flags(FederateConfig, values)
    few = ["--data.num_clients=2", "--cohort_size=2", "--data.partition=iid", "--max_steps=0"]
    values(["federate", *few, "--eval_every=100", *words])
    return from_flags(FederateConfig, values)


@pytest.fixture(scope="module")
def trained(folders):
    """Runs each model once; returns its folder."""

    def run(name):
        folder = folders / f"run-{name}"
        if not folder.exists():
            federate.main(
                command(
                    f"--run_dir={folder}", f"--data.source={folders / 'films.csv'}",
                    f"--model={folders / name}", "--rounds=5", "--epochs=2",
                    "--local.learning_rate=0.01",
                )
            )  # fmt: skip
        return folder

    return run


def batch(tokenizer):
    """Texts of unequal lengths, as transformers pads them."""
    texts = ["a very good film", "bad", "the film was not dull was good fine"]
    inner = tokenizer.inner
    if inner.pad_token is None:
        inner.pad_token = inner.eos_token
    return inner(texts, padding=True, return_tensors="np")


@pytest.mark.parametrize("name", NAMES)
def test_a_folders_model_learns_to_classify_and_is_written_as_one(name, trained, capsys):
    run = trained(name)
    results = json.loads((run / "results.json").read_text())
    assert results["federate"]["test"]["global/accuracy"] > 0.9
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["architectures"] == [ARCHITECTURES[name]]
    assert config["id2label"] == dict(zip("01", CLASSES))
    inputs = batch(load_tokenizer(run / "model"))
    model, variables = hub.load(run / "model")
    given = {"tokens": inputs["input_ids"], "mask": inputs["attention_mask"]}
    logits = model.apply(variables, given)[0]
    np.testing.assert_array_equal(np.argmax(logits, -1), [1, 0, 1])


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reopens_what_was_trained_with_equal_logits(name, trained):
    torch = pytest.importorskip("torch")
    import transformers

    folder = trained(name) / "model"
    theirs, info = getattr(transformers, ARCHITECTURES[name]).from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), info
    tokenizer = HuggingFaceTokenizer(transformers.AutoTokenizer.from_pretrained(folder))
    inputs = batch(tokenizer)
    given = {key: torch.tensor(inputs[key]) for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = theirs.eval()(**given).logits.numpy()
    model, variables = hub.load(folder)
    output = model.apply(variables, {key: x.numpy() for key, x in given.items()})[0]
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_bert_learns_to_tag_words_and_is_reopened_by_transformers(folders, capsys):
    torch = pytest.importorskip("torch")
    import transformers

    rng, run = np.random.default_rng(0), folders / "run-tags"
    with (folders / "moods.jsonl").open("w") as file:
        for _ in range(160):
            words = rng.choice(WORDS, rng.integers(2, 7)).tolist()
            tags = ["MOOD" if word in MOODS else "O" for word in words]
            file.write(json.dumps({"words": words, "mood": tags}) + "\n")
    federate.main(
        command(
            f"--run_dir={run}", f"--data.source={folders / 'moods.jsonl'}", "--data.label=mood",
            "--data.text=words", f"--model={folders / 'bert'}", "--rounds=5", "--epochs=2",
            "--local.learning_rate=0.01",
        )
    )  # fmt: skip
    results = json.loads((run / "results.json").read_text())
    assert results["federate"]["test"]["global/accuracy"] > 0.9
    theirs = transformers.BertForTokenClassification.from_pretrained(run / "model")
    assert theirs.config.id2label == {0: "MOOD", 1: "O"}
    inputs = batch(load_tokenizer(run / "model"))
    given = {key: torch.tensor(inputs[key]) for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = theirs.eval()(**given).logits.numpy()
    model, variables = hub.load(run / "model")
    output = model.apply(variables, {key: x.numpy() for key, x in given.items()})[0]
    seen = inputs["attention_mask"] > 0
    np.testing.assert_allclose(output[seen], expected[seen], rtol=1e-4, atol=1e-4)


def test_a_run_starts_from_the_model_of_another(trained, folders, capsys):
    start = trained("bert") / "model"
    capsys.readouterr()
    config = command(
        f"--run_dir={folders / 'again'}", f"--data.source={folders / 'films.csv'}",
        f"--init={start}", "--rounds=1",
    )  # fmt: skip
    _, model, prepared = federate.ready(config)
    assert capsys.readouterr().out == ""  # its classifier is of the right size, and is kept
    _, saved = hub.load(start)
    jax.tree.map(np.testing.assert_array_equal, prepared.variables, saved)
    assert model.config.head == "classify"
    with pytest.raises(ValueError, match="brings its own model; leave out --model=encoder"):
        command(f"--init={start}", "--model=encoder")
