"""Every federated algorithm on the same work, tuned alike: accuracy, bytes, size, speed.

    python benchmarks/federated_table.py [--quick] [--work=NAME --data_dir=FOLDER]

By name of the work:

- digits: scikit-learn's, by Dirichlet(0.1) on labels over ten clients, half of them a round;
- mnist: the same with MNIST's idx files in the folder;
- mnist_writers: fifty people's digits, ten people a round; the folder also holds QMNIST's labels;
- cifar10: ResNet-8 with batch norm, Dirichlet(0.1), ten clients, all of them a round;
- cifar10_resnet20, cifar10_vgg11: the same with ResNet-20, whose shortcuts have no parameters, and
  with VGG-11;
- paper_resnet20, paper_vgg11: the papers' own setting, for an accelerator: all of CIFAR-10 over ten
  clients, all of them a round, ten epochs of batches of 64.

A sixth of each client's rows is its own validation, another its own test. Every algorithm climbs
the same ladder of learning rates, from its middle as far as validation rows of the first seed get
better (the clients' own where there is no global model), and runs the other seeds at the best;
figures are of test rows and means over the last three rounds and over seeds of partition and
weights. Each algorithm's row is printed when it is done, so that a run cut off has said what it
found.

Then, with digits, without training, the bytes of a round of the published networks from their
shapes, and what compression and slices do to a model's size and to its measured step; with
`--distilled`, distillation, as `federated_kd.py` has it. The last line is one JSON object (all keys
of it: `--distilled` and the defaults):

- spatl_bytes_saving: FedAvg's bytes to the target over SPATL's, both with all of the network
  shared and the global model looked at; the target is the accuracy of FedAvg's best round.
  spatl_accuracy_gain: points of test accuracy at the end. `compressed_` the same with uploads of
  top-k and 8 bits, `narrow_` with 8 bits both ways; `personal_` with a personal predictor, on the
  clients' own test rows, `narrow_personal_` both; `scaffold_` for SCAFFOLD in its place, and
  `fed_per_` for FedPer on own rows, which has a personal head and nothing else of SPATL.
  spatl_slice_drop: points on these rows by which a client's salient channels alone are worse;
  `_measured` with statistics of norms measured anew, `_repaired` by least squares before, too;
- fedkemf_bytes_saving, rafl_distillation_gain: see `federated_kd.py`;
- raffm_subnet_gap: points that a slice of 60 % of the parameters lies below the full network;
  raffm_full_over_mean_parameters: of the full network over the clients' mean; both `low_` with
  tiers of widths 1, 1/2 and 1/4 for 1, 3/4 and 1/2;
  raffm_step_speedup: a training step of the full network over one of the smallest tier;
- adp_flops, adp_accuracy_drop, adp_latency_speedup: share of operations that clients keep, points
  below FedAvg on their own test rows, and latency of the dense network over that of a slice.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import federated_kd
import federated_sizes
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxfm import config as configs
from jaxfm.config import check, option
from jaxfm.data.arrays import digits
from jaxfm.data.cifar import cifar10
from jaxfm.data.federation import Federation, federate
from jaxfm.data.idx import mnist
from jaxfm.data.partition import dirichlet, natural
from jaxfm.federated import (
    Algorithm,
    Local,
    Population,
    adp,
    channel_gates,
    client_costs,
    client_metrics,
    client_variables,
    compile_rounds,
    fed_adam,
    fed_avg,
    fed_dyn,
    fed_nova,
    fed_per,
    fed_prox,
    fed_rolex,
    hetero_fl,
    lg_fed_avg,
    nothing,
    profiles,
    quantised,
    raffm,
    round_costs,
    saliency,
    scaffold,
    spatl,
    top_k,
    under,
    with_compression,
)
from jaxfm.federated.algorithms.adp import kept_channels
from jaxfm.federated.partition import IsPersonal
from jaxfm.federated.parts.channel_gates import Gates, gated_model
from jaxfm.model import Model, Variables, count_parameters
from jaxfm.models.families.cnn import CnnConfig, cnn
from jaxfm.models.families.resnet import ResNetConfig, resnet, resnet_config
from jaxfm.models.families.vgg import vgg, vgg_config
from jaxfm.search import costs, masked, model_network, repair
from jaxfm.search.recalibration import recalibrate
from jaxfm.search.trace.cost import counts_of
from jaxfm.search.trace.groups import Network
from jaxfm.subnet import Subnet, axis_sizes, extract, width
from jaxfm.tasks import classification
from jaxfm.tasks.evaluation import evaluate

TASK = classification(10)
LAST = 3  # rounds whose mean counts


class Size(NamedTuple):
    """How much of a work's data is used, and how clients train.

    Attributes:
      held: rows for validation.
      private: rows of all clients.
      clients, cohort: all, and those of a round.
      epochs, batch: of local training.
    """

    held: int
    private: int
    clients: int
    cohort: int
    epochs: int
    batch: int


WORKS = {
    "digits": Size(200, 1097, 10, 5, 3, 20),
    "mnist": Size(1000, 4000, 10, 5, 2, 20),
    "mnist_writers": Size(1000, 6000, 50, 10, 3, 20),
    "cifar10": Size(500, 2000, 10, 10, 2, 32),
    "cifar10_resnet20": Size(500, 2000, 10, 10, 2, 32),
    "cifar10_vgg11": Size(500, 2000, 10, 10, 2, 32),
    "paper_resnet20": Size(5000, 45000, 10, 10, 10, 64),
    "paper_vgg11": Size(5000, 45000, 10, 10, 10, 64),
}
RATIOS = (1.0, 0.75, 0.5)  # widths of the tiers of HeteroFL, FedRolex and RaFFM
LOW_RATIOS = (1.0, 0.5, 0.25)  # of `raffm_low`


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    quick: bool = option(False, "few rounds, one seed, one learning rate, fewer algorithms")
    work: str = option("digits", f"of {', '.join(WORKS)}")
    data_dir: str = option("", "folder with the data, or CIFAR-10's .npz file; digits need none")
    num_rounds: int = option(20, "rounds of each algorithm")
    num_seeds: int = option(3, "partitions and initial weights")
    beta: float = option(0.1, "of the Dirichlet distribution of labels")
    rates: tuple[float, ...] = option(
        (0.001, 0.003, 0.01, 0.03, 0.1, 0.3), "the ladder of learning rates, from low to high"
    )
    keep: float = option(0.5, "share of the multiply-adds that SPATL's and ADP's clients keep")
    distilled: bool = option(False, "run federated_kd.py, too")
    only: tuple[str, ...] = option((), "algorithms to run beside fed_avg; all if empty")

    def __post_init__(self):
        check(self)
        if self.num_rounds < LAST or self.num_seeds < 1:
            raise ValueError(f"Give at least {LAST} rounds and one seed, not {self}.")
        if self.work not in WORKS:
            raise ValueError(f"work={self.work!r} is unknown; choose one of {', '.join(WORKS)}.")
        if not self.rates:
            raise ValueError("rates is empty; give at least one learning rate.")
        if self.work != "digits" and not self.data_dir:
            raise ValueError(f"work={self.work!r} needs --data_dir, where its files are.")


class Work(NamedTuple):
    """The same for all: rows, the network, and its tiers.

    Attributes:
      train, choice, own: a federation a seed, of training rows, and of the clients' own validation
        and test rows.
    """

    size: Size
    validation: Mapping[str, np.ndarray]
    test: Mapping[str, np.ndarray]
    train: list[Federation]
    choice: list[Federation]
    own: list[Federation]
    model: Model
    network: Network
    tiers: list[Subnet]
    head: IsPersonal


def load(config: Config) -> Work:
    size, folder = WORKS[config.work], config.data_dir
    data = {
        "digits": digits,
        "mnist": lambda: mnist(folder),
        "mnist_writers": lambda: mnist(folder, writers=folder),
    }.get(config.work, lambda: cifar10(folder))()
    rng, source = np.random.default_rng(0), data["train"]
    order = rng.permutation(len(source.examples["label"]))
    rows = {name: leaf[order] for name, leaf in source.examples.items()}
    validation = {name: leaf[: size.held] for name, leaf in rows.items()}
    private = {name: leaf[size.held :] for name, leaf in rows.items()}
    train, choice, own = [], [], []
    for seed in range(config.num_seeds):
        if config.work == "mnist_writers":
            writers = np.random.default_rng(seed).permutation(source.client.max() + 1)
            people = natural(source.client[order][size.held :])
            parts = [people[writer] for writer in writers[: size.clients]]
        else:
            label = private["label"][: size.private]
            parts = dirichlet(label, size.clients, beta=config.beta, seed=seed, min_examples=10)
        dealt = [np.array_split(rng.permutation(np.asarray(part)), 6) for part in parts]
        train.append(federate(private, [np.concatenate(sixths[2:]) for sixths in dealt]))
        choice.append(federate(private, [sixths[0] for sixths in dealt]))
        own.append(federate(private, [sixths[1] for sixths in dealt]))
    side, _, channels = private["image"].shape[1:]
    if config.work == "cifar10":
        model = resnet(ResNetConfig(depths=(1, 1, 1), shortcut="projection"))
    elif config.work.endswith("_resnet20"):
        model = resnet(resnet_config(20))
    elif config.work.endswith("_vgg11"):
        model = vgg(vgg_config(11, cifar=True))
    else:
        model = cnn(CnnConfig(image_size=(side, side), conv_channels=(8, 16), dense_dim=64))
    variables = model.init(jax.random.key(0))
    network = model_network(model, variables, jnp.zeros((1, side, side, channels)))
    tiers = tiers_of(model, RATIOS)
    test = {name: leaf[:2000] for name, leaf in data["test"].examples.items()}
    last = under(_last(variables))
    people = map(_alike, (train, choice, own))
    return Work(size, validation, test, *people, model, network, tiers, last)


def tiers_of(model: Model, ratios: tuple[float, ...]) -> list[Subnet]:
    sizes = axis_sizes(jax.eval_shape(model.init, jax.random.key(0)), model.axes)
    return [width(sizes, widths(model, ratio)) for ratio in ratios]


def widths(model: Model, ratio: float) -> dict[str, float]:
    """One ratio for all named axes but those of the images and of the classes."""
    sizes = axis_sizes(jax.eval_shape(model.init, jax.random.key(0)), model.axes)
    return dict.fromkeys(sorted(set(sizes) - {"channel", "class"}), ratio)


def _last(variables: Variables) -> str:
    """The name of the part whose outputs are the classes."""
    flat, _ = jax.tree_util.tree_flatten_with_path(variables.params)
    return next(path[0].key for path, leaf in flat if leaf.shape == (10,))


def _alike(federations: list[Federation]) -> list[Federation]:
    """Federations of one shape, so that seeds share a program."""
    most = max(f.index.shape[1] for f in federations)
    pad = lambda x: np.pad(x, ((0, 0), (0, most - x.shape[1])))
    return [f._replace(index=pad(f.index)) for f in federations]


Make = Callable[[Model, Any, Local], Algorithm]


def algorithms(work: Work, config: Config) -> dict[str, Make]:
    """By name; names in `PERSONAL` have no global model."""
    salient = saliency(work.network, {"macs": config.keep})
    clients = work.size.clients
    shared = functools.partial(spatl, select=salient, num_clients=clients, is_personal=nothing)
    personal = functools.partial(spatl, select=salient, num_clients=clients, is_personal=work.head)
    pruning = lambda model, task, local, **kw: adp(
        model, task, local, gates_of(work, config, local.batch_size), **kw
    )
    everything: dict[str, Make] = {
        "fed_avg": fed_avg,
        "fed_avg_topk8": lambda *a: with_compression(fed_avg(*a), top_k(0.1, bits=8)),
        "fed_avg_4bit": lambda *a: with_compression(fed_avg(*a), quantised(4, block=256)),
        "fed_prox": lambda *a: fed_prox(*a, mu=0.01),
        "fed_adam": lambda *a: fed_adam(*a, learning_rate=0.01),
        "fed_nova": fed_nova,
        "fed_dyn": lambda *a: fed_dyn(*a, num_clients=clients, alpha=0.1),
        "scaffold": lambda *a: scaffold(*a, num_clients=clients),
        "fed_per": lambda *a: fed_per(*a, is_personal=work.head),
        "lg_fed_avg": lambda *a: lg_fed_avg(*a, is_shared=work.head),
        "hetero_fl": lambda *a: hetero_fl(*a, work.tiers),
        "hetero_fl_scaled": lambda *a: hetero_fl(*a, work.tiers, scaler=True),
        "fed_rolex": lambda *a: fed_rolex(*a, work.tiers),
        "raffm": lambda *a: raffm(*a, work.tiers, distill=0.5),
        "raffm_low": lambda *a: raffm(*a, tiers_of(work.model, LOW_RATIOS), distill=0.5),
        "adp": pruning,
        "adp_federated": lambda *a: pruning(*a, federated_gates=True),
        "spatl": lambda *a: shared(*a),
        "spatl_once": lambda *a: shared(*a, select_times=1),
        "spatl_topk8": lambda *a: with_compression(shared(*a), top_k(0.1, bits=8)),
        "spatl_narrow": lambda *a: with_compression(shared(*a), quantised(8, block=256), down=8),
        "fed_avg_narrow": lambda *a: with_compression(fed_avg(*a), quantised(8, block=256), down=8),
        "spatl_personal": lambda *a: personal(*a),
        "spatl_personal_narrow": lambda *a: with_compression(
            personal(*a), quantised(8, block=256), down=8
        ),
    }  # fmt: skip
    quick = ("fed_avg", "scaffold", "raffm", "adp", "spatl", "spatl_topk8")
    if unknown := sorted(set(config.only) - set(everything)):
        raise ValueError(f"only={unknown}: choose of {', '.join(everything)}.")
    names = ("fed_avg", *config.only) if config.only else quick if config.quick else everything
    return {name: everything[name] for name in names}


def gates_of(work: Work, config: Config, batch_size: int) -> Gates:
    """ADP's gates, at their target after half of the rounds."""
    rounds = max(1, config.num_rounds // 2)
    return channel_gates(
        work.network, TASK, batch_size=batch_size, target=config.keep, rounds=rounds
    )


PERSONAL = ("fed_per", "lg_fed_avg", "spatl_personal", "spatl_personal_narrow")


class Run(NamedTuple):
    """One algorithm at one learning rate.

    Attributes:
      curve: f64[seeds, rounds, 3], validation, test and the clients' own test rows; NaN where
        nobody asks: validation, the clients' own without a global model, counts in the last rounds
        alone.
      bytes: a round, both ways, mean.
      ends: the last server state and memories of each seed.
    """

    rate: float
    curve: np.ndarray
    bytes: float
    ends: list[Any]
    algorithm: Algorithm


def play(make: Make, name: str, rate: float, work: Work, config: Config, seeds: range) -> Run:
    clients, cohort, epochs, batch = work.size[2:]
    local = Local(optax.sgd(rate, momentum=0.9), batch, epochs)
    algorithm = make(work.model, TASK, local)
    bucket = np.arange(clients) % len(algorithm.buckets)
    people = [Population(f, profiles(clients), bucket) for f in work.train]
    engine = compile_rounds(algorithm, people[0], cohort_size=cohort)
    own = client_metrics(algorithm, bucket, TASK, batch_size=64)
    personal, curves, ends, wire = name in PERSONAL, [], [], []

    def look(state, seed: int, late: bool) -> tuple[float, float, float]:
        whole = lambda rows: accuracy(work.model, state.server.variables, rows)
        each = lambda rows: float(np.nanmean(own(state, rows[seed])["accuracy"]))
        choice = np.nan
        if late:
            choice = each(work.choice) if personal else whole(work.validation)
        often = late or personal or name == "fed_avg"
        return choice, np.nan if personal else whole(work.test), each(work.own) if often else np.nan

    for seed in seeds:
        start = work.model.init(jax.random.key(seed))
        priced = client_costs(algorithm, people[seed], start)
        state = engine.init(start, jax.random.key(100 + seed))
        points = []
        for done in range(1, config.num_rounds + 1):
            state, info = engine.run(state, people[seed])
            spent = round_costs(priced, info)
            wire.append(spent["bytes_up"] + spent["bytes_down"])
            late = config.num_rounds - done < LAST
            points.append(look(state, seed, late))
        curves.append(points)
        ends.append(jax.device_get(state))
    return Run(rate, np.array(curves), float(np.mean(wire)), ends, algorithm)


def tuned(make: Make, name: str, work: Work, config: Config) -> Run:
    """The first seed at the best rate of the ladder, and the other seeds at that rate."""
    runs: dict[int, Run] = {}

    def at(i: int) -> float:
        if i not in runs:
            runs[i] = play(make, name, config.rates[i], work, config, range(1))
        return score(runs[i])

    best = len(config.rates) // 2
    at(best)
    for step in (-1, 1):
        while 0 <= best + step < len(config.rates) and at(best + step) > at(best):
            best += step
    first = runs[best]
    if config.num_seeds == 1:
        return first
    rest = play(make, name, first.rate, work, config, range(1, config.num_seeds))
    return first._replace(
        curve=np.concatenate([first.curve, rest.curve]),
        bytes=(first.bytes + rest.bytes * (config.num_seeds - 1)) / config.num_seeds,
        ends=first.ends + rest.ends,
    )


def accuracy(model: Model, variables: Variables, examples: Mapping) -> float:
    return float(evaluate(model.apply, variables, TASK, examples, 250)["accuracy"])


def score(run: Run) -> float:
    """What learning rates are chosen by."""
    return float(run.curve[:, -LAST:, 0].mean())


def bytes_to(run: Run, column: int, target: float) -> float:
    """Bytes until the mean curve of a column reaches a target; infinite where it never does."""
    reached = np.flatnonzero(run.curve[:, :, column].mean(0) >= target)
    return run.bytes * (reached[0] + 1) if len(reached) else float("inf")


def savings(runs: Mapping[str, Run]) -> dict[str, float]:
    """SPATL against FedAvg, bytes to the accuracy of FedAvg's best round."""
    out, base = {}, runs["fed_avg"]
    for prefix, name, column in (
        ("", "spatl", 1), ("compressed_", "spatl_topk8", 1), ("narrow_", "spatl_narrow", 1),
        ("scaffold_", "scaffold", 1), ("fed_per_", "fed_per", 2),
        ("personal_", "spatl_personal", 2), ("narrow_personal_", "spatl_personal_narrow", 2),
    ):  # fmt: skip
        if name not in runs:
            continue
        target = float(base.curve[:, :, column].mean(0).max())
        saving = bytes_to(base, column, target) / bytes_to(runs[name], column, target)
        end = lambda run, column=column: run.curve[:, -LAST:, column].mean()
        out[f"{prefix}spatl_bytes_saving"] = round(saving, 2)
        out[f"{prefix}spatl_bytes_a_round_saving"] = round(base.bytes / runs[name].bytes, 2)
        out[f"{prefix}spatl_accuracy_gain"] = round(100 * float(end(runs[name]) - end(base)), 2)
    return out


def slices(runs: Mapping[str, Run], work: Work, config: Config) -> dict[str, float]:
    """What RaFFM's slices and ADP's extracted networks are worth."""
    out: dict[str, float] = {}
    for prefix, name in (("", "raffm"), ("low_", "raffm_low")):
        if name not in runs:
            continue
        run, gaps = runs[name], []
        tier = slice_of(work, 0.6)
        for state in run.ends:
            small = extract(state.server.variables, work.model.axes, tier)
            whole = accuracy(work.model, state.server.variables, work.test)
            gaps.append(100 * (whole - accuracy(work.model, small, work.test)))
        start = work.model.init(jax.random.key(0))
        clients = work.size.clients
        people = Population(work.train[0], profiles(clients), np.arange(clients) % len(RATIOS))
        price = client_costs(run.algorithm, people, start)
        mean = np.mean([cost.parameters for cost in price])
        out |= {
            f"{prefix}raffm_subnet_gap": round(float(np.mean(gaps)), 2),
            f"{prefix}raffm_full_over_mean_parameters": round(price[0].parameters / mean, 2),
        }
    if "spatl_personal" in runs:
        out |= lost_by_slicing(runs["spatl_personal"], work)
    if "adp" in runs:
        run, base = runs["adp"], runs["fed_avg"]
        end = lambda r: r.curve[:, -LAST:, 2].mean()
        gates = gates_of(work, config, 20)
        own = costs(work.network)
        shares = []
        for state in run.ends:
            for client in range(work.size.clients):
                scores = jax.tree.map(lambda x, i=client: x[i], state.memories[0])
                late = state.server._replace(round=np.int32(10**6))
                kept = jax.device_get(kept_channels(gates, late, scores))
                shares.append(
                    own.macs(counts_of(work.network, kept)) / own.macs(work.network.sizes)
                )
        out["adp_flops"] = round(float(np.mean(shares)), 4)
        out["adp_accuracy_drop"] = round(100 * float(end(base) - end(run)), 2)
    if "adp_federated" in runs:
        run, end = runs["adp_federated"], lambda r: r.curve[:, -LAST:, 2].mean()
        out["adp_federated_drop"] = round(100 * float(end(runs["fed_avg"]) - end(run)), 2)
    return out


def lost_by_slicing(run: Run, work: Work) -> dict[str, float]:
    """Points on own rows by which clients' salient channels alone are worse than their networks.

    As they are; "measured", both with statistics of norms measured anew on the client's training
    rows; "repaired", the slice by least squares on these rows before that, too.
    """
    (bucket,), network = run.algorithm.buckets, work.network
    clients, batch = work.size.clients, 64
    gate, rows = gated_model(network, work.model), 4 * batch

    def networks(server, memory, examples) -> dict[str, tuple[Variables, tuple]]:
        whole, flat = client_variables(bucket, server, memory), TASK.prepare(examples, None)[0]
        inputs = flat.reshape(-1, batch, *flat.shape[1:])
        everything, salient = (tuple(jnp.ones_like(m) for m in memory.masks), memory.masks)

        def measured(variables: Variables, masks: tuple) -> tuple[Variables, tuple]:
            train = lambda v, x: masked(network, 1)(v, masks, x)[1]
            return recalibrate(train, variables, inputs), masks

        return {
            "whole": (whole, everything),
            "whole_measured": measured(whole, everything),
            "slice": (whole, salient),
            "slice_measured": measured(whole, salient),
            "slice_repaired": measured(repair(network, whole, salient, flat), salient),
        }

    over_clients = jax.jit(lambda server, *own: lax.map(lambda x: networks(server, *x), own))
    held = bucket._replace(
        model=gate, personal=lambda _, memory: memory[0]._replace(masks=memory[1])
    )
    measure = client_metrics(
        run.algorithm._replace(buckets=(held,)), np.zeros(clients, int), TASK, batch_size=batch
    )
    found: dict[str, list[float]] = {}
    for seed, state in enumerate(run.ends):
        train = work.train[seed]
        own = [np.resize(i[:n], rows) for i, n in zip(train.index, train.count, strict=True)]
        examples = {name: leaf[np.stack(own)] for name, leaf in train.examples.items()}
        for name, ends in over_clients(state.server, state.memories[0], examples).items():
            each = measure(state._replace(memories=(ends,)), work.own[seed])["accuracy"]
            found.setdefault(name, []).append(100 * float(np.nanmean(each)))
    mean = {name: np.mean(values) for name, values in found.items()}
    return {
        "spatl_slice_drop": round(mean["whole"] - mean["slice"], 2),
        "spatl_slice_drop_measured": round(mean["whole_measured"] - mean["slice_measured"], 2),
        "spatl_slice_drop_repaired": round(mean["whole_measured"] - mean["slice_repaired"], 2),
        "spatl_whole_measured_gain": round(mean["whole_measured"] - mean["whole"], 2),
    }


def slice_of(work: Work, share: float) -> Subnet:
    """The leading slice, all widths alike, with the nearest share of the parameters."""
    variables = jax.eval_shape(work.model.init, jax.random.key(0))
    sizes = axis_sizes(variables, work.model.axes)
    whole = count_parameters(variables.params)

    def gap(ratio: float) -> float:
        tier = width(sizes, widths(work.model, ratio))
        cut = jax.eval_shape(lambda v: extract(v, work.model.axes, tier), variables)
        return abs(count_parameters(cut.params) / whole - share)

    best = min(np.linspace(0.3, 1, 57), key=gap)
    return width(sizes, widths(work.model, float(best)))


def row(name: str, run: Run) -> str:
    """Rate, test accuracies, globally and on the clients' own rows (±: over seeds), and MB."""
    tail = 100 * run.curve[:, -LAST:].mean(1)
    whole, own = (f"{tail[:, c].mean():5.1f}±{tail[:, c].std():3.1f}" for c in (1, 2))
    return f"{name:16} {run.rate:5.3f} {whole} {own} {run.bytes / 1e6:8.3f}"


def main(config: Config) -> None:
    if config.quick:
        config = dataclasses.replace(config, num_rounds=6, num_seeds=1, rates=(0.03,))
    began, work, runs = time.perf_counter(), load(config), {}
    print("algorithm        rate  global    own         MB a round  (validation, seconds so far)")
    for name, make in algorithms(work, config).items():
        runs[name] = tuned(make, name, work, config)
        seconds = time.perf_counter() - began
        print(row(name, runs[name]), f"({100 * score(runs[name]):.1f}, {seconds:.0f} s)",
              flush=True)  # fmt: skip
    result: dict[str, Any] = {"name": "federated_table"}
    result["work"] = config.work
    result |= savings(runs) | slices(runs, work, config)
    if config.work == "digits":
        result |= federated_sizes.measured()
    result["accuracy"] = {
        name: [
            None if np.isnan(x) else round(float(x), 4)
            for x in run.curve[:, -LAST:].mean((0, 1))[1:]
        ]
        for name, run in runs.items()
    }
    result["rates"] = {name: run.rate for name, run in runs.items()}
    result["bytes_a_round"] = {name: round(run.bytes) for name, run in runs.items()}
    if not config.distilled:
        print(json.dumps(result))
        return
    kd = federated_kd.measured(federated_kd.Config(quick=config.quick))
    result |= {k: kd[k] for k in ("fedkemf_bytes_saving", "rafl_distillation_gain")}
    print(json.dumps(result))


if __name__ == "__main__":
    configs.run(main, Config)
