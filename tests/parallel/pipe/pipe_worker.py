"""One stage of a pipe in a process of its own.

    python pipe_worker.py HOST:PORT PROCESS [--die]

Prints the tokens that the whole pipe decodes; with `--die` the process ends itself in the middle.
"""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (  # the last of a flag counts
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=1"
)

import jax

coordinator, process = sys.argv[1], int(sys.argv[2])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(
    coordinator, 2, process, initialization_timeout=60, heartbeat_timeout_seconds=10
)

from jaxfm.parallel import make_mesh, stream  # noqa: E402
from jaxfm.parallel.drafters.model import early_exit_drafter  # noqa: E402
from jaxfm.parallel.pipe.pipeinfer import pipeinfer  # noqa: E402
from jaxfm.testing import random_variables, tiny_decoder  # noqa: E402

model = tiny_decoder(num_layers=3)
variables = random_variables(model)
decoder = pipeinfer(
    model, variables, early_exit_drafter(model, variables, 1), mesh=make_mesh(stage=2)
)
pieces = stream(decoder, [[1, 2, 3, 4, 5]], max_new_tokens=24, ticks=4)
while True:
    try:
        next(pieces)
        if "--die" in sys.argv and process == 1:
            os._exit(7)
    except StopIteration as stop:
        print("tokens", stop.value.tokens[0].tolist(), "ticks", int(stop.value.counters.ticks))
        break
