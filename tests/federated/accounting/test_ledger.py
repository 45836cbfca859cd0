"""The ledger's bytes, operations and memory are those of what is really sent and run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfm.data.federation import federate
from jaxfm.federated.accounting.ledger import client_costs, round_costs
from jaxfm.federated.accounting.resources import assign, profiles
from jaxfm.federated.algorithms.fed_avg import fed_avg
from jaxfm.federated.algorithms.hetero_fl import hetero_fl
from jaxfm.federated.local import Local
from jaxfm.federated.population import Population
from jaxfm.federated.rounds import compile_rounds
from jaxfm.models.families.cnn import mlp
from jaxfm.subnet import Subnet
from jaxfm.tasks import classification

MODEL, TASK = mlp((6, 8, 3)), classification(3, inputs="x")
TIERS = (Subnet({}), Subnet({"hidden1": np.arange(2)}))
BATCH = 4


def population(num_buckets: int = 1, label_dtype=np.int32) -> Population:
    rng = np.random.default_rng(0)
    examples = {
        "x": rng.normal(size=(20, 6)).astype(np.float32),
        "label": rng.integers(0, 3, 20).astype(label_dtype),
    }
    data = federate(examples, np.split(np.arange(20), [4, 7, 12, 16]))
    return Population(data, profiles(5), np.arange(5) % num_buckets)


def num_parameters(hidden: int) -> int:
    return 6 * hidden + hidden + hidden * 3 + 3


def variables():
    return MODEL.init(jax.random.key(0))


def test_costs_of_a_client_by_hand():
    algorithm = hetero_fl(MODEL, TASK, Local(optax.adam(0.1), BATCH), TIERS)
    costs = client_costs(algorithm, population(2), variables())
    for cost, hidden in zip(costs, (8, 2)):
        size = 4 * num_parameters(hidden)
        assert cost.parameters == num_parameters(hidden)
        assert cost.bytes_down == size
        assert cost.bytes_up == size + 4  # and the weight
        # Weights, two moments and a gradient; beside them the loop carries a few scalars.
        assert 4 * size <= cost.memory_bytes <= 4 * size + 64
        # Two products forward, their weights' gradients, and one way back between the layers.
        assert cost.flops_per_step == 2 * BATCH * (2 * 6 * hidden + 3 * 3 * hidden)


def test_bytes_are_the_sizes_of_the_arrays_sent():
    algorithm = hetero_fl(MODEL, TASK, Local(optax.sgd(0.1), BATCH), TIERS)
    people = population(2)
    costs = client_costs(algorithm, people, variables())
    server = algorithm.init(variables())
    for cost, bucket in zip(costs, algorithm.buckets):
        download = bucket.send(server, None)
        sizes = [x.nbytes for x in jax.tree.leaves((download.params, download.stats))]
        assert cost.bytes_down == sum(sizes)


@pytest.mark.parametrize("epochs", [1, 3])
def test_operations_are_those_of_one_step(epochs):
    (cost,) = client_costs(
        fed_avg(MODEL, TASK, Local(optax.sgd(0.1), BATCH, epochs)), population(), variables()
    )
    assert cost.flops_per_step == 2 * BATCH * (2 * 6 * 8 + 3 * 3 * 8)


def test_data_of_any_dtype_is_counted():
    algorithm = fed_avg(MODEL, TASK, Local(optax.sgd(0.1), BATCH))
    wide = client_costs(algorithm, population(label_dtype=np.int64), variables())
    assert wide == client_costs(algorithm, population(), variables())


def test_rounds_cost_what_their_clients_cost():
    algorithm = hetero_fl(MODEL, TASK, Local(optax.sgd(0.1), BATCH, 2), TIERS)
    people = population(2)
    x = people.federation.examples["x"].copy()
    x[0] = np.nan  # client 0 reports, in vain
    data = people.federation
    people = people._replace(federation=data._replace(examples=data.examples | {"x": x}))
    costs = client_costs(algorithm, people, variables())
    engine = compile_rounds(algorithm, people, cohort_size=5, num_rounds=3, drop_rate=0.4)
    _, info = engine.run(engine.init(variables(), jax.random.key(0)))
    total = round_costs(costs, info)
    selected, clients, failed, steps = (
        np.asarray(x).sum(0)
        for x in (info.selected, info.counted, info.non_finite, info.spent.steps)
    )
    assert selected.tolist() == [9, 6] and 0 < clients.sum() + failed.sum() < 15 and failed[0]
    by_bucket = lambda name: np.array([getattr(cost, name) for cost in costs])
    assert total["bytes_down"] == selected @ by_bucket("bytes_down")
    assert total["bytes_up"] == (clients + failed) @ by_bucket("bytes_up")
    assert total["flops"] == steps @ by_bucket("flops_per_step")


def test_a_client_may_report_its_own_bytes():
    algorithm = fed_avg(MODEL, TASK, Local(optax.sgd(0.1), BATCH))
    (bucket,) = algorithm.buckets

    def client(*args):
        upload, memory, info = bucket.client(*args)
        return upload, memory, info.measured(bytes_up=jnp.asarray(7.0))

    algorithm = algorithm._replace(buckets=(bucket._replace(client=client),))
    people = population()
    engine = compile_rounds(algorithm, people, cohort_size=4)
    _, info = engine.run(engine.init(variables(), jax.random.key(0)))
    costs = client_costs(algorithm, people, variables())
    assert round_costs(costs, info)["bytes_up"] == 4 * 7


def test_clients_get_the_largest_model_that_fits():
    algorithm = hetero_fl(MODEL, TASK, Local(optax.sgd(0.1), BATCH), TIERS)
    full, small = (
        cost.memory_bytes for cost in client_costs(algorithm, population(2), variables())
    )
    machines = profiles(3, memory_bytes=np.array([full, full - 1, small]))
    assert assign(machines, [full, small]).tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match=r"Client 1 has .* bytes of memory; the smallest model"):
        assign(profiles(2, memory_bytes=np.array([full, small - 1])), [full, small])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_steps": 0}, "max_steps must be positive, got 0"),
        ({"flops_per_s": np.ones(3)}, r"flops_per_s has shape \(3,\); give one number or one for"),
    ],
)
def test_bad_profiles_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        profiles(2, **fields)
