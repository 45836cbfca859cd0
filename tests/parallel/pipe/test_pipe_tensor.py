"""Laws of a pipe whose stages are split over devices: the same tokens, each with its share."""

import json
import os
import subprocess
import sys

import pytest

from jaxfm.parallel import make_mesh
from jaxfm.parallel.pipe.pipeinfer import pipelined
from jaxfm.testing import random_variables, tiny_decoder

SPLIT = """
import collections, json, re
import jax
from jaxfm.parallel import generate, make_mesh, plain
from jaxfm.parallel.drafters.model import early_exit_drafter
from jaxfm.parallel.simulation.xla_copy_probe import count_copies, tick_program
from jaxfm.parallel.generation import advance
from jaxfm.parallel.pipe.pipeinfer import pipeinfer
from jaxfm.testing import random_variables, tiny_decoder

model = tiny_decoder(num_layers=4)
variables = random_variables(model)
made = pipeinfer(model, variables, early_exit_drafter(model, variables, 2),
                 mesh=make_mesh(stage=2, tensor=2), split=(3, 1))
prompt, settings = [[3, 1, 4, 1, 5]], {"max_new_tokens": 24, "ticks": 7}
truth = generate(plain(model, variables), prompt, **settings).tokens[0]
before = advance._cache_size()
got = generate(made, prompt, **settings)
programs = advance._cache_size() - before

text, state = tick_program(made)
kinds = "all-|reduce-scatter|collective-|ragged-"
sent = re.findall(rf"= .* ((?:{kinds})[a-z-]*?)(?:-start)?\\(", text)
layer = made.variables.cut.layers.params["0"]
shapes = lambda x: [x.shape, x.sharding.shard_shape(x.shape)]
print(json.dumps({
    "same": got.tokens[0].tolist() == truth.tolist(), "right": int(got.stats.accepted.sum()),
    "ticks": int(got.counters.ticks), "programs": programs,
    "copies": count_copies(text, state), "sent": collections.Counter(sent),
    "rows": [shapes(leaf) for leaf in jax.tree.leaves(state.rows)],
    "query": shapes(layer["attention"]["q"]["kernel"]),
    "down": shapes(layer["mlp"]["down"]["kernel"]),
}))
"""


@pytest.mark.slow
def test_two_stages_of_two_devices_each():
    """Two sums a layer within a stage, one message and one sum between stages, nothing else."""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    env = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", SPLIT], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["same"] and seen["right"] > 0
    assert seen["ticks"] == (24 - seen["right"]) * 2 + seen["right"] + 1
    assert seen["programs"] == 1 and seen["copies"] == 0
    assert seen["sent"] == {"all-reduce": 3 * 2 + 1, "collective-permute": 1}
    # Keys and values of 3 layers: 2 heads in each of 2 stages, 128 cells and 32 of the tree.
    assert seen["rows"] == [[[4, 160, 4], [1, 160, 4]]] * 3 * 2
    assert seen["query"] == [[2, 16, 2, 2, 4], [1, 16, 1, 2, 4]]
    assert seen["down"] == [[2, 24, 16], [1, 12, 16]]


@pytest.mark.parametrize(
    "sizes, message",
    [({"num_kv_heads": 1}, "'kv_heads' of size 1"), ({"mlp_dim": 9}, "'mlp' of size 9")],
)
def test_what_does_not_divide_is_refused(sizes, message):
    model = tiny_decoder(**sizes)
    with pytest.raises(ValueError, match=f"{message} does not divide over the tensor=2 devices"):
        pipelined(model, random_variables(model), mesh=make_mesh(tensor=2))
