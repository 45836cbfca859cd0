"""The toy algorithm in the docstring of the contract runs, and averages."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.data.federation import federate
from jaxfm.federated.accounting.resources import profiles
from jaxfm.federated.population import Population
from jaxfm.federated.rounds import compile_rounds
from jaxfm.model import Variables


def test_the_toy_of_the_contract_is_a_mean():
    # Not jaxfm.federated.algorithm by attribute: the package may give that name to the class.
    module = importlib.import_module("jaxfm.federated.algorithm")
    found = doctest.DocTestFinder(recurse=False).find(module, globs=dict(vars(module)))
    (example,) = [test for test in found if test.examples]
    runner = doctest.DocTestRunner()
    runner.run(example, clear_globs=False)
    assert runner.summarize().failed == 0 and runner.summarize().attempted > 0
    toy = example.globs["toy"]

    x = np.array([1.0, 1.0, 1.0, 4.0, 4.0, 4.0], np.float32)
    data = federate({"x": x}, [np.arange(3), np.arange(3, 6)])
    engine = compile_rounds(toy, Population(data, profiles(2), np.zeros(2, int)), cohort_size=2)
    start = Variables({"x": jnp.zeros(())}, {}, {})
    state, _ = engine.run(engine.init(start, jax.random.key(0)))
    assert float(state.server.variables.params["x"]) == 2.5
