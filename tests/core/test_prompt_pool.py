"""A pool of prompts: which prompts an input takes, and what of them is sent."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfm.adapters import attach, merge, prompt_pool, soft_prompt
from jaxfm.data.federation import federate
from jaxfm.federated import Local, Population, compile_rounds, profiles
from jaxfm.federated.algorithms.fed_per import fed_per
from jaxfm.federated.partition import under
from jaxfm.tasks import classification
from jaxfm.testing import random_variables, tiny_decoder, tiny_vit

MODEL = tiny_vit(num_layers=1)
BODY = tiny_vit(num_layers=1, head="none")
IMAGES = jax.random.normal(jax.random.key(2), (6, 8, 8, 3))


def test_an_input_takes_the_prompts_of_the_nearest_keys():
    """Chosen by NumPy, and put before the input as a soft prompt of these vectors."""
    pooled = prompt_pool(MODEL, num_prompts=4, prompt_len=2, top=2)
    variables = attach(pooled, random_variables(MODEL), jax.random.key(0))
    pool = jax.tree.map(np.asarray, variables.params["pool"])
    tokens, _ = jax.jit(BODY.apply)(random_variables(MODEL), IMAGES)
    query = np.asarray(tokens)[:, 0]
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    nearest = np.argsort(-unit(query) @ unit(pool["keys"]).T, axis=-1)[:, :2]
    assert len({tuple(row) for row in nearest}) > 1

    outputs, _ = jax.jit(pooled.apply)(variables, IMAGES)
    soft = soft_prompt(MODEL, 4)
    one = jax.jit(soft.apply)
    for image, chosen, ours in zip(IMAGES, nearest, outputs, strict=True):
        vectors = jnp.asarray(pool["prompts"][chosen].reshape(4, -1))
        own = variables._replace(params={"prompt": {"vectors": vectors}})
        np.testing.assert_allclose(one(own, image[None])[0][0], ours, atol=1e-5)


def test_keys_move_to_the_queries_that_chose_them():
    """Their gradient is that of the distance, which no loss of the output has."""
    pooled = prompt_pool(MODEL, num_prompts=4, prompt_len=1, top=1, pull=0.5)
    variables = attach(pooled, random_variables(MODEL), jax.random.key(0))

    def loss(params):
        return pooled.apply(variables._replace(params=params), IMAGES, train=True)[0].sum()

    gradient = jax.jit(jax.grad(loss))(variables.params)["pool"]["keys"]
    query = jax.jit(BODY.apply)(random_variables(MODEL), IMAGES)[0][:, 0]

    def distance(keys):
        norm = lambda x: jnp.linalg.norm(x, axis=-1, keepdims=True)
        cosines = (query / norm(query)) @ (keys / norm(keys)).T
        return 0.5 * (1 - cosines.max(-1)).mean()

    expected = jax.jit(jax.grad(distance))(variables.params["pool"]["keys"])
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_the_pool_is_shared_and_a_prompt_stays_at_home():
    """After two rounds of fed_per the frozen part is as it was, bit for bit."""
    pool = prompt_pool(MODEL, num_prompts=3, prompt_len=1, top=2, trained="head.classifier")
    model = soft_prompt(pool, 2, name="personal", trained=("pool", "head.classifier"))
    task = classification(5)
    algorithm = fed_per(
        model, task, Local(optax.sgd(0.1), batch_size=2), is_personal=under("personal")
    )
    rows = [np.array([0, 1]), np.array([2, 3, 4]), np.array([5])]
    labels = np.array([0, 1, 2, 3, 4, 0], np.int32)
    data = federate({"image": np.asarray(IMAGES), "label": labels}, rows)
    people = Population(data, profiles(3), bucket=np.zeros(3, np.int32))
    engine = compile_rounds(algorithm, people, cohort_size=3)
    first = random_variables(model)
    sent = algorithm.buckets[0].send(algorithm.init(first), None)
    assert "personal" not in sent.shared.params and "pool" in sent.shared.params
    state = engine.init(first, jax.random.key(0))
    for _ in range(2):
        state, _ = engine.run(state)
    after = state.server.variables
    jax.tree.map(np.testing.assert_array_equal, after.frozen, first.frozen)
    np.testing.assert_array_equal(
        after.params["personal"]["vectors"], first.params["personal"]["vectors"]
    )
    for leaf, old in zip(
        jax.tree.leaves(after.params["pool"]), jax.tree.leaves(first.params["pool"]), strict=True
    ):
        assert np.abs(leaf - old).max() > 0
    with pytest.raises(ValueError, match="no part of a plain model"):
        merge(model, after)


def test_bad_pools_are_told_in_one_sentence():
    with pytest.raises(ValueError, match="top=4: give a number from 1 to num_prompts=3"):
        prompt_pool(MODEL, 3, 2, 4)
    with pytest.raises(ValueError, match="prompt_len=0: give at least 1"):
        prompt_pool(MODEL, 3, 0)
    with pytest.raises(ValueError, match="no class token to choose prompts by"):
        prompt_pool(tiny_decoder(head="classify"))
