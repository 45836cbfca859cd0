"""What a run's checkpoints cost it: the same rounds with a run folder and without, in turn.

Both are `jaxfm.federated.playing.play`, what every run is played by. A run may save every `every`
rounds, and does where the last save is long enough ago, and at its end: its state is copied off the
device, and written in the background (Orbax) while the next rounds compute. Neither side evaluates.
The folder's log is written by the side that saves.
"""

from __future__ import annotations

import contextlib
import io
import math
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.checkpoint import Checkpointer
from jaxfm.cost import num_bytes
from jaxfm.federated import compile_rounds
from jaxfm.federated.outcome import no_account
from jaxfm.federated.playing import Script, play
from jaxfm.models import mlp
from jaxfm.parallel.mesh import make_mesh
from scale_parts.clocks import CLOCKS, Seconds, timed
from scale_parts.problem import Problem


def measure(problem: Problem, lasting: float, every: int, pairs: int) -> dict[str, Any]:
    """The share of the rounds' time that saves take.

    Args:
      problem: of the rounds.
      lasting: seconds of each run, about.
      every: rounds between saves, at least.
      pairs: of runs, with and without, the order turned round each time.
    Returns:
      By clock, "overhead", the median over pairs of (with - without) / without; "round", seconds
      of one without; "added_a_save", seconds; "call", seconds that `Checkpointer.save` keeps a
      run waiting where the last save is done; "mib" of a checkpoint's arrays; and of a run, its
      "rounds" and its "saves" (the median).
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

    def played(folder: pathlib.Path | None, rounds: int) -> Seconds:
        """Of a whole run; its last save is waited for, as in every run."""
        state = jax.block_until_ready(jax.tree.map(jnp.copy, first))
        with contextlib.redirect_stdout(io.StringIO()):
            return timed(
                lambda: play(
                    script, state, no_account(problem.clients), length=rounds, eval_every=every,
                    names=names, run_dir=folder,
                ).state
            )[1]  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        place = lambda k: pathlib.Path(folder, str(k))
        played(place("warm"), every)
        a_round = played(None, every)["wall"] / every
        rounds = max(2 * every, math.ceil(lasting / a_round))
        taken, saves = [], []
        for k in range(pairs):
            order = (None, place(k)) if k % 2 else (place(k), None)
            with counted() as count:
                times = {where is None: played(where, rounds) for where in order}
            taken.append((times[False], times[True]))
            saves.append(len(count))
        call = _call_seconds(first, place("calls"), pairs + 2)
    made = statistics.median(saves)
    of = lambda read, clock: statistics.median(read(a[clock], b[clock]) for a, b in taken)
    return {
        "overhead": {clock: of(lambda a, b: a / b - 1, clock) for clock in CLOCKS},
        "round": {clock: of(lambda _, b: b / rounds, clock) for clock in CLOCKS},
        "added_a_save": {clock: of(lambda a, b: (a - b) / made, clock) for clock in CLOCKS},
        "call": call,
        "mib": num_bytes(jax.tree.map(_plain, first)) / 2**20,
        "rounds": rounds,
        "saves": made,
    }


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """Yields a list, to which every save within adds its step."""
    steps: list[int] = []
    save = Checkpointer.save

    def noted(self: Checkpointer, step: int, tree: Any) -> None:
        steps.append(step)
        save(self, step, tree)

    with mock.patch.object(Checkpointer, "save", noted):
        yield steps


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
