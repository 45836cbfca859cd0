"""The ledger's memory of a client is that of its compiled program."""

import functools

import jax
import numpy as np
import optax
import pytest

from jaxfm import adapters, tasks
from jaxfm.cost import num_bytes
from jaxfm.data.federation import federate
from jaxfm.federated import (
    Local,
    Population,
    client_costs,
    client_data,
    client_memory,
    compiled_costs,
    fed_avg,
    profiles,
)
from jaxfm.federated.accounting.resources import fleet
from jaxfm.federated.client import first_memory, send
from jaxfm.federated.placement import place
from jaxfm.testing import tiny_decoder

BATCH, LENGTH, KEY = 8, 32, jax.random.key(0)
LORA = functools.partial(adapters.lora, rank=2, targets="linear")
METHODS = {
    "full": (tiny_decoder(), 0),
    "microbatch": (tiny_decoder(), 2),
    "recomputed": (tiny_decoder(remat=True), 0),
    "lora": (LORA(tiny_decoder()), 0),
    "lora in pieces": (LORA(tiny_decoder()), 2),
    "lora of 4 bits": (LORA(adapters.quantized(tiny_decoder(), "nf4")), 0),
    "prompt": (adapters.soft_prompt(tiny_decoder(), 4), 0),
    "head": (adapters.head_only(tiny_decoder()), 0),
}


def people(batches: int = 2) -> Population:
    rows = np.random.default_rng(0).integers(0, 20, (2 * batches * BATCH, LENGTH + 1))
    data = federate({"tokens": rows.astype(np.int32)}, np.split(np.arange(len(rows)), 2))
    return Population(data, profiles(2), np.zeros(2, np.int32))


@functools.cache
def algorithm_of(name: str):
    model, rows = METHODS[name]
    return fed_avg(model, tasks.causal_lm(), Local(optax.adam(0.01), BATCH, microbatch=rows))


def shapes(name: str):
    return jax.eval_shape(METHODS[name][0].init, KEY)


@pytest.mark.parametrize("name", METHODS)
def test_the_ledger_agrees_with_the_program_that_a_client_runs(name):
    """Within a tenth of what the compiler says of the program on a client's own rows."""
    algorithm = algorithm_of(name)
    (bucket,) = algorithm.buckets
    download = send(bucket, algorithm.init(METHODS[name][0].init(KEY)))
    data, profile = client_data(people(), 0)
    memory = first_memory(bucket, download, data, profile, KEY)
    program = jax.jit(bucket.client).lower(download, memory, data, profile, KEY).compile()
    told = program.memory_analysis()
    whole = told.argument_size_in_bytes + told.temp_size_in_bytes + told.output_size_in_bytes
    (cost,) = compiled_costs(algorithm, people(), shapes(name))
    assert cost.memory_bytes == pytest.approx(whole - num_bytes(data), rel=0.1)


def test_pieces_and_recomputed_layers_save_activations_and_frozen_weights_state():
    working, held = {}, {}
    for name in METHODS:
        (own,) = client_memory(algorithm_of(name), people(), shapes(name))
        working[name], held[name] = own.working, own.held
        (state,) = client_costs(algorithm_of(name), people(), shapes(name))
        assert own.total > state.memory_bytes  # activations come on top of the state
    assert working["microbatch"] < 0.5 * working["full"]
    assert working["lora in pieces"] < 0.5 * working["lora"]
    assert working["recomputed"] < 0.7 * working["full"]
    assert working["head"] < working["prompt"] < working["full"]
    assert held["lora of 4 bits"] < 0.8 * held["lora"]


def test_rows_of_others_are_not_a_clients_memory():
    algorithm = algorithm_of("head")
    few, many = (client_memory(algorithm, people(n), shapes("head"))[0] for n in (2, 60))
    assert many.held == few.held
    assert many.working - few.working < 60 * BATCH * 16  # its own order of rows alone


def test_a_machine_must_hold_activations():
    """A phone that could hold the state of a model is not given it, if its program is larger."""
    algorithm, data = algorithm_of("full"), people().federation
    needs = compiled_costs(algorithm, people(), shapes("full"))[0].memory_bytes
    steps = np.full(2, 2)
    machines = fleet(("phone",), 2)
    for room, fits in ((1.01 * needs, True), (0.99 * needs, False)):
        own = machines._replace(memory_bytes=np.full(2, room))
        go = functools.partial(place, algorithm, data, shapes("full"), machines=own, steps=steps)
        if fits:
            assert go().costs[0].memory_bytes == needs
        else:
            with pytest.raises(ValueError, match="bytes of memory; the smallest model needs"):
                go()
