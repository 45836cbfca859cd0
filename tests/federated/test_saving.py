"""The model of a run as a folder: the one that its test figures are of."""

from types import SimpleNamespace

import chex
import jax
import optax
import pytest

from jaxfm import hub, tasks
from jaxfm.data import digits
from jaxfm.data.dealing import deal_out
from jaxfm.federated import Local, prepare, save_model
from jaxfm.models import mlp
from jaxfm.testing import random_variables

MODEL = mlp((64, 8, 10))


def test_what_is_written_is_the_model_that_was_scored(tmp_path):
    data = deal_out(digits(), tasks.classification(10), num_clients=3)
    start = hub.pretrained(MODEL, random_variables(MODEL))
    ready = prepare("hetero_fl", start, data, Local(optax.sgd(0.1), 16), num_rounds=1)
    algorithm = ready.algorithm
    server = algorithm.init(ready.variables)
    for scored, units in ((0, 8), (1, 4), (None, 8)):
        result = SimpleNamespace(state=SimpleNamespace(server=server), scored=scored)
        save_model(algorithm, result, data, tmp_path / "model")
        _, variables = hub.load(tmp_path / "model")
        assert variables.params["dense1"]["kernel"].shape == (64, units)
        expected = server.variables if scored is None else algorithm.buckets[scored].shared(server)
        chex.assert_trees_all_equal(variables, jax.device_get(expected))
    assert '"classes": [\n    "0",' in (tmp_path / "model" / "config.json").read_text()
    with pytest.raises(ValueError, match="clients keep models of their own"):
        save_model(algorithm._replace(model=None), result, data, tmp_path / "none")
