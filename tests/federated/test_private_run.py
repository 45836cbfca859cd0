"""A private run: its cohorts are those accounted for, epsilon is logged, and no budget exceeded."""

import functools
import json
import math

import chex
import jax
import numpy as np
import optax
import pytest
from laws import LOCAL, examples, federation, population, start
from laws import MODEL as LAWS_MODEL
from laws import TASK as LAWS_TASK

from jaxfm import tasks
from jaxfm.data.arrays import digits
from jaxfm.data.dealing import deal_out
from jaxfm.data.federation import federate
from jaxfm.federated import (
    Local,
    Population,
    compile_rounds,
    prepare,
    profiles,
    python_round,
    train,
)
from jaxfm.federated.accounting.epsilon import Sampling
from jaxfm.federated.accounting.ledger import ClientCost, client_work, first_downloads
from jaxfm.federated.accounting.privacy import Privacy
from jaxfm.federated.algorithms.fed_avg import fed_avg
from jaxfm.federated.cohort import Status, draw
from jaxfm.federated.run import summary
from jaxfm.federated.wrappers.private import with_privacy
from jaxfm.launch.pages.federated import client_figures, clients
from jaxfm.models import mlp

CLIENTS, DELTA = 12, 1e-3
MODEL, TASK = mlp((64, 4, 10)), tasks.classification(10)
DATA = deal_out(digits(), TASK, num_clients=CLIENTS, how="iid")
POISSON = Sampling(CLIENTS, 6, "poisson")


def run(privacy: Privacy, num_rounds: int, run_dir=None):
    wrap = functools.partial(with_privacy, privacy=privacy, clip=0.5)
    local = Local(optax.sgd(0.1), 16)
    ready = prepare("fed_avg", MODEL, DATA, local, num_rounds=num_rounds, max_steps=2, wrap=wrap)
    return train(
        ready, DATA, num_rounds=num_rounds, cohort_size=6, eval_every=1, eval_examples=16,
        test_examples=16, run_dir=run_dir,
    )  # fmt: skip


def test_a_run_stops_where_its_budget_ends_and_says_what_it_has_spent(tmp_path, capfd):
    privacy = Privacy(1.0, DELTA, 9.0, 2, POISSON)
    result = run(privacy, 4, tmp_path)
    out, err = capfd.readouterr()
    assert "Stopped after round 2: one more would exceed the privacy budget, an epsilon of 9" in out
    assert result.ended.startswith("Stopped after round 2")
    assert "private/epsilon" in err
    assert [line["round"] for line in result.history] == [1, 2]
    spent = [line["private/epsilon"] for line in result.history]
    assert spent == [privacy.spent(1), privacy.spent(2)] and 0 < spent[0] < spent[1]
    assert int(result.state.server.released) == 2
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["private/epsilon"] == 0 and lines[-1]["private/epsilon"] == spent[1]
    page = summary(result, DATA, 1000)
    assert page["privacy"]["epsilon"] == spent[1] and page["privacy"]["budget"] == 9.0
    assert json.loads(json.dumps(page["privacy"])) == page["privacy"]
    assert any(card.label == "epsilon" for card in client_figures(page))
    assert any("noise of 1 clipping norms" in part for part in clients(page))
    # The same command again has nothing left to do, and spends nothing.
    again = run(privacy, 4, tmp_path)
    chex.assert_trees_all_equal(again.state.server, result.state.server)
    other = privacy._replace(noise_multiplier=1.5)
    with pytest.raises(ValueError, match=r"The 2 rounds so far had a noise multiplier of 1, and"):
        run(other, 4, tmp_path)


def test_a_run_that_was_stopped_draws_the_same_noise(tmp_path):
    privacy = Privacy(1.0, DELTA, math.inf, None, POISSON)
    whole = run(privacy, 3)
    run(privacy, 1, tmp_path)
    resumed = run(privacy, 3, tmp_path)
    chex.assert_trees_all_equal(resumed.state.server, whole.state.server)


def test_poisson_sampling_draws_each_client_by_itself():
    """Rates and pairs of 4,000 rounds; of more clients than places a random part is left out."""
    rounds, drawn_of = np.arange(4000), jax.vmap(draw, in_axes=(None, 0, None, None, None, None))
    drawn, _ = jax.jit(drawn_of, static_argnums=(2, 3))(jax.random.key(0), rounds, 8, 8, 0.0, 0.25)
    there = (np.asarray(drawn)[:, :, None] == np.arange(8)).sum(1)
    assert there.max() == 1
    np.testing.assert_allclose(there.mean(0), 0.25, atol=4 * math.sqrt(0.25 * 0.75 / 4000))
    pairs = np.cov(there.T) - np.diag(np.var(there, axis=0, ddof=1))
    np.testing.assert_allclose(pairs, 0, atol=4 * 0.25 * 0.75 / math.sqrt(4000))
    few, _ = jax.jit(drawn_of, static_argnums=(2, 3))(jax.random.key(0), rounds, 8, 2, 0.0, 0.25)
    few = (np.asarray(few)[:, :, None] == np.arange(8)).sum(1)
    assert (few <= there).all() and (few.sum(1) == np.minimum(there.sum(1), 2)).all()
    assert few.mean(0).std() < 0.02


def test_a_round_counts_the_clients_that_were_drawn_and_no_empty_place():
    rows = [np.arange(i, i + 2) for i in range(20)]
    people = Population(federate(examples(24), rows), profiles(20), np.zeros(20, np.int32))
    sampling = Sampling(20, 2, "poisson")
    algorithm = fed_avg(LAWS_MODEL, LAWS_TASK, LOCAL)
    algorithm = with_privacy(algorithm, Privacy(0.0, DELTA, math.inf, None, sampling))
    engine = compile_rounds(algorithm, people, cohort_size=2, num_rounds=40)
    _, info = jax.device_get(engine.run(engine.init(start(), jax.random.key(0))))
    drawn = info.cohort.client
    assert drawn.shape == (40, sampling.places) and sampling.places < 20
    sizes = (drawn >= 0).sum(1)
    np.testing.assert_array_equal(info.selected[:, 0], sizes)
    np.testing.assert_array_equal(info.counted[:, 0], sizes)
    assert (info.cohort.status[drawn < 0] == Status.ABSENT).all()
    new, served = first_downloads(info, np.zeros(20, int), np.zeros(20, bool), 1)
    assert new[0] == served.sum() == len(set(drawn[drawn >= 0]))
    costs = (ClientCost(10, 7, 1, 1, 1),)
    one = jax.tree.map(lambda x: x[:1], info)
    work = client_work(costs, np.zeros(20, int), one)
    assert work.bytes_down.sum() == 10 * sizes[0] and work.bytes_up.sum() == 7 * sizes[0]


def test_a_poisson_round_is_that_of_its_clients_one_by_one():
    people = population("fed_avg", federation())
    privacy = Privacy(0.7, DELTA, math.inf, None, Sampling(6, 3, "poisson"))
    algorithm = with_privacy(fed_avg(LAWS_MODEL, LAWS_TASK, LOCAL), privacy, clip=0.05)
    engine = compile_rounds(algorithm, people, cohort_size=3)
    first = engine.init(start(), jax.random.key(4))
    slow, _, found = python_round(algorithm, people, jax.device_get(first), {}, cohort_size=3)
    fast, _ = engine.run(first)
    assert not found
    chex.assert_trees_all_close(slow.server, fast.server, atol=1e-6)
