import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxfm.parallel import sampling as sample
from jaxfm.parallel.sampling import Sampling
from jaxfm.parallel.verification import Draft, verify

VOCAB = 8
DRAWS = 100_000


def settings(batch=1, **values):
    full = lambda value, dtype: jnp.full((batch,), value, dtype)
    kinds = {"top_k": jnp.int32}
    arrays = {name: full(value, kinds.get(name, jnp.float32)) for name, value in values.items()}
    return Sampling(jax.random.key(7), jnp.arange(batch, dtype=jnp.int32), **arrays)


def oracle(logits, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """The definitions, token by token, for one vector without ties."""
    logits = np.asarray(logits, np.float64)
    scores = logits / temperature
    order = list(np.argsort(-scores))
    kept = order[:top_k] if top_k else order
    mass = lambda tokens: np.exp(scores[tokens]) / np.exp(scores[tokens]).sum()
    kept = [t for t, before in zip(kept, np.cumsum(mass(kept)) - mass(kept)) if before < top_p]
    kept = [t for t, p in zip(kept, mass(kept)) if p >= min_p * mass(kept)[0]]
    probs = np.zeros(len(logits))
    probs[kept] = mass(kept)
    return probs


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 3},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.5, "min_p": 0.2},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.8, "min_p": 0.3},
    ],
)
def test_distributions_follow_their_definitions(values):
    logits = jax.random.normal(jax.random.key(1), (1, 4, 16)) * 2
    logp = sample.log_probs(logits, settings(**values))
    expected = np.stack([oracle(row, **values) for row in logits[0]])
    np.testing.assert_allclose(jnp.exp(logp[0]), expected, atol=1e-6)


def test_distributions_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32) * 3
    scores = torch.tensor(logits)
    for warper in (
        TemperatureLogitsWarper(1.4), TopKLogitsWarper(20), TopPLogitsWarper(0.85),
        MinPLogitsWarper(0.05),
    ):  # fmt: skip
        scores = warper(None, scores)
    values = settings(5, temperature=1.4, top_k=20, top_p=0.85, min_p=0.05)
    ours = jnp.exp(sample.log_probs(jnp.asarray(logits)[:, None], values))[:, 0]
    np.testing.assert_allclose(ours, torch.softmax(scores, -1).numpy(), atol=1e-6)


def test_temperature_zero_is_greedy_within_a_sampling_batch():
    logits = jax.random.normal(jax.random.key(1), (2, 1, VOCAB))
    values = settings(2, temperature=0.0)._replace(temperature=jnp.array([0.0, 1.0]))
    probs = jnp.exp(sample.log_probs(logits, values))
    assert probs[0, 0].max() == 1 and probs[0, 0].argmax() == logits[0, 0].argmax()
    assert probs[1, 0].max() < 1


@pytest.mark.parametrize("drawn", [True, False], ids=["draft model", "lookup"])
@pytest.mark.parametrize(
    "values", [{"temperature": 1.0}, {"temperature": 1.4, "top_p": 0.8}], ids=["plain", "top_p"]
)
def test_verified_tokens_have_the_targets_distribution(values, drawn):
    """Chi-square over many draws; both tokens of a block, the second given the first."""
    target, drafts = jax.random.normal(jax.random.key(2), (2, 1, 3, VOCAB)) * 1.5
    values = settings(DRAWS, **values)
    one = settings(1, temperature=1.0)._replace(
        **{name: value[:1] for name, value in values._asdict().items() if name.startswith("t")
           and value is not None}
    )  # fmt: skip
    p = np.asarray(jnp.exp(sample.log_probs(target, one)))[0]
    length = jnp.full((DRAWS,), 5, jnp.int32)

    @jax.jit
    def run():
        logq = sample.log_probs(drafts[:, :2], one)
        logq = jnp.broadcast_to(logq, (DRAWS, 2, VOCAB))
        places = length[:, None] + jnp.arange(2)[None]
        tokens = sample.draw(logq, sample.keys(values, places, sample.PROPOSE))
        probs = jnp.exp(logq)
        if not drawn:
            tokens, probs = jnp.zeros_like(tokens) + jnp.array([[3, 1]]), None
        count = jnp.full((DRAWS,), 2, jnp.int32)
        logits = jnp.broadcast_to(target, (DRAWS, 3, VOCAB))
        return verify(logits, Draft(tokens, count, probs), values, length)

    verdict = run()
    accepted = np.asarray(verdict.accepted)
    tokens = np.asarray(verdict.tokens)
    assert set(accepted) == {0, 1, 2}  # every outcome took part
    for place in range(3):
        seen = np.bincount(tokens[accepted >= place, place], minlength=VOCAB)
        expected = p[place] * seen.sum()
        assert (seen[expected == 0] == 0).all()
        some = expected > 0
        p_value = stats.chisquare(seen[some], expected[some] / expected.sum() * seen.sum()).pvalue
        assert p_value > 1e-3, (place, p_value)


def test_wrong_draft_probabilities_would_be_noticed():
    """The chi-square test has teeth: verification that accepts too often fails it."""
    p = np.array([0.5, 0.3, 0.2])
    biased = np.random.default_rng(0).multinomial(DRAWS, p + np.array([0.01, -0.01, 0]))
    assert stats.chisquare(biased, p * DRAWS).pvalue < 1e-3


def test_draws_depend_on_request_and_position_only():
    keys = lambda requests, positions: jax.random.key_data(
        sample.keys(
            Sampling(jax.random.key(0), jnp.array(requests, jnp.int32)),
            jnp.array(positions, jnp.int32),
            sample.CHOOSE,
        )
    )
    many = keys([0, 1], [[4, 5], [4, 5]])
    assert (many[1, 1] == keys([1], [[5]])[0, 0]).all()
    assert len({tuple(key.tolist()) for key in many.reshape(4, -1)}) == 4
