"""Differential privacy with clients elsewhere: the simulation's numbers, and noise of their own."""

import json

import chex
import pytest
from programs import compiled_once  # noqa: F401  # a fixture of all tests here

from jaxfm import federated
from jaxfm.federated.remote import standalone
from jaxfm.federated.remote.in_process import in_process
from jaxfm.federated.remote.run import serve
from jaxfm.federated.remote.site import prepare_site
from jaxfm.launch.federate import local_training, ready
from jaxfm.launch.flower.app import _cost_in_privacy, dealt_client, read_flags
from jaxfm.parallel.mesh import make_mesh

FLAGS = [
    *("--algorithm=fed_avg", "--data=digits", "--data.num_clients=3", "--cohort_size=3"),
    *("--rounds=2", "--local=sgd", "--model=mlp", "--eval_every=2", "--max_steps=2"),
    "--data.partition=iid",
]
RUN = {"num_rounds": 2, "cohort_size": 3, "seed": 0, "eval_every": 2, "test_examples": 32}
KINDS = {
    "clients": ["--private.noise_multiplier=1", "--private.clip=0.5", "--private.delta=1e-2"],
    "examples": ["--examples.noise_multiplier=0.8", "--examples.clip=1"],
}


def played(words, root):
    """The run with clients of this process, and the same run in one piece."""
    config = read_flags([*FLAGS, *words])
    data, _, prepared = ready(config)

    def prepare(folder, order):
        prepare_site(folder, dealt_client(config, None, order["client"]), order["bucket"])

    found = serve(prepared, data, in_process(root, prepare), **RUN)
    expected = federated.train(prepared, data, mesh=make_mesh(clients=1), **RUN)
    assert found.refused == []
    return config, prepared, data, found, expected


def secrets(root):
    return {json.loads(path.read_text())["own_randomness"] for path in root.rglob("about.json")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_private_run_is_the_simulation_where_noise_is_drawn_alike(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(standalone, "_key", lambda site, key: key)
    config, prepared, data, found, expected = played(KINDS[kind], tmp_path)
    servers = found.state.server.variables, expected.state.server.variables
    chex.assert_trees_all_close(*servers, rtol=1e-5, atol=1e-6)
    assert secrets(tmp_path) == {kind == "examples"}
    cost = _cost_in_privacy(config, prepared, data, found.state.run)
    if kind == "clients":
        assert cost == {"privacy": expected.privacy}
    else:
        local = local_training(config)
        assert cost == {
            "examples": config.examples.report(prepared, data, local, expected.state, 3)
        }


def test_clients_draw_the_noise_on_their_examples_from_keys_that_the_server_does_not_know(tmp_path):
    _, _, _, found, expected = played(KINDS["examples"], tmp_path)
    servers = found.state.server.variables, expected.state.server.variables
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(*servers, rtol=1e-5, atol=1e-6)
