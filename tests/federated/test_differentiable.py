"""A whole round is differentiable: by its learning rate and by what it starts from.

Clients take as many steps as their data and machines say, in loops whose length is an array, so
derivatives run forwards (`jax.jvp`).
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from laws import MODEL, TASK, examples, federation, population, start

from jaxfm.federated import Local
from jaxfm.federated.algorithm import ClientData, added
from jaxfm.federated.algorithms.fed_avg import fed_avg


def validation(variables):
    rows = examples(8, seed=5)
    output, _ = MODEL.apply(variables, jnp.asarray(rows["x"]), train=False)
    total, count = TASK.loss(output, jnp.asarray(rows["label"]), jnp.ones(8))
    return total / count


def round_loss(rate, variables, epochs=2):
    """The server's loss after one round of SGD with this rate, from these variables."""
    data = federation((4, 2, 0, 0, 0, 0))
    people = population("fed_avg", data)
    algorithm = fed_avg(MODEL, TASK, Local(optax.sgd(rate), 4, epochs))
    bucket, state = algorithm.buckets[0], algorithm.init(variables)
    download = bucket.send(state, None)
    sums = None
    for i in range(3):  # the third has no rows
        index = jnp.resize(jnp.asarray(data.rows_of(i) if i < 2 else [0]), (4,))
        client = client_data(data, index, data.count[i])
        profile = jax.tree.map(lambda x, i=i: jnp.asarray(x)[i], people.profiles)
        upload, _, _ = bucket.client(download, None, client, profile, jax.random.key(i))
        received = bucket.receive(state, None, upload)
        sums = received if sums is None else added(sums, received)
    state, _ = algorithm.server(state, bucket.lift(state, sums), None, jax.random.key(9))
    return validation(state.variables)


def client_data(data, index, count):
    examples_ = jax.tree.map(jnp.asarray, dict(data.examples))
    return ClientData(examples_, index, jnp.asarray(count))


def test_a_round_is_differentiable():
    variables = start()
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape).astype(np.float32))
    way = jax.tree.map(draw, variables)
    loss = jax.jit(round_loss)
    along = jax.jit(lambda args, tangents: jax.jvp(round_loss, args, tangents))
    point = (jnp.float32(0.1), variables)
    still = jax.tree.map(jnp.zeros_like, variables)
    for tangents in ((jnp.float32(1), still), (jnp.float32(0), way)):
        value, slope = along(point, tangents)
        step = 1e-2 if float(tangents[0]) else 2e-3
        move = lambda by, t=tangents: jax.tree.map(lambda x, d: x + by * d, point, t)
        ends = [loss(*move(by)) for by in (step, -step)]
        assert abs(float(slope)) > 1e-2
        np.testing.assert_allclose(float(slope), float(ends[0] - ends[1]) / (2 * step), rtol=2e-2)
        chex.assert_tree_all_finite(value)
