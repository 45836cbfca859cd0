"""What differential privacy costs in accuracy, and what attacks get with it and without it.

    python benchmarks/privacy.py

Handwritten digits at many clients of a few rows each, a linear model, federated averaging by
Poisson cohorts, with the same clipping norm, cohorts and rounds at every epsilon. Then privacy of
examples: DP-SGD on ten clients of 20 digits and a canary each, a network that learns these by
heart, and attacks on it: which rows it was trained on (by their losses), and how well it knows the
canaries, images of noise with a label drawn at random. At last an image and a text are read off
the gradient of a single row. The last line is one JSON object:

- dp8_accuracy_drop: test accuracy at an infinite epsilon (clipped, without noise) less that at 8;
- accuracy: by epsilon, the mean over seeds, with the spread over these, and of federated averaging
  without clipping ("plain");
- noise_multipliers: what epsilon 8 asks for, by way of sampling and accountant;
- round_ratio: seconds of a private round over those of a plain one;
- dp_sgd: by epsilon of an example, accuracy, "advantage" (0: members cannot be told) and "exposure"
  (1 bit: a canary is as unknown as any other; at most 9);
- inversion: as `privacy_parts.leaks.inverted` says, "private" with the noise of epsilon 8.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time

import jax
import numpy as np
import optax
from privacy_parts import leaks

from jaxfm import config as configs
from jaxfm import tasks
from jaxfm.config import check, option
from jaxfm.data import digits, partition
from jaxfm.data.federation import federate
from jaxfm.federated import Local, Population, compile_rounds, fed_avg, profiles
from jaxfm.federated.accounting.epsilon import Sampling
from jaxfm.federated.accounting.privacy import Privacy, plan_privacy
from jaxfm.federated.wrappers.private import with_privacy
from jaxfm.models import mlp

EPSILONS = (1.0, 3.0, 8.0, math.inf)
MODEL, TASK = mlp((64, 10)), tasks.classification(10)
LOCAL = Local(optax.sgd(1.0), 4, 2)
CLIP, DELTA = 4.0, 1e-3  # delta below one in 600 clients


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    quick: bool = option(False, "fewer clients and rounds, and one seed: figures without meaning")
    num_clients: int = option(600, "clients, each with about two rows")
    cohort_size: int = option(150, "clients drawn a round, on average")
    rounds: int = option(40, "rounds in all")
    seeds: int = option(3, "runs of each")
    example_rounds: int = option(60, "rounds of DP-SGD")

    def __post_init__(self):
        check(self)


def run(algorithm, data: Population, config: Config, seed: int) -> tuple[float, float]:
    """(test accuracy, seconds of a round)."""
    engine = compile_rounds(algorithm, data, cohort_size=config.cohort_size)
    key = jax.random.key(seed)
    state, _ = engine.run(engine.init(MODEL.init(jax.random.key(seed + 100)), key))
    jax.block_until_ready(state)
    began = time.perf_counter()
    for _ in range(config.rounds - 1):
        state, _ = engine.run(state)
    jax.block_until_ready(state)
    seconds = (time.perf_counter() - began) / max(config.rounds - 1, 1)
    test = digits()["test"].examples
    metrics = tasks.evaluate(MODEL.apply, state.server.variables, TASK, test, 50)
    return metrics["accuracy"], seconds


def planned(config: Config, epsilon: float) -> Privacy:
    """The noise of a run; an infinite epsilon asks for none."""
    sampling = Sampling(config.num_clients, config.cohort_size, "poisson")
    if math.isinf(epsilon):
        return Privacy(0.0, DELTA, epsilon, None, sampling)
    return plan_privacy(sampling, delta=DELTA, epsilon=epsilon, rounds=config.rounds)


def multipliers(config: Config) -> dict[str, float]:
    """The noise that epsilon 8 asks for, by sampling and accountant."""
    ways: dict[str, tuple] = {
        f"{kind}, {accountant}": (kind, True, accountant)
        for kind in ("poisson", "fixed")
        for accountant in ("pld", "rdp")
    }
    ways["not secret, pld"] = ("fixed", False, "pld")
    found = {}
    for name, (kind, secret, accountant) in ways.items():
        sampling = Sampling(config.num_clients, config.cohort_size, kind, secret)
        privacy = plan_privacy(
            sampling, delta=DELTA, epsilon=8.0, rounds=config.rounds, accountant=accountant
        )
        found[name] = round(privacy.noise_multiplier, 3)
        print(f"epsilon 8 asks for noise of {found[name]} clipping norms: {name}")
    return found


def main(config: Config) -> None:
    """Runs every epsilon, and prints the line."""
    if config.quick:
        config = dataclasses.replace(
            config, num_clients=200, cohort_size=50, rounds=6, seeds=1, example_rounds=4
        )
    rows = digits()["train"].examples
    accuracy: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    for seed in range(config.seeds):
        clients = partition.iid(len(rows["label"]), config.num_clients, seed=seed)
        people = Population(
            federate(rows, clients),
            profiles(config.num_clients),
            np.zeros(config.num_clients, np.int32),
        )
        plain = fed_avg(MODEL, TASK, LOCAL)
        arms = {"plain": plain}
        for epsilon in EPSILONS:
            arms[f"{epsilon:g}"] = with_privacy(plain, planned(config, epsilon), clip=CLIP)
        for name, algorithm in arms.items():
            reached, took = run(algorithm, people, config, seed)
            accuracy.setdefault(name, []).append(reached)
            seconds.setdefault(name, []).append(took)
            print(
                f"seed {seed}, epsilon {name}: accuracy {reached:.3f}, {took * 1e3:.1f} ms a round"
            )
    mean = {name: round(float(np.mean(x)), 4) for name, x in accuracy.items()}
    line = {
        "name": "privacy",
        "dp8_accuracy_drop": round(mean["inf"] - mean["8"], 4),
        "accuracy": mean,
        "spread": {name: round(float(np.std(x)), 4) for name, x in accuracy.items()},
        "delta": DELTA,
        "clients": config.num_clients,
        "cohort": config.cohort_size,
        "rounds": config.rounds,
        "noise_multipliers": multipliers(config),
        "round_ratio": round(float(np.median(seconds["8"]) / np.median(seconds["plain"])), 3),
        "dp_sgd": leaks.dp_sgd(
            (8.0,) if config.quick else EPSILONS, config.example_rounds, config.seeds
        ),
        "inversion": leaks.inverted(
            leaks.example_noise(8.0, config.example_rounds), 1 if config.quick else 4
        ),
        "quick": config.quick,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    configs.run(main, Config)
