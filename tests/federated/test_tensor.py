"""Clients whose model is split over devices: the rounds of one device, and no whole copy of it."""

import subprocess
import sys

import chex
import jax
import numpy as np
import optax
import pytest

from jaxfm import Subnet, axis_sizes, tasks, width
from jaxfm.data import federate
from jaxfm.federated import (
    Local,
    Population,
    compile_rounds,
    fed_adam,
    fed_avg,
    hetero_fl,
    profiles,
    scaffold,
)
from jaxfm.federated.tensor import places
from jaxfm.launch.flower.app import read_flags
from jaxfm.models import mlp
from jaxfm.parallel.mesh import make_mesh
from jaxfm.testing import tiny_decoder

MODEL = tiny_decoder()
TASK = tasks.causal_lm()
LOCAL = Local(optax.sgd(0.1, momentum=0.9), batch_size=2, epochs=1)
ROWS = np.random.default_rng(0).integers(1, 64, (14, 9)).astype(np.int32)
HALF = width(axis_sizes(MODEL.init(jax.random.key(0)), MODEL.axes), {"mlp": 0.5, "kv_heads": 0.5})
OWN = [np.arange(4), np.arange(4, 6), np.arange(6, 11), np.arange(11, 14)]


def population(buckets):
    return Population(federate({"tokens": ROWS}, OWN), profiles(4), bucket=buckets)


ALGORITHMS = {
    "fed_avg": lambda: (fed_avg(MODEL, TASK, LOCAL), [0] * 4),
    "fed_adam": lambda: (fed_adam(MODEL, TASK, LOCAL), [0] * 4),
    "scaffold": lambda: (scaffold(MODEL, TASK, LOCAL, total_examples=14), [0] * 4),
    "hetero_fl": lambda: (hetero_fl(MODEL, TASK, LOCAL, (Subnet({}), HALF)), [0, 1, 1, 0]),
}


def two_rounds(name, mesh):
    algorithm, buckets = ALGORITHMS[name]()
    rounds = compile_rounds(algorithm, population(buckets), cohort_size=3, num_rounds=2, mesh=mesh)
    state = rounds.init(MODEL.init(jax.random.key(0)), jax.random.key(1))
    placed = jax.tree.map(lambda x: x.sharding, state.server)
    state, info = rounds.run(state)
    assert jax.tree.map(lambda x: x.sharding, state.server) == placed  # no second compilation
    return state, info


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_rounds_are_those_of_one_device(name):
    state, info = two_rounds(name, make_mesh(clients=1, tensor=2))
    alone, expected = two_rounds(name, make_mesh(clients=1))
    chex.assert_trees_all_close(jax.device_get(info), jax.device_get(expected), atol=1e-5)
    for ours, theirs in ((state.server, alone.server), (state.memories, alone.memories)):
        chex.assert_trees_all_close(jax.device_get(ours), jax.device_get(theirs), atol=1e-5)
    up = state.server.variables.params["layers"]["mlp"]["up"]["kernel"]
    assert {shard.data.shape for shard in up.addressable_shards} == {(2, 16, 12)}


def test_moments_and_variates_lie_as_their_parameters():
    state, _ = two_rounds("fed_adam", make_mesh(clients=1, tensor=2))
    split = [x for x in jax.tree.leaves(state.server) if not x.sharding.is_fully_replicated]
    params = jax.tree.leaves(state.server.variables.params)
    own = [x for x in params if not x.sharding.is_fully_replicated]
    assert len(own) >= 7  # q, k, v, out, gate, up, down and the table
    assert len(split) == 3 * len(own)  # and both moments
    state, _ = two_rounds("scaffold", make_mesh(clients=1, tensor=2))
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state.memories))


def test_what_belongs_to_no_parameter_or_does_not_divide_lies_whole():
    mesh = make_mesh(tensor=2)
    axes = {"params": {"up": ("embed", "mlp"), "odd": ("embed", "mlp")}}
    state = {
        "moments": {"up": np.zeros((4, 6)), "odd": np.zeros((4, 5))},
        "up": np.zeros(6),  # of another shape
        "count": np.zeros(()),
    }
    specs = jax.tree.map(lambda x: tuple(x.spec), places(state, axes, mesh))
    assert specs == {
        "moments": {"up": (None, "tensor"), "odd": (None, None)}, "up": (), "count": ()
    }  # fmt: skip


def test_a_mesh_that_splits_nothing_of_a_model_is_refused():
    mesh = make_mesh(clients=1, tensor=2)
    model = mlp((3, 4, 2))
    people = Population(
        federate({"x": np.zeros((4, 3), np.float32), "label": np.zeros(4, np.int32)}, [range(4)]),
        profiles(1), bucket=[0],
    )  # fmt: skip
    algorithm = fed_avg(model, tasks.classification(2, inputs="x"), LOCAL)
    rounds = compile_rounds(algorithm, people, cohort_size=1, mesh=mesh)
    with pytest.raises(ValueError, match="tensor=2 splits nothing of this model"):
        rounds.init(model.init(jax.random.key(0)), jax.random.key(1))


def test_building_a_model_starts_no_backend():
    """So that devices can still be chosen, or processes joined, after it."""
    code = (
        "from jaxfm.testing import tiny_decoder; tiny_decoder(); "
        "import jax._src.xla_bridge as b; assert not b._backends"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("flag", ["--phases=central:1,federated:1", "--asynchronous=2"])
def test_what_runs_a_client_on_one_device_does_not_go_with_it(flag):
    flags = ["--tensor=2", "--profile=phone", "--data.public=0.2", flag]
    with pytest.raises(ValueError, match=r"tensor=2: --(phases|asynchronous) runs a client on one"):
        read_flags(flags)
