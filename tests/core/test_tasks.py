"""Laws of tasks and of evaluation."""

import doctest

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxfm.data.federation
import jaxfm.tasks.task
import jaxfm.tokenizer
from jaxfm import tasks
from jaxfm.tasks import Task, evaluate, metric_totals

V = 11
KEY = jax.random.key(0)


def compiled(factory):
    """The factory of a task whose functions are compiled, as they are wherever they matter."""

    def make(*args, **options):
        made = factory(*args, **options)
        return Task(*(jax.jit(part) if callable(part) else part for part in made))

    return make


causal_lm, masked_lm, classification = map(
    compiled, (tasks.causal_lm, tasks.masked_lm, tasks.classification)
)


def reference_nats(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    peak = logits.max(-1, keepdims=True)
    log_total = np.log(np.exp(logits - peak).sum(-1)) + peak[..., 0]
    return log_total - np.take_along_axis(logits, targets[..., None], -1)[..., 0]


def random_logits(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (*shape, V)).astype(np.float32)


def tokens_of(batch: int = 3, length: int = 6, seed: int = 0) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(seed).integers(0, V, (batch, length)), jnp.int32)


def test_causal_lm_predicts_the_next_token():
    tokens = tokens_of()
    inputs, targets, weight = causal_lm().prepare({"tokens": tokens}, KEY)
    np.testing.assert_array_equal(inputs, tokens[:, :-1])
    np.testing.assert_array_equal(targets, tokens[:, 1:])
    assert weight.dtype == jnp.float32
    assert weight.shape == targets.shape
    assert (weight == 1).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_language_metrics_are_sums_with_counts(dtype):
    sizes = np.arange(V, dtype=np.int32)
    task = causal_lm(sizes, pad_id=0)
    logits = jnp.asarray(random_logits(3, 5), dtype)
    _, targets, weight = task.prepare({"tokens": tokens_of()}, None)
    real = np.asarray(targets) != 0
    assert 0 < real.sum() < real.size
    nats = reference_nats(np.asarray(logits, np.float32), np.asarray(targets))[real].sum()
    metrics = task.metrics(logits, targets, weight)
    expected = {
        "loss": (nats, real.sum()),
        "accuracy": ((np.argmax(logits, -1) == targets)[real].sum(), real.sum()),
        "bits_per_byte": (nats / np.log(2), sizes[np.asarray(targets)][real].sum()),
    }
    for name, pair in expected.items():
        np.testing.assert_allclose(np.asarray(metrics[name]), pair, rtol=1e-5)
    chex.assert_trees_all_equal(task.loss(logits, targets, weight), metrics["loss"])
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(metrics))


def test_weight_zero_silences_everything():
    task = causal_lm()
    logits = jnp.asarray(random_logits(2, 4)).at[1].set(jnp.nan)
    targets = tokens_of(2, 4)
    weight = jnp.ones((2, 4)).at[1].set(0.0)
    alone = task.metrics(logits[:1], targets[:1], weight[:1])
    chex.assert_trees_all_close(task.metrics(logits, targets, weight), alone)
    nothing = task.loss(logits, targets, jnp.zeros((2, 4)))
    assert nothing == (0.0, 0.0)


def test_a_row_weight_scales_the_whole_row():
    batch = {"tokens": tokens_of(2), "weight": jnp.array([0.0, 0.5])}
    for task in (causal_lm(), masked_lm(10, V, rate=0.9)):
        weight = task.prepare(batch, KEY)[2]
        assert set(np.unique(weight)) <= {0.0, 0.5}
        assert (weight[0] == 0).all()
        assert (weight[1] == 0.5).any()


def test_huge_bf16_logits_give_a_finite_loss():
    logits = jnp.full((1, 2, V), 1e38, jnp.bfloat16).at[0, 0, 1].set(-1e38)
    targets, weight = jnp.array([[1, 2]]), jnp.ones((1, 2))
    total, gradient = jax.jit(
        jax.value_and_grad(lambda logits: tasks.causal_lm().loss(logits, targets, weight)[0])
    )(logits)
    assert 1e38 < total < jnp.inf
    assert jnp.isfinite(gradient).all()


@given(st.integers(0, 2**31), st.sampled_from([0.15, 0.4]))
def test_masking_hides_the_right_share_of_ordinary_tokens(seed, rate):
    special = [0, 1]
    task = masked_lm(mask_id=2, vocab_size=V, special_ids=special, rate=rate)
    tokens = tokens_of(200, 100, seed=seed % 1000)
    inputs, targets, weight = jax.tree.map(
        np.asarray, task.prepare({"tokens": tokens}, jax.random.key(seed))
    )
    tokens = np.asarray(tokens)
    chosen = weight > 0
    np.testing.assert_array_equal(targets, tokens)
    np.testing.assert_array_equal(inputs[~chosen], tokens[~chosen])
    assert not np.isin(tokens[chosen], [0, 1, 2]).any()
    # 20,000 tokens, 8 of 11 eligible: five standard deviations are about 0.013 (rate), 0.03 (how).
    assert abs(chosen.sum() / (tokens > 2).sum() - rate) < 0.02
    masked = np.mean(inputs[chosen] == 2)
    same = np.mean(inputs[chosen] == tokens[chosen])
    assert abs(masked - 0.8) < 0.045
    # Kept on purpose (10%), or by drawing the same of 8 ordinary tokens.
    assert abs(same - (0.1 + 0.1 / 8)) < 0.04
    assert not np.isin(inputs[chosen], special).any()


def test_masking_is_decided_by_its_key():
    task = masked_lm(2, V)
    batch = {"tokens": tokens_of(4, 50)}
    chex.assert_trees_all_equal(task.prepare(batch, KEY), task.prepare(batch, KEY))
    other = task.prepare(batch, jax.random.key(1))
    assert (task.prepare(batch, KEY)[2] != other[2]).any()


def test_classification_scales_bytes_and_smooths_only_the_loss():
    images = jnp.arange(2 * 4 * 4 * 1, dtype=jnp.uint8).reshape(2, 4, 4, 1)
    batch = {"image": images, "label": jnp.array([3, 10], jnp.int32)}
    plain, smooth = classification(V), classification(V, label_smoothing=0.1)
    inputs, targets, weight = plain.prepare(batch, KEY)
    np.testing.assert_allclose(inputs, np.asarray(images) / 255.0, rtol=1e-6)
    logits = random_logits(2)
    nats = reference_nats(logits, np.asarray(targets))
    logits = jnp.asarray(logits)
    for task in (plain, smooth):
        metrics = task.metrics(logits, targets, weight)
        np.testing.assert_allclose(np.asarray(metrics["loss"]), (nats.sum(), 2), rtol=1e-5)
    every = np.stack([reference_nats(np.asarray(logits), np.full(2, c)) for c in range(V)])
    expected = 0.9 * nats.sum() + 0.1 * every.mean(0).sum()
    np.testing.assert_allclose(smooth.loss(logits, targets, weight)[0], expected, rtol=1e-5)


def test_classification_transforms_in_training_and_evaluation():
    def transform(images, key):
        return images + (0.0 if key is None else 1.0)

    task = classification(3, inputs="inputs", transform=transform)
    batch = {"inputs": jnp.zeros((2, 4)), "label": jnp.zeros(2, jnp.int32)}
    assert task.prepare(batch, KEY)[0].max() == 1
    assert task.prepare(batch, None)[0].max() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: masked_lm(V, V), rf"mask_id and special_ids must be in 0\.\.10; got \[{V}\]"),
        (lambda: masked_lm(0, V, rate=1.0), "rate must be between 0 and 1; got 1.0"),
        (lambda: masked_lm(0, 2, [1]), "Every id of the vocabulary is special"),
        (lambda: masked_lm(0, V).prepare({"tokens": tokens_of()}), "give prepare .* a key"),
        (
            lambda: causal_lm().prepare({"text": np.zeros(2)}),
            r"no leaf 'tokens'; it has \['text'\]",
        ),
        (
            lambda: causal_lm().loss(np.zeros((2, 4, V)), np.zeros((2, 5), int), 1.0),
            r"Logits \(2, 4, 11\) do not fit targets \(2, 5\)",
        ),
        (lambda: classification(1), "num_classes must be at least 2; got 1"),
        (lambda: classification(3, label_smoothing=1), r"label_smoothing must be in \[0, 1\)"),
        (
            lambda: classification(3).loss(np.zeros((2, V)), np.zeros(2, int), np.ones(2)),
            "The model gives 11 logits; the task has 3 classes",
        ),
    ],
)
def test_what_cannot_be_a_task_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def table_model(variables, inputs, *, train=False, key=None):
    """Bigrams: a row of logits for each token."""
    return variables[inputs], {}


@pytest.fixture(scope="module")
def bigrams():
    return jnp.asarray(random_logits(V))


@pytest.mark.smoke
@pytest.mark.parametrize("batch_size", [1, 4, 7, 64])
def test_evaluation_does_not_depend_on_the_batch_size(bigrams, batch_size):
    tokens = np.asarray(tokens_of(7, 9))
    task = causal_lm(np.arange(V))
    result = evaluate(table_model, bigrams, task, {"tokens": tokens}, batch_size)
    nats = reference_nats(np.asarray(bigrams)[tokens[:, :-1]], tokens[:, 1:])
    assert result["loss"] == pytest.approx(nats.mean(), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(
        nats.sum() / np.log(2) / tokens[:, 1:].sum(), rel=1e-5
    )
    assert type(result["accuracy"]) is float


def test_evaluation_of_the_first_rows_equals_a_shorter_set(bigrams):
    tokens = np.asarray(tokens_of(10, 9))
    task = causal_lm()
    short = evaluate(table_model, bigrams, task, {"tokens": tokens[:6]}, 4)
    assert evaluate(table_model, bigrams, task, {"tokens": tokens}, 4, count=6) == pytest.approx(
        short
    )
    weight = np.array([1.0] * 6 + [0.0] * 4, np.float32)
    assert evaluate(
        table_model, bigrams, task, {"tokens": tokens, "weight": weight}, 4
    ) == pytest.approx(short)
    nothing = evaluate(table_model, bigrams, task, {"tokens": tokens}, 4, count=0)
    assert np.isnan(list(nothing.values())).all()


def test_evaluation_compiles_once_for_a_shape(bigrams):
    counted = chex.assert_max_traces(table_model, n=1)

    def apply(variables, inputs, *, train=False):
        return counted(variables, inputs)

    task = causal_lm()
    for seed, count in ((0, None), (1, 5), (2, 3)):
        tokens = np.asarray(tokens_of(10, 9, seed=seed))
        evaluate(apply, bigrams * (1 + seed), task, {"tokens": tokens}, 4, count=count)


def test_totals_of_a_clients_rows_are_those_of_its_examples(bigrams):
    tokens = tokens_of(10, 9)
    task = causal_lm()
    rows = jnp.array([7, 2, 5, 0, 0], jnp.int32)
    totals = metric_totals(
        table_model, bigrams, task, {"tokens": tokens}, batch_size=2, rows=rows, count=3
    )
    assert totals["loss"][0].shape == (3,)
    expected = evaluate(table_model, bigrams, task, {"tokens": tokens[rows[:3]]}, 3)
    total, count = (leaf.sum() for leaf in totals["loss"])
    assert float(total / count) == pytest.approx(expected["loss"], rel=1e-5)
    assert float(count) == 3 * 8


def test_masked_evaluation_repeats_with_its_key(bigrams):
    task = masked_lm(2, V, rate=0.5)
    examples = {"tokens": tokens_of(10, 9)}
    first, again, other = (
        evaluate(table_model, bigrams, task, examples, 4, key=jax.random.key(seed))
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_evaluation_of_nothing_is_refused(bigrams):
    task = causal_lm()
    with pytest.raises(ValueError, match="no example to evaluate on"):
        evaluate(table_model, bigrams, task, {"tokens": np.zeros((0, 3), np.int32)}, 4)
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        evaluate(table_model, bigrams, task, {"tokens": tokens_of()}, 0)
    with pytest.raises(ValueError, match=r"count must be in 0\.\.3; got 4"):
        evaluate(table_model, bigrams, task, {"tokens": tokens_of()}, 2, count=4)


@pytest.mark.parametrize("module", [jaxfm.tasks.task, jaxfm.tokenizer, jaxfm.data.federation])
def test_the_examples_of_docstrings_hold(module):
    failed, attempted = doctest.testmod(module)
    assert (failed, attempted > 0) == (0, True)


def test_the_toy_task_of_the_contract_can_be_scored():
    scope = dict(vars(jaxfm.tasks.task))
    (example,) = doctest.DocTestParser().get_examples(Task.__doc__)
    exec(example.source, scope)
    examples = {"inputs": np.array([1.0, 3.0, 5.0], np.float32), "value": np.zeros(3, np.float32)}
    result = evaluate(
        lambda scale, x, train: (scale * x, {}), 2.0, scope["regression"](), examples, 2
    )
    assert result == {"loss": pytest.approx(4 * (1 + 9 + 25) / 3)}
