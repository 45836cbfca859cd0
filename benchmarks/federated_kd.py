"""What distillation buys: bytes and accuracy of FedKEMF, FedDF, FedMD and RaFL beside FedAvg.

    python benchmarks/federated_kd.py [--quick] [--data_dir=FOLDER]

Images of digits (scikit-learn's, or MNIST from its idx files) are dealt to clients by
Dirichlet(0.1) on labels; some are public and unlabelled. All algorithms get the same images. Every
algorithm runs with each of the same learning rates of the clients, and of the server where it
distills, and the rates that are best on validation images are kept; figures are of test images,
means over the last three rounds and over seeds of partition and weights. Half of the clients take
part in a round. The algorithms are:

- fedavg, feddf: the large network travels; fedavg_small, feddf_small: only the knowledge network;
- fedkemf: the knowledge network travels, and clients own one of two large ones; fedkemf_4bit: the
  same in 4 bits both ways; fedkemf_average: without public data; fedkemf_noise: with smooth random
  images in place of public ones, which nobody has to hold;
- fedmd: the same large networks, whose logits travel; its accuracy is that of a knowledge network
  which learns the final consensus;
- rafl: members of a supernet in three tiers of budgets, of which the smallest travels;
  rafl_average: without public data.

"clients" is the mean accuracy of the clients' own networks on all test images. The last line is one
JSON object: "fedkemf_bytes_saving" is FedAvg's bytes over FedKEMF's, "fedkemf_4bit_bytes_saving"
over those of its 4-bit form, and "rafl_distillation_gain" the accuracy of rafl minus that of
rafl_average, in points.
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
from jaxfm.data.idx import mnist
from jaxfm.data.noise import smooth_noise
from jaxfm.data.partition import dirichlet
from jaxfm.federated import (
    Algorithm,
    Distill,
    Local,
    Population,
    client_costs,
    client_metrics,
    compile_rounds,
    coverage_vote,
    fed_avg,
    fed_df,
    fed_kemf,
    fed_md,
    profiles,
    quantised,
    rafl,
    round_costs,
    with_compression,
)
from jaxfm.federated.algorithms.rafl import plan_members
from jaxfm.federated.parts.ensemble import learn
from jaxfm.model import Model, Variables
from jaxfm.models.families.cnn import mlp
from jaxfm.search.elastic.supernet import supernet
from jaxfm.search.strategies.project import Budget
from jaxfm.tasks import classification
from jaxfm.tasks.evaluation import evaluate

TASK = classification(10)
VOTE = coverage_vote(10)
# The algorithms whose server learns at a rate of its own.
DISTILLED = ("feddf", "feddf_small", "fedkemf", "fedkemf_4bit", "fedkemf_noise", "rafl")
LAST = 3  # rounds whose mean counts


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    quick: bool = option(False, "few rounds, one seed and one learning rate: about a minute")
    data_dir: str = option("", "folder with MNIST's idx files; scikit-learn's digits if empty")
    num_rounds: int = option(20, "rounds of each algorithm")
    num_seeds: int = option(2, "partitions and initial weights")
    only: tuple[str, ...] = option((), "algorithms to run; if empty, all of them")
    beta: float = option(0.1, "of the Dirichlet distribution of labels")

    def __post_init__(self):
        check(self)
        if self.num_rounds < 1 or self.num_seeds < 1:
            raise ValueError(f"Give at least one round and seed, not {self}.")


class Work(NamedTuple):
    """The data of all algorithms, and the sizes of networks."""

    private: Mapping[str, np.ndarray]
    public: Mapping[str, np.ndarray]
    validation: Mapping[str, np.ndarray]
    test: Mapping[str, np.ndarray]
    num_clients: int
    inputs: int


class Contender(NamedTuple):
    """An algorithm to run: what it is, where it starts, and who trains what."""

    algorithm: Algorithm
    start: Model
    bucket: np.ndarray
    public: Mapping[str, np.ndarray] | None
    clients_own: bool = False


def load(config: Config) -> Work:
    """Splits the training rows into public, validation and private ones."""
    data = mnist(config.data_dir) if config.data_dir else digits()
    rng = np.random.default_rng(0)
    train = data["train"].examples
    order = rng.permutation(len(train["label"]))
    sizes = (1000, 1000, 8000) if config.data_dir else (300, 200, 797)
    cut = np.split(order[: sum(sizes)], np.cumsum(sizes)[:-1])
    public, validation, private = ({k: v[rows] for k, v in train.items()} for rows in cut)
    test = {name: leaf[:4000] for name, leaf in data["test"].examples.items()}
    inputs = int(np.prod(train["image"].shape[1:]))
    return Work(private, {"image": public["image"]}, validation, test, 10, inputs)


def contenders(
    work: Work, rate: float, distill_rate: float, quick: bool
) -> dict[str, Callable[[], Contender]]:
    """The algorithms by name; each is made when its turn comes."""
    local = Local(optax.sgd(rate, momentum=0.9), 20, 3)
    distill = Distill(optax.adam(distill_rate), 100, 64)
    width = lambda *hidden: mlp((work.inputs, *hidden, 10))
    small, large, other = width(32), width(256), width(128, 64)
    one, two = np.zeros(work.num_clients, int), np.arange(work.num_clients) % 2
    public = work.public
    images = public["image"]
    noise = smooth_noise(
        len(images), images.shape[1:], dtype=images.dtype, high=float(images.max())
    )

    def kemf(public, bits: int | None = None) -> Contender:
        algorithm = fed_kemf(small, TASK, local, [large, other], distill, vote=VOTE)
        if bits is not None:
            algorithm = with_compression(algorithm, quantised(bits, block=256), down=bits)
        return Contender(algorithm, small, two, public, True)

    def member(public) -> Contender:
        net = supernet(large, large.init(jax.random.key(0)), ("hidden1",), smallest=32 / 256)
        full = float(net.parameters(net.largest * 1.0))
        limits = full * np.linspace(0.2, 1.0, work.num_clients)
        budget = [Budget("parameters", net.parameters, limits)]
        algorithm = rafl(large, TASK, local, plan_members(net, large, budget), distill, vote=VOTE)
        start = large._replace(init=lambda key: small.init(key))
        return Contender(algorithm, start, algorithm.assignment, public, True)

    shape = (len(public["image"]), 10)
    by_logits = lambda: fed_md([large, other], TASK, local, local._replace(epochs=1), logits=shape)
    everything = {
        "fedavg": lambda: Contender(fed_avg(large, TASK, local), large, one, None),
        "fedavg_small": lambda: Contender(fed_avg(small, TASK, local), small, one, None),
        "feddf": lambda: Contender(
            fed_df(large, TASK, local, distill, vote=VOTE), large, one, public
        ),
        "feddf_small": lambda: Contender(
            fed_df(small, TASK, local, distill, vote=VOTE), small, one, public
        ),
        "fedmd": lambda: Contender(by_logits(), small, two, public, True),
        "fedkemf": lambda: kemf(public),
        "fedkemf_4bit": lambda: kemf(public, 4),
        "fedkemf_average": lambda: kemf(None),
        "fedkemf_noise": lambda: kemf({"image": noise}),
        "rafl": lambda: member(public),
        "rafl_average": lambda: member(None),
    }
    later = ("fedkemf_average", "fedkemf_noise")
    return {k: v for k, v in everything.items() if not quick or k not in later}


def clients_of(work: Work, config: Config) -> list[Federation]:
    """One partition for each seed, all of one shape, so that seeds share a compiled program."""
    label = work.private["label"]
    parts = [
        dirichlet(label, work.num_clients, beta=config.beta, seed=seed, min_examples=10)
        for seed in range(config.num_seeds)
    ]
    return of_one_shape([federate(work.private, part) for part in parts])


def accuracy(model: Model, variables: Variables, examples) -> float:
    return float(evaluate(model.apply, variables, TASK, examples, 500)["accuracy"])


def global_variables(contender: Contender, server, work: Work, seed: int) -> Variables:
    """The variables of the global model, or of a network that learned the logits that travel."""
    if contender.algorithm.model is not None:
        return server.variables
    distill, key = Distill(optax.adam(2e-3), 1000, 64), jax.random.key(seed)
    return learn(
        contender.start, server.variables, TASK, work.public, server.consensus, distill, key
    )[0]


def measure(
    contender: Contender, work: Work, config: Config, federations: list[Federation]
) -> dict[str, Any]:
    """Returns mean accuracies over seeds, and the bytes of a round."""
    machines = profiles(work.num_clients)
    people = [Population(f, machines, contender.bucket) for f in federations]
    engine = compile_rounds(
        contender.algorithm, people[0], cohort_size=work.num_clients // 2,
        public=contender.public,
    )  # fmt: skip
    scores: dict[str, list[float]] = {"validation": [], "test": [], "clients": []}
    for seed, population in enumerate(people):
        start = contender.start.init(jax.random.key(seed))
        state = engine.init(start, jax.random.key(100 + seed))
        for done in range(1, config.num_rounds + 1):
            state, info = engine.run(state, population)
            if config.num_rounds - done < LAST:
                variables = global_variables(contender, state.server, work, seed)
                for split, examples in (("validation", work.validation), ("test", work.test)):
                    scores[split].append(accuracy(contender.start, variables, examples))
        if contender.clients_own:
            everyone = [np.arange(len(work.test["label"]))] * work.num_clients
            own = client_metrics(contender.algorithm, contender.bucket, TASK, batch_size=500)
            scores["clients"].append(
                float(own(state, federate(work.test, everyone))["accuracy"].mean())
            )
    costs = client_costs(contender.algorithm, people[0], start, contender.public)
    spent = round_costs(costs, info)
    total = spent["bytes_up"] + spent["bytes_down"]
    means = {name: round(float(np.mean(x)), 4) for name, x in scores.items() if x}
    return means | {"bytes_a_round": total}


def measured(config: Config) -> dict[str, Any]:
    """Each contender at its best learning rate, and what the others were."""
    began = time.perf_counter()
    if config.quick:
        config = dataclasses.replace(config, num_rounds=min(config.num_rounds, 10), num_seeds=1)
    work = load(config)
    federations = clients_of(work, config)
    best: dict[str, dict[str, Any]] = {}
    rates = (
        [(0.02, 5e-4)]
        if config.quick
        else [(rate, own) for rate in (0.02, 0.1) for own in (5e-4, 2e-3)]
    )
    tried = set()
    for rate, distill_rate in rates:
        for name, make in contenders(work, rate, distill_rate, config.quick).items():
            if config.only and name not in config.only:
                continue
            own = (name, rate, distill_rate if name in DISTILLED else None)
            if own in tried:
                continue
            tried.add(own)
            figures = measure(make(), work, config, federations) | {"rates": own[1:]}
            print(f"{name}: {figures} ({time.perf_counter() - began:.0f} s)", flush=True)
            if name not in best or figures["validation"] > best[name]["validation"]:
                best[name] = figures
    headline: dict[str, float] = {}
    if not config.only:
        spent = lambda name: best["fedavg"]["bytes_a_round"] / best[name]["bytes_a_round"]
        gain = 100 * (best["rafl"]["test"] - best["rafl_average"]["test"])
        headline = {
            "fedkemf_bytes_saving": round(spent("fedkemf"), 2),
            "fedkemf_4bit_bytes_saving": round(spent("fedkemf_4bit"), 2),
            "rafl_distillation_gain": round(gain, 2),
        }
    return {
        "name": "federated_kd",
        "data": "mnist" if config.data_dir else "digits",
        **headline,
        "accuracy": {name: figures["test"] for name, figures in best.items()},
        "clients_accuracy": {n: f["clients"] for n, f in best.items() if "clients" in f},
        "bytes_a_round": {name: figures["bytes_a_round"] for name, figures in best.items()},
    }


def main(config: Config) -> None:
    print(json.dumps(measured(config)))


if __name__ == "__main__":
    configs.run(main, Config)
