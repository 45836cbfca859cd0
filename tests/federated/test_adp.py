"""What ADP claims: budgets met by construction, gates of the client's own data, real slices."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfm.data.federation import federate
from jaxfm.federated.adp import Adp, adp
from jaxfm.federated.fed_avg import fed_avg
from jaxfm.federated.local import Local
from jaxfm.federated.resources import profiles
from jaxfm.federated.rounds import Population, rounds
from jaxfm.models.cnn import mlp
from jaxfm.search.cost import costs, counts_of
from jaxfm.search.interpret import full
from jaxfm.search.subnets import model_network
from jaxfm.tasks import classification
from jaxfm.testing import random_variables

MODEL, TASK = mlp((6, 12, 10, 3)), classification(3, inputs="x")
LOCAL = Local(optax.sgd(0.1), 4, 2)
VARIABLES = random_variables(MODEL)
NETWORK = model_network(MODEL, VARIABLES, jnp.ones((1, 6)))
MACS = costs(NETWORK).macs
LIMIT = 0.5 * float(MACS(NETWORK.sizes.astype(np.int64)))
COUNTS = (7, 4, 0, 5, 3)
RAMP = 3


def make(**options) -> Adp:
    local = options.pop("local", LOCAL)
    return adp(NETWORK, MODEL, TASK, local, **({"rounds": RAMP} | options))


def population() -> Population:
    """Clients of different kinds: client i sees only two of the six inputs; the third is empty."""
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(5), COUNTS)
    label = rng.integers(0, 3, len(owner)).astype(np.int32)
    x = rng.normal(size=(len(owner), 6)) + 2 * label[:, None]
    x *= (np.arange(6) // 2 == owner[:, None] % 3) * 2
    parts = [np.flatnonzero(owner == client) for client in range(5)]
    data = federate({"x": x.astype(np.float32), "label": label}, parts)
    return Population(data, profiles(5), np.zeros(5, np.int32))


def start(engine):
    return engine.init(jax.tree.map(jnp.copy, VARIABLES), jax.random.key(3))


@functools.cache
def trained(gates: str = "personal", calls: int = 4):
    """(states after each round but donated ones, as host arrays; their infos)."""
    plan = make(gates=gates)
    engine = rounds(plan.algorithm, population(), cohort_size=5)
    state, states, infos = start(engine), [], []
    for _ in range(calls):
        states.append(jax.device_get((state.server, state.memories[0])))
        state, info = engine.run(state)
        infos.append(jax.device_get(info))
    states.append(jax.device_get((state.server, state.memories[0])))
    return plan, state, states, infos


def of_client(tree, client: int):
    return jax.tree.map(lambda x: x[client], tree)


def kept_macs(kept) -> float:
    return float(MACS(counts_of(NETWORK, jax.device_get(kept))))


@pytest.mark.parametrize("gates", ["personal", "federated"])
def test_a_target_of_one_is_fed_avg(gates):
    ends = []
    for algorithm in (make(target=1.0, gates=gates).algorithm, fed_avg(MODEL, TASK, LOCAL)):
        engine = rounds(algorithm, population(), cohort_size=3, num_rounds=RAMP + 2)
        ends.append(engine.run(start(engine))[0].server.variables)
    chex.assert_trees_all_close(*ends, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gates", ["personal", "federated"])
def test_widths_follow_the_cubic_schedule_down_to_the_budget(gates):
    plan, _, states, infos = trained(gates)
    for client in range(5):
        memory = of_client(states[-1][1], client)
        server = states[-1][0]
        at = lambda t: counts_of(
            NETWORK, jax.device_get(plan.kept(server._replace(round=jnp.int32(t)), memory))
        )
        final = at(RAMP)
        for t in range(RAMP + 3):
            left = max(1 - t / RAMP, 0) ** 3
            np.testing.assert_array_equal(
                at(t), final + np.round(left * (NETWORK.sizes - final)), strict=False
            )
        assert float(MACS(final)) <= LIMIT * (1 + 1e-6)
        for one_more in np.eye(len(final), dtype=np.int64):
            assert float(MACS(final + one_more)) > LIMIT or (final + one_more > NETWORK.sizes).any()
    assert int(states[-1][0].round) == 4
    assert infos[0]["bytes_up"].sum() > infos[-1]["bytes_up"].sum() > 0


def test_everybody_keeps_within_the_target_after_the_ramp():
    plan, _, states, _ = trained()
    dense = kept_macs(full(NETWORK))
    spent = [[kept_macs(plan.kept(s, of_client(m, c))) for c in range(5)] for s, m in states]
    assert set(spent[0]) == {dense}
    assert (np.diff(spent, axis=0) <= 0).all()
    assert max(spent[RAMP]) <= LIMIT < dense
