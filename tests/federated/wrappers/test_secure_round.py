"""The protocol and the compiled round meet: one round of real training, masked, bit for bit."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import advance, federation, make, population, start

from jaxfm.federated import client_data, client_key, compile_rounds, run_client
from jaxfm.federated.client import send
from jaxfm.federated.secure.graph import complete_graph, ring
from jaxfm.federated.secure.play import Dropouts, secure_sum
from jaxfm.federated.wrappers.secure import SecureState, flat_words, upload_of, with_secure_sums
from jaxfm.model import Variables

COUNT = 6
SECURED = with_secure_sums(make("fed_avg"), COUNT)
(BUCKET,) = SECURED.buckets
GRAPHS = {
    "complete": complete_graph(range(COUNT), 3),
    "ring": ring([3, 0, 4, 1, 5, 2], 4, 2, 3),
}
DROPOUTS = {
    "nobody leaves": Dropouts(),
    "before sharing": Dropouts(before_sharing={2}),
    "before uploading": Dropouts(before_upload={0, 5}),
    "before unmasking": Dropouts(before_unmasking={1, 3}),
    "at all stages": Dropouts({4}, {1}, {0}),
}


class Seen(NamedTuple):
    """The model, and the words of the last round's sum."""

    variables: Variables
    total: Any


def people(present):
    data = federation((6, 1, 4, 3, 5, 2))
    return population("fed_avg", data._replace(count=data.count * np.isin(range(COUNT), present)))


@functools.cache
def uploads() -> dict[int, Any]:
    """What each client sends in the first round, by itself."""
    state = SECURED.init(start())
    download, crowd, key = send(BUCKET, state), people(range(COUNT)), jax.random.key(3)
    found = {}
    for i in range(COUNT):
        data, profile = client_data(crowd, i)
        memory = BUCKET.init_client(download, data, profile, client_key(key, i, None))
        answer = run_client(BUCKET, download, memory, data, profile, client_key(key, i, 0))
        found[i] = answer.upload
    return found


@functools.cache
def engine():
    """The compiled round, whose server keeps the words that it gets."""
    like = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), uploads()[0])
    words_only = SECURED._replace(
        init=lambda variables: SecureState(Seen(variables, like), SECURED.init(variables).limit),
        buckets=(BUCKET._replace(lift=lambda server, sums: sums),),
        server=lambda state, totals, public, key: (
            state._replace(own=Seen(state.variables, totals)),
            {},
        ),
    )
    return compile_rounds(words_only, people(range(COUNT)), cohort_size=COUNT)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("name", DROPOUTS)
def test_the_masked_sum_is_the_compiled_one_bit_for_bit(graph, name):
    words = {i: flat_words(upload) for i, upload in uploads().items()}
    outcome = secure_sum(words, GRAPHS[graph], DROPOUTS[name])
    state, _ = advance(engine(), people(sorted(outcome.present)), 1)
    np.testing.assert_array_equal(outcome.total, flat_words(state.server.own.total))
    restored = upload_of(outcome.total, uploads()[0])
    chex.assert_trees_all_equal(restored, jax.device_get(state.server.own.total))
    assert restored.clients == len(outcome.present)


def test_the_server_goes_on_with_the_masked_sum():
    words = {i: flat_words(upload) for i, upload in uploads().items()}
    outcome = secure_sum(words, GRAPHS["complete"], DROPOUTS["before uploading"])
    server = SECURED.init(start())
    totals = BUCKET.lift(server, upload_of(outcome.total, uploads()[0]))
    server, figures = SECURED.server(server, totals, None, jax.random.key(0))
    crowd = people(sorted(outcome.present))
    compiled = compile_rounds(SECURED, crowd, cohort_size=COUNT)
    state, _ = advance(compiled, crowd, 1)
    chex.assert_trees_all_close(server, state.server, rtol=1e-6, atol=1e-7)
    assert figures == {"secure_clipped": 0, "secure_lost": 0}
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), server.variables, start())
    assert max(jax.tree.leaves(moved)) > 0.01


def test_words_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"An upload has \d+ words; there are \[3\]"):
        upload_of(np.zeros(3, np.uint32), uploads()[0])
