"""Training with its state split over the devices: the same steps, and a part of it on each."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxfm import tasks
from jaxfm.federated.foundation.central import TrainState, train_steps
from jaxfm.launch import pretrain
from jaxfm.parallel.mesh import make_mesh, spread
from jaxfm.testing import tiny_decoder

MODEL, TASK, ADAM = tiny_decoder(), tasks.causal_lm(), optax.adam(1e-2)
ROWS = {"tokens": np.random.default_rng(0).integers(1, 64, (12, 9)).astype(np.int32)}


def test_a_leaf_is_split_by_its_longest_axis_that_divides():
    shapes = {"a": (4, 6), "b": (6, 6), "c": (3, 5), "d": (), "e": (7, 2), "f": (9, 4)}
    like = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    like["key"] = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 4))
    specs = {name: place.spec for name, place in spread(like, make_mesh(data=2)).items()}
    assert specs == {
        "a": P(None, "data"), "b": P("data"), "c": P(), "d": P(), "e": P(None, "data"),
        "f": P(None, "data"), "key": P(),
    }  # fmt: skip


def test_the_steps_are_those_of_whole_states_and_a_device_holds_half():
    mesh = make_mesh(data=2)

    def first():
        variables = MODEL.init(jax.random.key(0))
        opt_state = ADAM.init(variables.params)
        return TrainState(variables, opt_state, jnp.zeros((), jnp.int32), jax.random.key(1))

    places = spread(jax.eval_shape(first), mesh)
    parts = jax.jit(first, out_shardings=places)()
    held = lambda state: sum(
        leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state[:2])
    )
    assert held(parts) < 0.55 * held(first())
    whole_steps = train_steps(MODEL, TASK, ADAM, 4, 5, mesh)
    part_steps = train_steps(MODEL, TASK, ADAM, 4, 5, mesh, places)
    whole, losses = whole_steps(first(), ROWS)
    parts, part_losses = part_steps(parts, ROWS)
    parts, _ = part_steps(parts, ROWS)  # where it lies, it is taken from
    whole, _ = whole_steps(whole, ROWS)
    assert part_steps._cache_size() == 1
    np.testing.assert_allclose(part_losses, losses, 1e-5)
    for a, b, place in zip(*map(jax.tree.leaves, (parts[:2], whole[:2], places[:2])), strict=True):
        assert a.sharding.is_equivalent_to(place, a.ndim)
        np.testing.assert_allclose(a, b, 1e-4, 1e-5)


def test_a_split_of_nothing_is_refused():
    like = jax.ShapeDtypeStruct((3,), jnp.float32)
    with pytest.raises(ValueError, match="splits nothing of this model over 2 devices"):
        pretrain._places(like, make_mesh(data=2))
