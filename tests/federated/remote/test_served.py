"""A served run: the simulation's numbers, its folder, and going on where it was stopped."""

import json

import chex
import numpy as np
import optax
import pytest
from test_remote import shared_program

from jaxfm import tasks
from jaxfm.data import digits
from jaxfm.data.dealing import deal_out
from jaxfm.federated import Local, prepare, train
from jaxfm.federated.client import client_data
from jaxfm.federated.remote import standalone
from jaxfm.federated.remote.in_process import in_process
from jaxfm.federated.remote.run import REFUSED, population_of, serve
from jaxfm.federated.remote.site import Client, prepare_site
from jaxfm.models import mlp
from jaxfm.parallel.mesh import make_mesh

RUN = {"cohort_size": 2, "seed": 3, "eval_every": 1, "eval_examples": 32, "test_examples": 64}


@pytest.fixture(scope="module")
def setting():
    task = tasks.classification(10)
    data = deal_out(digits(), task, num_clients=3, how="iid")
    local = Local(optax.sgd(0.3), 16)
    ready = prepare("fed_avg", mlp((64, 8, 10)), data, local, num_rounds=3, max_steps=4)
    return ready, data


def clients(setting, root):
    ready, data = setting

    def prepare_client(folder, config):
        own = client_data(population_of(ready, data), config["client"])
        client = Client(ready.algorithm, ready.variables, *own, data.public)
        prepare_site(folder, client, config["bucket"])

    return in_process(root, prepare_client)


def test_a_served_run_is_the_simulation_and_goes_on_where_it_was_stopped(
    setting, tmp_path, monkeypatch
):
    monkeypatch.setattr(standalone, "_program", shared_program)
    exchange, (ready, data) = clients(setting, tmp_path / "clients"), setting
    expected = train(ready, data, num_rounds=3, mesh=make_mesh(clients=1), **RUN)
    run_dir = tmp_path / "run"
    first = serve(ready, data, exchange, num_rounds=1, run_dir=run_dir, **RUN)
    found = serve(ready, data, exchange, num_rounds=3, run_dir=run_dir, **RUN)
    assert first.state.text == found.state.text and len(found.history) == 2
    close = lambda a, b: chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-6)
    close(found.state.server, expected.state.server)
    assert found.totals == pytest.approx(expected.totals)
    assert found.test["accuracy"] == pytest.approx(expected.test["global/accuracy"])
    line, same = found.history[-1], expected.history[-1]
    assert {name: line[name] for name in same} == pytest.approx(same, rel=1e-4)
    assert not (run_dir / REFUSED).exists() and found.refused == []


def test_refusals_are_written_down_and_the_run_goes_on(setting, tmp_path, monkeypatch):
    monkeypatch.setattr(standalone, "_program", shared_program)
    exchange, (ready, data) = clients(setting, tmp_path / "clients"), setting

    def with_nan(orders):
        for reply in exchange(orders):
            if reply.client == 1:
                name = next(name for name in reply.wires if name.startswith("upload"))
                wire = reply.wires[name]
                nans = np.full(wire.shape, np.nan, wire.dtype)
                reply = reply._replace(wires={**reply.wires, **standalone.pack({name: nans})})
            yield reply

    found = serve(ready, data, with_nan, num_rounds=3, run_dir=tmp_path / "run", **RUN)
    lines = [json.loads(line) for line in (tmp_path / "run" / REFUSED).read_text().splitlines()]
    assert lines and {line["client"] for line in lines} == {1}
    assert all("entries that are not finite" in line["reason"] for line in lines)
    assert len(lines) == len(found.refused) == found.totals["absent"]
    assert found.totals["reported"] == 6 - len(lines)
