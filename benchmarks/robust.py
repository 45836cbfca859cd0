"""What robust rules hold: accuracy with 30% adversaries of each kind, beside the plain mean.

    python benchmarks/robust.py [--quick]

Scikit-learn's digits are dealt to clients by Dirichlet(beta) on labels; 97 rows are the server's
own, for FLTrust. All clients take part in every round, so the share of adversaries is the same in
all; the rules are told that share. Adversaries are drawn by seed, and the attacks are:

- sign_flip: three times the movement, backwards; scaling: twenty times the movement;
- gaussian: noise in the place of the movement, of deviation 1;
- inner_product: the mean of the honest, backwards, twice; little_is_enough: as published;
- label_flip: class 9 - y for y; backdoor: half of the rows with a bright square, labelled 0, and
  the movement five times. "backdoor_success" is the share of test images of other classes that are
  taken for 0 once they hold the square.

Every rule is one compiled program for all attacks: who attacks, and how, is data. Accuracies are of
test images after the last round, means over seeds. The last line is one JSON object:
"robust_accuracy_drop" is the clean accuracy of the mean less that of the best single rule under the
attack that hurts it most, in points, and "mean_accuracy_drop" the same of the plain mean.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxfm import config as configs
from jaxfm.config import check, option
from jaxfm.data.arrays import digits
from jaxfm.data.federation import Federation, federate, of_one_shape
from jaxfm.data.partition import dirichlet
from jaxfm.federated import (
    Algorithm,
    Local,
    Population,
    Rounds,
    compile_rounds,
    fed_avg,
    profiles,
    with_robust,
)
from jaxfm.federated.wrappers import attacks
from jaxfm.federated.wrappers import robust_rules as rules
from jaxfm.model import Variables
from jaxfm.models.families.cnn import mlp
from jaxfm.tasks import classification, evaluate

TASK = classification(10)
MODEL = mlp((64, 64, 10))
TRIGGER = attacks.patch(0, size=2)
UPLOADS: dict[str, attacks.Attack] = {
    "sign_flip": attacks.sign_flip(3.0),
    "scaling": attacks.scaling(20.0),
    "gaussian": attacks.gaussian(1.0),
    "inner_product": attacks.inner_product(2.0),
    "little_is_enough": attacks.little_is_enough(),
    "backdoor": attacks.scaling(5.0),
}
KINDS = ("none", *list(UPLOADS)[:-1], "label_flip", "backdoor")
QUICK_RULES = ("mean", "trimmed_mean", "multi_krum")
QUICK_KINDS = ("none", "sign_flip", "little_is_enough", "label_flip", "backdoor")


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    quick: bool = option(False, "some rules and attacks, few rounds, one seed")
    num_rounds: int = option(60, "rounds of each run")
    num_clients: int = option(20, "clients, all in every round")
    num_seeds: int = option(3, "partitions, adversaries and initial weights")
    share: float = option(0.3, "adversaries among the clients")
    beta: float = option(1.0, "of the Dirichlet distribution of labels")

    def __post_init__(self):
        check(self)
        if self.num_rounds < 1 or self.num_seeds < 1 or self.num_clients < 4:
            raise ValueError(f"Give at least one round and seed and 4 clients, not {self}.")
        if not 0 < self.share < 0.5:
            raise ValueError(f"share={self.share} must be above 0 and below 0.5.")


class Work(NamedTuple):
    """Rows of the clients, of the server, and of the test."""

    clients: Mapping[str, np.ndarray]
    root: Mapping[str, np.ndarray]
    test: Mapping[str, np.ndarray]


class Figures(NamedTuple):
    """Accuracies and success rates by seed."""

    accuracy: list[float]
    backdoor: list[float]


def load() -> Work:
    """The digits; the last training rows are the server's."""
    data = digits()
    train = data["train"].examples
    part = lambda rows: {name: leaf[rows] for name, leaf in train.items()}
    return Work(part(slice(0, 1200)), part(slice(1200, None)), data["test"].examples)


def contenders(config: Config, work: Work) -> dict[str, Callable[[Algorithm], Algorithm]]:
    """What is put around federated averaging, by name."""
    around = lambda rule: lambda algorithm: with_robust(algorithm, rule)
    # The server's row of an adversary's mark: it is none.
    root = {**work.root, attacks.MARK: np.zeros(len(work.root["label"]), np.int32)}
    return {
        "mean": lambda algorithm: algorithm,
        "median": around(rules.median),
        "trimmed_mean": around(rules.trimmed_mean(config.share)),
        "norm_bound": around(rules.norm_bound()),
        "krum": around(rules.krum(config.share)),
        "multi_krum": around(rules.multi_krum(config.share)),
        "geometric_median": around(rules.geometric_median()),
        "fl_trust": lambda algorithm: with_robust(algorithm, rules.fl_trust, root=root),
    }


def poisoned(federation: Federation, kind: str, liars: np.ndarray, seed: int) -> Federation:
    """The federation with some clients that attack in one way; all of one shape."""
    if kind == "label_flip":
        federation = attacks.flipped_labels(federation, liars, 10)
    if kind == "backdoor":
        federation = attacks.backdoored(federation, liars, TRIGGER, seed=seed)
    acts = kind in UPLOADS
    return attacks.marked(
        federation, liars if acts else (), list(UPLOADS).index(kind) if acts else 0
    )


def clients_of(work: Work, config: Config) -> list[tuple[Federation, np.ndarray]]:
    """By seed, a partition of the rows and who are the adversaries."""
    parts = [
        dirichlet(
            work.clients["label"], config.num_clients, beta=config.beta, seed=s, min_examples=10
        )
        for s in range(config.num_seeds)
    ]
    count = round(config.share * config.num_clients)
    draw = lambda s: np.random.default_rng(s).permutation(config.num_clients)[:count]
    federations = of_one_shape([federate(work.clients, part) for part in parts])
    return [(federation, draw(s)) for s, federation in enumerate(federations)]


def measure(engine: Rounds, people: Population, work: Work, seed: int, figures: Figures) -> None:
    """Runs all rounds of one seed, and notes what came of it."""
    start = jax.jit(MODEL.init)(jax.random.key(seed))
    state, _ = engine.run(engine.init(start, jax.random.key(100 + seed)), people)
    variables: Variables = state.server.variables
    # A plain mean may have been driven to infinity.
    score = evaluate(MODEL.apply, variables, TASK, work.test, 500)
    figures.accuracy.append(score["accuracy"])
    figures.backdoor.append(
        attacks.backdoor_success(MODEL, variables, TASK, work.test, TRIGGER, batch_size=500)
    )


def measured(config: Config) -> dict[str, Any]:
    """Every rule under every attack."""
    began = time.perf_counter()
    if config.quick:
        config = dataclasses.replace(config, num_rounds=min(config.num_rounds, 20), num_seeds=1)
    work, table = load(), {}
    federations = clients_of(work, config)
    local = Local(optax.sgd(0.2), 16, 1)
    machines, bucket = profiles(config.num_clients), np.zeros(config.num_clients, np.int32)
    for rule, wrap in contenders(config, work).items():
        if config.quick and rule not in QUICK_RULES:
            continue
        algorithm = attacks.with_attack(wrap(fed_avg(MODEL, TASK, local)), *UPLOADS.values())
        people = lambda kind, s: Population(
            poisoned(federations[s][0], kind, federations[s][1], s), machines, bucket
        )
        engine = compile_rounds(
            algorithm, people("none", 0), cohort_size=config.num_clients,
            num_rounds=config.num_rounds,
        )  # fmt: skip
        for kind in QUICK_KINDS if config.quick else KINDS:
            figures = Figures([], [])
            for seed in range(config.num_seeds):
                measure(engine, people(kind, seed), work, seed, figures)
            table[rule, kind] = tuple(round(100 * float(np.mean(x)), 2) for x in figures)
            print(f"{rule}, {kind}: {table[rule, kind]} ({time.perf_counter() - began:.0f} s)")
    return summary(table)


def summary(table: dict[tuple[str, str], tuple[float, ...]]) -> dict[str, Any]:
    """The figures of all runs, and what the best single rule loses in its worst case."""
    names = list(dict.fromkeys(rule for rule, _ in table))
    accuracy = {
        rule: {kind: value[0] for (name, kind), value in table.items() if name == rule}
        for rule in names
    }
    clean = accuracy["mean"]["none"]
    drops = {rule: round(clean - min(row.values()), 2) for rule, row in accuracy.items()}
    best = min((rule for rule in names if rule != "mean"), key=drops.__getitem__)
    return {
        "name": "robust",
        "robust_accuracy_drop": drops[best],
        "best_rule": best,
        "mean_accuracy_drop": drops["mean"],
        "clean_accuracy": clean,
        "worst_drop": drops,
        "accuracy": accuracy,
        "backdoor_success": {rule: table[rule, "backdoor"][1] for rule in names},
    }


def main(config: Config) -> None:
    print(json.dumps(measured(config)))


if __name__ == "__main__":
    configs.run(main, Config)
