"""Models of folders for the data at hand: which parts of a head are kept, and which are new."""

import dataclasses
import json
import warnings
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxfm import hub
from jaxfm.models import CnnConfig, cnn, mlp
from jaxfm.subnet import axis_sizes, extract, width
from jaxfm.testing import random_variables, tiny_decoder, tiny_encoder, tiny_vit
from jaxfm.tokenizer import ByteTokenizer

KINDS = {
    "text": {"tokens": np.zeros((2, 9), np.int32), "mask": np.ones((2, 9), bool)},
    "language": {"tokens": np.zeros((2, 9), np.int32)},
    "images": {"image": np.zeros((2, 8, 8, 3), np.uint8)},
    "features": {"features": np.zeros((2, 5), np.float32)},
}
TEXT = {"vocab_size": 260}


def data(kind, classes=("a", "b", "c"), **leaves):
    """As much of `Data` as a model must fit."""
    own = () if kind == "language" else tuple(classes)
    tokenizer = ByteTokenizer() if kind in ("text", "language") else None
    task = SimpleNamespace(draws=False)
    leaves = KINDS[kind] | leaves
    return SimpleNamespace(validation=leaves, classes=own, tokenizer=tokenizer, task=task)


def load_for(model, folder, *args, **saved):
    """What `hub.load_for` makes of a model that is saved, and its variables before that."""
    variables = random_variables(model)
    hub.save(model, variables, folder, **saved)
    return hub.load_for(*args, folder, seed=3), variables


def unequal(a, b):
    """The names of the parameters that differ between two models, or that one of them lacks."""
    a, b = (flatten_dict(x.params, sep=".") for x in (a, b))
    same = lambda name: name in a and name in b and np.array_equal(a[name], b[name])
    return {name.rpartition(".")[0] for name in a.keys() | b.keys() if not same(name)}


BODIES = {
    "bert": (tiny_encoder(**TEXT, head="pooler"), "text", "classifier", {"head.classifier"}),
    "bert of words": (
        tiny_encoder(**TEXT), "text", "classifier, pooler",
        {"head", "head.transform", "head.norm", "head.pooler", "head.classifier"},
    ),
    "roberta": (
        tiny_encoder(**TEXT, family="roberta", pad_id=1, head="classify", num_classes=5), "text",
        "classifier", {"head.classifier"},
    ),
    "llama": (tiny_decoder(**TEXT, tied=False), "text", "score", {"head.out", "head.score"}),
    "vit": (tiny_vit(), "images", "classifier", {"head.classifier"}),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_only_a_head_that_does_not_fit_is_new(name, tmp_path):
    model, kind, drawn, parts = BODIES[name]
    fitted, before = load_for(model, tmp_path / "m", data(kind))
    assert fitted.model.config.head == "classify" and fitted.model.config.num_classes == 3
    assert fitted.drawn == tuple(drawn.split(", "))
    assert fitted.notes == (f"{tmp_path / 'm'}: {drawn} drawn anew, for 3 classes.",)
    assert unequal(fitted.variables, before) == parts
    shapes = jax.eval_shape(fitted.model.init, jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(fitted.variables, shapes)
    if kind == "text" and name == "llama":
        assert fitted.model.config.pad_id == ByteTokenizer.pad_id


def test_a_classifier_follows_the_order_of_the_datas_classes(tmp_path):
    model = tiny_encoder(**TEXT, head="classify", num_classes=3)
    fitted, before = load_for(model, tmp_path / "m", data("text"), classes=("b", "c", "a"))
    assert not fitted.drawn and not fitted.notes
    kernel = before.params["head"]["classifier"]["kernel"]
    np.testing.assert_array_equal(
        fitted.variables.params["head"]["classifier"]["kernel"], kernel[:, [2, 0, 1]]
    )
    assert fitted.model.config.metadata["config"]["id2label"] == {"0": "a", "1": "b", "2": "c"}
    fitted, before = load_for(model, tmp_path / "n", data("text"), classes=("x", "y", "z"))
    assert not unequal(fitted.variables, before)
    assert "whose classes had other names: 'a' ('x'), 'b' ('y'), 'c' ('z')" in fitted.notes[0]


def test_a_decoder_that_classified_continues_text_again(tmp_path):
    model = tiny_decoder(**TEXT, head="classify", num_classes=3, pad_id=0)
    fitted, before = load_for(model, tmp_path / "m", data("language"))
    assert fitted.model.config.head == "causal" and fitted.model.stages is not None
    assert unequal(fitted.variables, before) == {"head.score"}


def test_our_own_networks_get_a_classifier_of_the_datas_size(tmp_path):
    model = mlp((5, 4, 2))
    fitted, before = load_for(model, tmp_path / "m", data("features"))
    assert fitted.model.config.sizes == (5, 4, 3) and fitted.drawn == ("classifier",)
    assert unequal(fitted.variables, before) == {"dense2"}
    half = extract(before, model.axes, width(axis_sizes(before, model.axes), {"hidden1": 0.5}))
    hub.save(model, half, tmp_path / "m")
    fitted = hub.load_for(data("features"), tmp_path / "m")
    assert fitted.model.apply(fitted.variables, np.ones((1, 5), np.float32))[0].shape == (1, 3)
    fitted, before = load_for(model, tmp_path / "n", data("features", "ab"), classes=("b", "a"))
    kernel = before.params["dense2"]["kernel"]
    np.testing.assert_array_equal(fitted.variables.params["dense2"]["kernel"], kernel[:, ::-1])


def test_images_are_normalised_as_the_folder_says_which_goes_through_a_save(tmp_path):
    model = tiny_vit(num_classes=3)
    variables = random_variables(model)
    hub.save(model, variables, tmp_path / "m")
    says = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2], "do_normalize": True}
    (tmp_path / "m" / "preprocessor_config.json").write_text(json.dumps(says))
    fitted = hub.load_for(data("images"), tmp_path / "m")
    images = np.random.default_rng(0).uniform(size=(2, 8, 8, 3)).astype(np.float32)
    scaled = (images - np.float32(says["image_mean"])) / np.float32(says["image_std"])
    np.testing.assert_allclose(
        fitted.model.apply(fitted.variables, images)[0], model.apply(variables, scaled)[0],
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    hub.save(fitted.model, fitted.variables, tmp_path / "n")
    assert json.loads((tmp_path / "n" / "preprocessor_config.json").read_text()) == says


def test_a_pretrained_model_starts_from_its_numbers():
    model = mlp((5, 4, 2))
    variables = random_variables(model)
    start = hub.pretrained(model, variables).init
    chex.assert_trees_all_equal(start(jax.random.key(0)), variables, start(jax.random.key(1)))
    assert unequal(start(jax.random.key(0)), model.init(jax.random.key(0)))


@pytest.mark.parametrize(
    ("model", "kind", "changes", "message"),
    [
        (tiny_encoder(**TEXT), "language", {}, "holds a bert, which does not fit text to be"),
        (tiny_vit(), "text", {}, "holds a vit, which does not fit labelled text"),
        (tiny_encoder(**TEXT), "images", {}, "holds a bert, which does not fit images"),
        (tiny_encoder(**TEXT), "features", {}, "a bert, which does not fit columns of numbers"),
        (tiny_encoder(), "text", {}, "knows 64 tokens, and the text has 260; read it with"),
        (tiny_encoder(**TEXT), "text", {"tokens": np.zeros((2, 65), int)}, "takes at most 64 tok"),
        (tiny_decoder(**TEXT), "language", {"tokens": np.zeros((2, 66), int)}, "rows have 65;"),
        (tiny_vit(), "images", {"image": np.zeros((2, 9, 8, 3))}, "8x8x3 .*, and these are 9x8x3"),
        (mlp((7, 3)), "features", {}, "takes 7 numbers, and these columns of numbers are 5"),
        (mlp((7, 3)), "text", {}, "holds a mlp, which does not fit labelled text"),
        (cnn(CnnConfig(image_size=(8, 6))), "images", {}, "images of 8x6x1, and these images"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_the_data_are_refused(model, kind, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_for(model, tmp_path / "m", data(kind, **changes))


def test_rows_may_be_as_long_as_a_models_positions(tmp_path):
    tokens = {"tokens": np.zeros((2, 65), int)}
    fitted, _ = load_for(tiny_decoder(**TEXT), tmp_path / "m", data("language", **tokens))
    assert dataclasses.replace(fitted.model.config, metadata={}).max_len == 64


def test_nothing_is_said_of_heads_that_are_passed_over(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_for(tiny_decoder(**TEXT, tied=False), tmp_path / "m", data("text"))
