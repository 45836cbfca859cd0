"""The round program that processes share: federated averaging of an MLP on made-up rows."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
import optax

from jaxfm.data.federation import federate
from jaxfm.federated import Local, Population, compile_rounds, fed_avg, profiles
from jaxfm.federated.algorithm import Algorithm
from jaxfm.models import mlp
from jaxfm.parallel.mesh import make_mesh
from jaxfm.tasks import classification
from scale_parts.clocks import Seconds, timed

WARM = 2  # rounds before the clock starts


class Problem(NamedTuple):
    """Sizes of a round.

    Attributes:
      sizes: units of the MLP's layers.
      batch_size: rows of a step.
      steps: of each client, one pass over its rows.
      clients: on all devices together, all of them in every round.
    """

    sizes: tuple[int, ...]
    batch_size: int
    steps: int
    clients: int

    def algorithm(self) -> Algorithm:
        """Federated averaging with SGD."""
        task = classification(self.sizes[-1])
        return fed_avg(mlp(self.sizes), task, Local(optax.sgd(0.01), self.batch_size))

    def rows(self, count: int) -> dict[str, np.ndarray]:
        """So many images and labels."""
        rng = np.random.default_rng(0)
        image = rng.normal(size=(count, self.sizes[0])).astype(np.float32)
        return {"image": image, "label": rng.integers(0, self.sizes[-1], count, np.int32)}

    def population(self, devices: int) -> Population:
        """Clients that live on devices of their own, evenly."""
        each = self.batch_size * self.steps
        parts = np.arange(each * self.clients).reshape(self.clients, each)
        return Population(
            federate(self.rows(each * self.clients), list(parts)), profiles(self.clients),
            np.zeros(self.clients, np.int32),
            home=np.arange(self.clients) * devices // self.clients,
        )  # fmt: skip


def round_seconds(problem: Problem, rounds: int) -> list[Seconds]:
    """Seconds of each of some rounds on all devices of the job, one client after another."""
    devices = len(jax.devices())
    engine = compile_rounds(
        problem.algorithm(), problem.population(devices), cohort_size=problem.clients,
        mesh=make_mesh(clients=devices), clients_at_once=1,
    )  # fmt: skip
    state = engine.init(mlp(problem.sizes).init(jax.random.key(0)), jax.random.key(1))
    taken = []
    for _ in range(WARM + rounds):
        (state, _), seconds = timed(lambda state=state: engine.run(state))
        taken.append(seconds)
    return taken[WARM:]
