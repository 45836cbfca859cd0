"""Simulated hours to an accuracy: rounds that wait for their clients, and steps that do not.

    python benchmarks/asynchronous.py [--quick]

Scikit-learn's digits are dealt to clients by Dirichlet(beta) on labels. Their machines are boards,
phones and laptops, whose times differ by a factor of 20 and, each time, by a random factor; they
can be reached for some hours of a day. All arms train the same model with the same local steps and
have the same number of clients at work at a time. Each arm may take one server rate from the same
short list, by the validation split of the first seed; the figures are of the other seeds.

The last line is one JSON object. Figures are simulated hours until the validation accuracy, looked
at forty times, first reaches the target, medians over seeds; "async_time_to_accuracy" is the figure
of the best synchronous arm over that of FedBuff.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxfm import config as configs
from jaxfm.config import check, option
from jaxfm.data.arrays import digits
from jaxfm.data.federation import federate
from jaxfm.data.partition import dirichlet
from jaxfm.federated import Local, Population, client_costs, fed_avg, fleet, fleet_profiles
from jaxfm.federated.asynchronous import (
    Schedule,
    buffered,
    compile_asynchronous,
    constant,
    diurnal,
    polynomial,
    synchronous,
)
from jaxfm.federated.asynchronous.schedule import client_seconds
from jaxfm.models.families.cnn import mlp
from jaxfm.tasks import classification, evaluate

TASK, MODEL = classification(10), mlp((64, 64, 10))


@dataclasses.dataclass(frozen=True)
class AsynchronousConfig:
    """Who there is, and how long it goes on."""

    quick: bool = option(False, "a small case")
    clients: int = option(100, "clients in all")
    at_work: int = option(20, "clients at work at a time, and of a round")
    buffer: int = option(5, "updates of a step of FedBuff")
    updates: int = option(4000, "updates that each arm takes at most")
    beta: float = option(0.3, "concentration of labels")
    target: float = option(0.93, "accuracy that is to be reached")
    hours: float = option(12.0, "of a day in which a client can be reached")
    jitter: float = option(0.3, "deviation of the logarithm of a client's time")
    flops_factor: float = option(2e6, "how much more work a step is than that of this small model")
    seeds: int = option(5, "besides the one that rates are chosen with")

    def __post_init__(self):
        check(self)
        if self.quick:
            small = {"clients": 20, "at_work": 6, "buffer": 2, "updates": 240, "seeds": 1}
            for name, value in (small | {"target": 0.7}).items():
                object.__setattr__(self, name, value)


class Arm(NamedTuple):
    """A way to run: `(config, seconds, when, seed) -> plan`, and how updates are weighed."""

    plan: Callable[..., Schedule]
    staleness: Any
    mixes_models: bool = False


def waiting(more: float = 1.0, deadline: bool = False) -> Callable[..., Schedule]:
    """Synchronous rounds; a deadline is the time by which nine of ten clients would be back."""

    def make(config, seconds, when, seed):
        ends = float(np.quantile(seconds, 0.9)) if deadline else math.inf
        rounds = config.updates // config.at_work
        return synchronous(
            seconds, cohort_size=int(config.at_work / more), num_steps=rounds, more=more,
            deadline_s=ends, when=when, jitter=config.jitter, seed=seed,
        )  # fmt: skip

    return make


def without_waiting(places: Callable[[Any], int]) -> Callable[..., Schedule]:
    """Steps of so many updates each."""

    def make(config, seconds, when, seed):
        return buffered(
            seconds, concurrency=config.at_work, buffer_size=places(config),
            num_steps=config.updates // places(config), when=when, jitter=config.jitter, seed=seed,
        )  # fmt: skip

    return make


ARMS = {
    "synchronous": Arm(waiting(), constant()),
    "over-selection 1.3": Arm(waiting(1.3), constant()),
    "deadline": Arm(waiting(deadline=True), constant()),
    "FedBuff": Arm(without_waiting(lambda config: config.buffer), polynomial(0.5)),
    "FedAsync": Arm(without_waiting(lambda config: 1), polynomial(0.5), mixes_models=True),
}
RATES = (1.0, 0.5, 0.2)


def hours_to_target(config: AsynchronousConfig, arm: Arm, rate: float, seed: int) -> float:
    """Simulated hours until the validation accuracy reaches the target; inf if it never does."""
    splits = digits(seed=seed)
    train, validation = splits["train"].examples, splits["validation"].examples
    rows = dirichlet(train["label"], config.clients, beta=config.beta, seed=seed)
    machines = fleet(("pi", "phone", "laptop"), config.clients)
    population = Population(
        federate(train, rows), fleet_profiles(machines), np.zeros(config.clients, np.int32)
    )
    algorithm = fed_avg(MODEL, TASK, Local(optax.sgd(0.1), batch_size=8, epochs=2))
    variables = MODEL.init(jax.random.key(seed))
    (cost,) = client_costs(algorithm, population, variables)
    large = cost._replace(flops_per_step=cost.flops_per_step * config.flops_factor)
    steps = 2 * -(-np.asarray(population.federation.count) // 8)
    seconds = client_seconds(machines, large, np.maximum(steps, 1))
    when = diurnal(config.clients, hours=config.hours, seed=seed)
    plan = arm.plan(config, seconds, when, seed)
    chunk = max(1, len(plan.client) // 40)
    rounds = compile_asynchronous(
        algorithm, population, plan, num_rounds=chunk,
        staleness=arm.staleness, rate=rate, mixes_models=arm.mixes_models,
    )  # fmt: skip
    state = rounds.init(variables, jax.random.key(seed))
    for first in range(0, len(plan.client) - chunk + 1, chunk):
        state, _ = rounds.run(state)
        found = evaluate(MODEL.apply, state.server.variables, TASK, validation, 64)
        if found["accuracy"] >= config.target:
            return float(plan.seconds[first + chunk - 1]) / 3600
    return math.inf


def main(config: AsynchronousConfig) -> None:
    """Runs all arms and prints their hours."""
    start, table = time.monotonic(), {}
    for name, arm in ARMS.items():
        tried = {rate: hours_to_target(config, arm, rate, seed=0) for rate in RATES}
        rate = min(tried, key=lambda rate: (tried[rate], -rate))
        hours = [hours_to_target(config, arm, rate, seed) for seed in range(1, config.seeds + 1)]
        table[name] = float(np.median(hours))
        each = ", ".join(f"{h:.3g}" for h in hours)
        print(f"{name:20} rate {rate:.1f}: {table[name]:8.3g} hours ({each})", flush=True)
    waits = min(table[name] for name in ("synchronous", "over-selection 1.3", "deadline"))
    ratio = waits / table["FedBuff"] if math.isfinite(waits) else None
    finite = {name: hours if math.isfinite(hours) else None for name, hours in table.items()}
    print(f"{time.monotonic() - start:.0f} s on {jax.devices()[0].device_kind}")
    result = {"name": "asynchronous", "async_time_to_accuracy": ratio, "hours": finite}
    print(json.dumps(result | {"settings": configs.to_dict(config)}))


if __name__ == "__main__":
    configs.run(main, AsynchronousConfig)
