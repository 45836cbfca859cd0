"""CLIP computes what transformers' class does, and federates with captions inside a client."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfm import adapters, hub, tasks
from jaxfm.data.captions import NAMES, captioned_digits
from jaxfm.data.federation import federate
from jaxfm.data.loading import kind_of, load
from jaxfm.data.text import token_rows
from jaxfm.federated import Local, Population, compile_rounds, fed_avg, profiles
from jaxfm.models import ClipConfig, Tower, clip, zero_shot
from jaxfm.tasks.task import prepare_weighted
from jaxfm.testing import random_variables
from jaxfm.tokenizer import ByteTokenizer

SMALL = {"embed_dim": 16, "num_layers": 2, "num_heads": 2, "mlp_dim": 24}
CONFIG = ClipConfig(
    image=Tower(**SMALL), text=Tower(**{**SMALL, "num_layers": 1}), shared_dim=12, image_size=8,
    patch_size=4, num_channels=1, vocab_size=260, max_len=32, eos_id=257,
)  # fmt: skip
TASK = tasks.contrastive()


@functools.cache
def model():
    return clip(CONFIG)


@functools.cache
def rows(number: int = 12):
    examples = captioned_digits(ByteTokenizer())["train"].examples
    return {name: x[:number] for name, x in examples.items()}


def outputs(variables, batch):
    return model().apply(variables, {name: batch[name] for name in ("image", "tokens")})[0]


@pytest.mark.parametrize("eos_id", [257, 2])
def test_transformers_computes_the_same_and_reads_what_we_write(tmp_path, eos_id):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = ClipConfig(**{**vars(CONFIG), "eos_id": eos_id})
    variables = random_variables(clip(config))
    hub.save(clip(config), variables, tmp_path / "clip")
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "clip").eval()
    tokens, images = rows()["tokens"].copy(), rows()["image"]
    ours, _ = jax.jit(clip(config).apply)(variables, {"image": images, "tokens": tokens})
    with torch.no_grad():
        other = theirs(
            input_ids=torch.tensor(tokens).long(),
            pixel_values=torch.tensor(images.transpose(0, 3, 1, 2)),
        )
    logits = ours["scale"] * ours["image"] @ ours["text"].T
    np.testing.assert_allclose(logits, other.logits_per_image.numpy(), atol=1e-4)
    theirs.save_pretrained(tmp_path / "again")
    read, again = hub.load(tmp_path / "again")
    assert read.config == config
    jax.tree.map(np.testing.assert_array_equal, again.params, variables.params)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["visual_projection"]},
        {"target_modules": "all-linear", "use_dora": True, "bias": "all"},
        {"target_modules": r"text_model.*(fc1|out_proj)", "rank_pattern": {"fc1": 2}},
    ],
    ids=["towers", "dora", "text"],
)
def test_adapters_of_peft_are_read_and_written(tmp_path, options):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    hub.save(model(), random_variables(model()), tmp_path / "base")
    opened = lambda: transformers.CLIPModel.from_pretrained(tmp_path / "base").eval()
    theirs = peft.get_peft_model(opened(), peft.LoraConfig(**{"r": 3} | options))
    torch.manual_seed(0)
    with torch.no_grad():
        for leaf in theirs.parameters():
            leaf.add_(0.1 * torch.randn_like(leaf) * leaf.requires_grad)
    theirs.save_pretrained(tmp_path / "theirs")
    tokens, images = rows()["tokens"], rows()["image"]

    def scores(network) -> np.ndarray:
        with torch.no_grad():
            return network.eval()(
                input_ids=torch.tensor(tokens).long(),
                pixel_values=torch.tensor(images.transpose(0, 3, 1, 2)),
            ).logits_per_image.numpy()

    base = hub.load(tmp_path / "base")
    adapted, variables = hub.load_adapter(tmp_path / "theirs", *base)
    ours, _ = jax.jit(adapted.apply)(variables, {"image": images, "tokens": tokens})
    wanted = scores(theirs)
    assert np.abs(wanted - scores(opened())).max() > 0.05
    np.testing.assert_allclose(ours["scale"] * ours["image"] @ ours["text"].T, wanted, atol=2e-4)
    hub.save_adapter(adapted, variables, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(opened(), tmp_path / "ours")
    np.testing.assert_allclose(scores(again), wanted, atol=2e-4)


def test_loss_is_clips_where_all_captions_differ_and_filling_rows_are_no_negatives():
    variables = model().init(jax.random.key(0))
    batch = {name: jnp.asarray(x) for name, x in rows().items()}
    batch["tokens"] = batch["tokens"].at[:, 3].set(jnp.arange(12))  # all different
    one = np.arange(12) < 8
    total = np.float32(0)
    _, targets, weight = prepare_weighted(TASK, batch, jnp.asarray(one, jnp.float32), None)
    out = jax.jit(outputs)(variables, batch)
    loss, count = TASK.loss(out, targets, weight)
    kept = {name: np.asarray(out[name], np.float64)[:8] for name in ("image", "text")}
    scores = float(out["scale"]) * kept["image"] @ kept["text"].T
    for side in (scores, scores.T):
        total += -np.diag(side - np.log(np.exp(side).sum(1, keepdims=True))).sum() / 2
    assert float(count) == 8 and float(loss) == pytest.approx(total, rel=1e-5)


def test_equal_captions_are_no_negatives_of_each_other():
    tokens = jnp.array([[1, 2], [1, 2], [3, 4]], jnp.int32)
    where = jnp.eye(2)[jnp.array([0, 0, 1])]
    out = {"image": where, "text": where, "scale": jnp.float32(100.0)}
    loss, _ = TASK.loss(out, tokens, jnp.ones(3))
    assert float(loss) == pytest.approx(0.0, abs=1e-5)
    assert float(TASK.metrics(out, tokens, jnp.ones(3))["accuracy"][0]) == 3.0


def test_clients_learn_which_caption_belongs_to_which_digit():
    data = federate(rows(64), np.split(np.arange(64), 2))
    people = Population(data, profiles(2), np.zeros(2, np.int32))
    local = Local(optax.adam(3e-3), 16, epochs=4)
    engine = compile_rounds(fed_avg(model(), TASK, local), people, cohort_size=2)
    state = engine.init(model().init(jax.random.key(0)), jax.random.key(1))
    losses = []
    for _ in range(4):
        state, info = engine.run(state)
        losses.append(float(info.loss_total[0, 0] / info.loss_count[0, 0]))
    assert losses[-1] < 0.8 * losses[0]
    captions, _ = token_rows([f"a handwritten {name}" for name in NAMES], ByteTokenizer(), 32)
    reader, variables = zero_shot(model(), captions), state.server.variables
    logits, _ = jax.jit(reader.apply)(variables, jnp.asarray(rows()["image"]))
    assert logits.shape == (12, 10)
    labels = rows()["label"]
    own = {"image": rows()["image"], "tokens": captions[labels]}
    out = jax.jit(outputs)(variables, own)
    pairs = out["scale"] * (out["image"] * out["text"]).sum(-1)
    np.testing.assert_allclose(logits[np.arange(12), labels], pairs, rtol=1e-4)


def test_lora_goes_into_both_towers():
    adapted = adapters.lora(model(), 2, targets="attention")
    names = {path[0] for path in map(tuple, _paths(adapted.init(jax.random.key(0)).params))}
    assert names == {"image", "text"}


def _paths(tree, before=()):
    for name, below in tree.items():
        yield from _paths(below, (*before, name)) if isinstance(below, dict) else [(*before, name)]


def test_data_and_refusals():
    data = load("captioned_digits")
    assert data.kind == "captions" and kind_of(rows()) == "captions"
    assert tasks.task_for(data).check is not None
    with pytest.raises(ValueError, match="eos_id=300 is no token of a vocabulary of 260"):
        ClipConfig(**{**vars(CONFIG), "eos_id": 300})
    with pytest.raises(ValueError, match="this one has a single row"):
        TASK.prepare({name: x[:1] for name, x in rows().items()})
    with pytest.raises(ValueError, match="Captioned images have the leaves"):
        TASK.check({"image": rows()["image"]})
