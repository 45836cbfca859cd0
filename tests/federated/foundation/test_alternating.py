"""Central and federated phases in turn: the equations, tokens, resuming, what is refused."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from laws import QUADRATIC, SQUARES, TASK

from jaxfm.data.dealing import Data, deal_out
from jaxfm.data.federation import all_rows, federate
from jaxfm.data.source import Source
from jaxfm.federated import Local, Population, client_data, profiles, run_client, train
from jaxfm.federated.algorithm import with_variables
from jaxfm.federated.algorithms.diloco import diloco
from jaxfm.federated.algorithms.fed_avg import fed_avg
from jaxfm.federated.algorithms.streaming_diloco import streaming_diloco
from jaxfm.federated.foundation import Central, Phase, alternate, phases_of
from jaxfm.federated.foundation.central import TrainState, central_steps
from jaxfm.federated.foundation.phases import units
from jaxfm.federated.wrappers.masters import wide_model, with_masters
from jaxfm.parallel.mesh import make_mesh
from jaxfm.tasks import causal_lm

ROWS = {"t": np.linspace(-1, 5, 12).astype(np.float32)}
CLIENTS = federate(ROWS, [np.arange(4 * i, 4 * i + 4) for i in range(3)])
SOME = {"t": np.array([1.0, 2.0], np.float32)}
DATA = Data(
    train=CLIENTS, local_validation=None, local_test=CLIENTS, validation=SOME, test=SOME,
    names=("a", "b", "c"), task=SQUARES, tokenizer=None,
    public={"t": np.array([-3.0, 7.0, 4.0], np.float32)},
)  # fmt: skip
CENTRAL = Central(optax.sgd(0.1, 0.5), 2)
DILOCO = diloco(QUADRATIC, SQUARES, Local(optax.adam(0.1), 2))
MIXED = phases_of(["central:3", "federated:3", "central:5", "federated:1"])


def run(phases, algorithm=DILOCO, data=DATA, **changes):
    settings = {"central": CENTRAL, "cohort_size": 2, "eval_every": 1, "central_chunk": 2} | changes
    return alternate(algorithm, data, phases, **settings)


@functools.cache
def mixed():
    return run(MIXED)


def test_federated_phases_alone_are_a_run_of_rounds():
    ours = run([Phase("federated", 2), Phase("federated", 1)]).trained
    theirs = train(DILOCO, DATA, num_rounds=3, cohort_size=2, eval_every=1)
    chex.assert_trees_all_equal(ours.state.server, theirs.state.server)
    assert ours.totals == theirs.totals and ours.test == theirs.test


def test_central_phases_are_steps_on_public_rows():
    """With momentum that goes on from one phase to the next."""
    result = run(phases_of(["central:3", "central:2"]))
    key = jax.random.fold_in(jax.random.key(1), 2**32 - 3)
    y, trace = 1.0, 0.0
    for step in range(5):
        rows_key, _ = jax.random.split(jax.random.fold_in(key, step))
        rows = np.asarray(jax.random.randint(rows_key, (2,), 0, 3))
        trace = 0.5 * trace + (y - DATA.public["t"][rows].mean())
        y -= 0.1 * trace
    found = result.trained.state.server.variables.params["y"]
    np.testing.assert_allclose(found, y, rtol=1e-5)
    assert result.targets == {"central": 10.0, "federated": 0.0}
    assert result.trained.totals["bytes_up"] == 0


def test_targets_are_counted_alike_in_both_kinds_of_phase():
    """A round of two clients of four rows each are eight targets."""
    result = mixed()
    assert result.targets == {"central": 16.0, "federated": 32.0}
    line = result.trained.history[-1]
    assert line["total/central_targets"] == 16 and line["total/federated_targets"] == 32
    assert len(result.trained.history) == 2 + 3 + 3 + 1


@pytest.mark.parametrize("done", [1, 2])
def test_a_stopped_schedule_ends_with_the_same_bits(done, tmp_path, capsys):
    """Stopped after a central phase, and in the middle of a federated one."""
    run([MIXED[0], *([Phase("federated", done - 1)] * (done > 1))], run_dir=tmp_path)
    result = run(MIXED, run_dir=tmp_path)
    assert "Going on after round" in capsys.readouterr().out
    chex.assert_trees_all_equal(result.trained.state, mixed().trained.state)
    assert result.targets == mixed().targets and result.trained.test == mixed().trained.test
    assert result.trained.totals == mixed().trained.totals


def test_another_schedule_does_not_go_on_from_a_folder(tmp_path):
    run([Phase("central", 2), Phase("federated", 1)], run_dir=tmp_path)
    with pytest.raises(ValueError, match=r"1 rounds and 2 central steps behind it, .* 2 and 0"):
        run([Phase("federated", 2), Phase("central", 2)], run_dir=tmp_path)


def traces(*texts) -> int:
    """How often the program of clients is traced in a schedule."""
    seen = []

    def client(*args):
        seen.append(1)
        return DILOCO.buckets[0].client(*args)

    bucket = DILOCO.buckets[0]._replace(client=client)
    run(phases_of(texts), DILOCO._replace(buckets=(bucket,)))
    return len(seen)


def test_phases_share_one_program():
    assert traces("federated:1") == traces("federated:1", "central:3", "federated:2") > 0


def test_a_budget_ends_a_schedule_before_a_round():
    cost = 2 * (4 + 4 + 4)
    phases = phases_of(["federated:1", "central:2", "federated:3", "central:2"])
    result = run(phases, byte_budget=2 * cost + 1)
    assert result.trained.ended.startswith("Stopped after round 2")
    assert result.trained.totals["bytes_up"] + result.trained.totals["bytes_down"] == 2 * cost
    assert result.targets["central"] == 4


def test_streaming_clients_take_the_whole_model_after_a_central_phase():
    algorithm = streaming_diloco(
        QUADRATIC, SQUARES, Local(optax.sgd(0.1), 2), fragments=2, own_share=0.5
    )
    (bucket,) = algorithm.buckets
    state = algorithm.init(QUADRATIC.init(None))._replace(turn=jnp.int32(3))
    nine = {"y": jnp.float32(9)}
    new = with_variables(state, QUADRATIC.init(None)._replace(params=nine))
    assert new.turn == 7 and new.variables.params["y"] == 9
    down, one = bucket.send(new, None), {"y": jnp.float32(1)}
    memory = bucket.init_client(down, None, None, None)
    memory = memory._replace(params=one, base=one, turn=jnp.int32(2))
    at_nine = CLIENTS._replace(examples={"t": np.full(12, 9, np.float32)})
    data, profile = client_data(Population(at_nine, profiles(3), np.zeros(3, int)), 0)
    _, kept, info = run_client(bucket, down, memory, data, profile, jax.random.key(0))
    assert kept.params["y"] == 9 and kept.base["y"] == 9  # where its gradient is zero
    assert info.spent.caught_up == 1


def test_halves_take_what_was_trained_in_32_bits():
    half = lambda variables: jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
    model = QUADRATIC._replace(init=lambda key: half(QUADRATIC.init(key)))
    local = Local(optax.sgd(0.1), 2)
    algorithm = with_masters(*(fed_avg(m, SQUARES, local) for m in (model, wide_model(model))))
    state = algorithm.init(model.init(None))
    value = QUADRATIC.init(None)._replace(params={"y": jnp.float32(1 + 2**-12)})
    new = with_variables(state, value)
    assert new.wide.variables.params["y"] == np.float32(1 + 2**-12)
    assert new.variables.params["y"] == 1 and new.variables.params["y"].dtype == jnp.bfloat16


class Outer(NamedTuple):
    own: Any


def test_states_inside_of_others_are_found_and_others_are_refused():
    state = DILOCO.init(QUADRATIC.init(None))
    other = state.variables._replace(params={"y": jnp.float32(2)})
    assert with_variables(Outer(state), other).own.variables.params["y"] == 2
    with pytest.raises(ValueError, match="A tuple cannot take a model that was trained centrally"):
        with_variables((), other)


def test_public_rows_are_no_clients_rows():
    rows = {"tokens": np.arange(40, dtype=np.int32)[:, None] * np.ones((1, 5), np.int32)}
    source = Source(rows, np.arange(40) % 4, ("a", "b", "c", "d"))
    splits = dict.fromkeys(("train", "validation", "test"), source)
    for how in ("natural", "iid"):
        data = deal_out(splits, causal_lm(), num_clients=4, how=how, public=0.3, seed=3)
        public = set(data.public["tokens"][:, 0].tolist())
        own = np.concatenate([*all_rows(data.train), *all_rows(data.local_test)])
        private = set(data.train.examples["tokens"][own][:, 0].tolist())
        assert len(public) == 12 and public.isdisjoint(private)
        assert public | private == set(range(40))


@pytest.mark.parametrize(
    ("phases", "changes", "message"),
    [
        ([], {}, "A schedule has at least one phase"),
        ([Phase("central", 0)], {}, "is no phase: give the kind central or federated"),
        ([Phase("local", 3)], {}, "is no phase"),
        (MIXED, {"central_chunk": 0}, "central_chunk=0 must be at least 1"),
        (MIXED, {"eval_every": 0}, "eval_every=0 must be at least 1"),
        (MIXED, {"central": Central(optax.sgd(0.1), 0)}, "batch_size=0 must be at least 1"),
        (MIXED, {"data": DATA._replace(public=None)}, "the data have none: deal out a share"),
        (MIXED, {"data": DATA._replace(task=TASK, public={"x": np.ones((3, 6))})}, "no labels"),
    ],
)
def test_what_cannot_be_run_is_refused(phases, changes, message):
    with pytest.raises(ValueError, match=message):
        run(phases, **changes)


@pytest.mark.parametrize("text", ["central", "central:0", "federated:-1", "local:3", "central:x"])
def test_phases_are_read_from_texts(text):
    assert phases_of(["federated:2"]) == (Phase("federated", 2),)
    assert [u.length for u in units([Phase("central", 7)], 3)] == [3, 3, 1]
    with pytest.raises(ValueError, match="is no phase; give central:STEPS or federated:ROUNDS"):
        phases_of([text])


def test_a_central_step_is_split_over_the_devices_of_clients():
    mesh, program = make_mesh(clients=2), []
    for size in (2, 3):
        steps = central_steps(QUADRATIC, SQUARES, CENTRAL._replace(batch_size=size), mesh)
        variables = QUADRATIC.init(None)
        start = TrainState(
            variables, CENTRAL.optimizer.init(variables.params), jnp.int32(0), jax.random.key(0)
        )
        text = jax.jit(steps).lower(start, DATA.public, jnp.int32(2)).compile().as_text()
        program.append("all-reduce" in text)
    assert program == [True, False]
