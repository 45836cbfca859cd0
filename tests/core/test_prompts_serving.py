"""Many clients' prompts over one base in one batch."""

import jax
import numpy as np
import pytest

from jaxfm.adapters import (
    attach,
    prefix_tuning,
    prompts_for_requests,
    prompts_together,
    soft_prompt,
)
from jaxfm.parallel import generate, plain
from jaxfm.testing import random_variables, tiny_decoder

BASE = tiny_decoder()
PROMPTS = np.random.default_rng(0).integers(0, 64, (3, 5)).tolist()


def shaken(variables, seed):
    noise = np.random.default_rng(seed)
    move = lambda x: x + noise.normal(size=x.shape).astype(x.dtype)
    return variables._replace(params=jax.tree.map(move, variables.params))


@pytest.mark.parametrize("kind", [soft_prompt, prefix_tuning])
def test_a_batch_of_prompts_equals_them_one_by_one(kind):
    model = kind(BASE, 3)
    start = attach(model, random_variables(BASE), jax.random.key(0))
    clients = [shaken(start, seed) for seed in range(2)]
    reader, held = prompts_together(model, start, [client.params for client in clients])
    ids = [1, 0, 1]
    both = generate(plain(reader, prompts_for_requests(held, ids)), PROMPTS, max_new_tokens=6)
    for text, prompt, number in zip(both.tokens, PROMPTS, ids, strict=True):
        alone = generate(plain(model, clients[number]), [prompt], max_new_tokens=6)
        np.testing.assert_array_equal(text, alone.tokens[0])
    assert len({tuple(np.asarray(text)[5:].tolist()) for text in both.tokens}) > 1


def test_bad_input_is_refused():
    model = soft_prompt(BASE, 3)
    start = attach(model, random_variables(BASE), jax.random.key(0))
    other = attach(soft_prompt(BASE, 2), random_variables(BASE), jax.random.key(0))
    with pytest.raises(ValueError, match="prompts is empty"):
        prompts_together(model, start, [])
    with pytest.raises(ValueError, match=r"prompts\[0\] has leaves of"):
        prompts_together(model, start, [other.params])
    with pytest.raises(ValueError, match="The model has no prompt"):
        prompts_together(BASE, random_variables(BASE), [start.params])
    _, held = prompts_together(model, start, [start.params])
    with pytest.raises(ValueError, match="give numbers from 0 to 0"):
        prompts_for_requests(held, [0, 1])
