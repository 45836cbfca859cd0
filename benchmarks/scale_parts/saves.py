"""What a run's checkpoints cost it: the same rounds with a run folder and without, in turn.

Both are `jaxfm.federated.playing.play`, what every run is played by. A run saves every `every`
rounds: its state is copied off the device, and written in the background (Orbax) while the next
rounds compute. Neither side evaluates. The folder's log is written by the side that saves.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from scale_parts.problem import Problem

from jaxfm.checkpoint import Checkpointer
from jaxfm.cost import num_bytes
from jaxfm.federated import compile_rounds
from jaxfm.federated.outcome import no_account
from jaxfm.federated.playing import Script, play
from jaxfm.models import mlp
from jaxfm.parallel.mesh import make_mesh


def measure(problem: Problem, rounds: int, every: int, pairs: int) -> dict[str, float]:
    """The share of the rounds' time that saves take.

    Args:
      problem: of the rounds.
      rounds: of each run.
      every: rounds between saves.
      pairs: of runs, with and without, the order turned round each time.
    Returns:
      "overhead", the median over pairs of (with - without) / without; "seconds" of a round without;
      "call", seconds that `Checkpointer.save` keeps a run waiting where the last save is done;
      "mib" of a checkpoint's arrays.
    """
    devices = len(jax.devices())
    engine = compile_rounds(
        problem.algorithm(), problem.population(devices), cohort_size=problem.clients,
        mesh=make_mesh(clients=devices), clients_at_once=1,
    )  # fmt: skip
    first = engine.init(mlp(problem.sizes).init(jax.random.key(0)), jax.random.key(1))
    names = [f"client {i}" for i in range(problem.clients)]

    def advance(number, state, account):
        state, _ = engine.run(state)
        return jax.block_until_ready(state), account, {"train/loss": 0.0}

    script = Script(advance, lambda state: {}, lambda state: state.server)

    def seconds(folder: pathlib.Path | None) -> float:
        """Of a whole run; its last save is waited for, as in every run."""
        state = jax.tree.map(jnp.copy, first)
        began = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            play(script, state, no_account(problem.clients), length=rounds, eval_every=every,
                 names=names, run_dir=folder)  # fmt: skip
        return time.perf_counter() - began

    with tempfile.TemporaryDirectory() as folder:
        place = lambda k: pathlib.Path(folder, str(k))
        seconds(None), seconds(place("warm"))
        taken = []
        for k in range(pairs):
            order = (None, place(k)) if k % 2 else (place(k), None)
            times = {where is None: seconds(where) for where in order}
            taken.append((times[False], times[True]))
        call = _call_seconds(first, place("calls"), pairs + 2)
    return {
        "overhead": statistics.median(a / b - 1 for a, b in taken),
        "seconds": statistics.median(b for _, b in taken) / rounds,
        "added_a_save": statistics.median(a - b for a, b in taken) * every / rounds,
        "call": call,
        "mib": num_bytes(jax.tree.map(_plain, first)) / 2**20,
    }


def _call_seconds(state, folder: pathlib.Path, count: int) -> float:
    taken = []
    with Checkpointer(folder, keep=2) as checkpoints:
        for step in range(count):
            began = time.perf_counter()
            checkpoints.save(step, (state, no_account(1)))
            taken.append(time.perf_counter() - began)
            checkpoints.wait()
    return statistics.median(taken[1:])


def _plain(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf)) if is_key else leaf
