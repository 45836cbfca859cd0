"""What the server makes of clients' LoRA adapters: accuracy, bytes and error of every method.

    python benchmarks/lora_aggregation.py [--quick]

A small ViT learns scikit-learn's digits turned by a quarter, on rows that the server holds. Clients
hold the digits as they are, dealt by Dirichlet(0.1) on labels, and train a LoRA adapter of all
linear maps and the head; half of them take part in a round. Rows with "equal" have rank 4 at every
client, those with "mixed" ranks 8, 4 and 2, dealt out in turn. All methods get the same rows,
weights and cohorts, and climb the same learning rates; the best by the mean over seeds of accuracy
on validation rows is kept, and figures are of test rows.

Columns: accuracy (mean and standard error over seeds, of the mean of the last three rounds);
megabytes that one client uploads and downloads in a round and, of what is frozen, once; the mean
aggregation error, that is the distance of what the server applied to the mean of the full products,
relative to that mean (`server/aggregation_error` of a run's log); and "spread", the share of the
adapter's change that is not in the first two singular values of each kernel.

The last line is one JSON object: "fed_lora_exact_gain" is FedEx-LoRA's accuracy minus that of
averaging A and B apart, in points, with equal ranks; "fed_lora_exact_gain_mixed" the same with
mixed ranks; "collapse_spread" the spread of FlexLoRA over that of raFLoRA with mixed ranks.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxfm import config as configs
from jaxfm.adapters import adapter_of, attach, lora, merge
from jaxfm.adapters.adapter import fetch
from jaxfm.adapters.targets import sites_of
from jaxfm.config import check, option
from jaxfm.data.arrays import digits
from jaxfm.data.federation import Federation, federate, of_one_shape
from jaxfm.data.partition import dirichlet
from jaxfm.federated import (
    Algorithm,
    Local,
    Population,
    client_costs,
    compile_rounds,
    fed_avg,
    fed_ex_lora,
    fed_lora,
    fed_sb,
    ffa_lora,
    flex_lora,
    flora,
    het_lora,
    profiles,
    ra_flora,
    ro_lora,
)
from jaxfm.model import Model, Variables
from jaxfm.models.families.vit import VitConfig, vit
from jaxfm.tasks import classification
from jaxfm.tasks.evaluation import evaluate

TASK = classification(10)
RANK, MIXED = 4, (8, 4, 2)
LAST = 3  # rounds whose mean counts
LOWEST = 2


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    quick: bool = option(False, "one layer, 12 rounds, one seed, one learning rate, two methods")
    num_rounds: int = option(30, "rounds of each method")
    num_seeds: int = option(3, "partitions and adapters")
    num_clients: int = option(10, "clients, half of them in a round")
    beta: float = option(0.1, "of the Dirichlet distribution of labels")
    rates: tuple[float, ...] = option((0.003, 0.01, 0.03), "learning rates of Adam on the clients")

    def __post_init__(self):
        check(self)


class Row(NamedTuple):
    """A method, its options, and whether ranks are mixed."""

    factory: Callable[..., Algorithm]
    options: Mapping[str, Any]
    is_mixed: bool = False


class Figures(NamedTuple):
    """Of one run; see the module."""

    validation: float
    accuracy: float
    error: float
    spread: float


ROWS = {
    "fed_lora": Row(fed_lora, {}),
    "ffa_lora": Row(ffa_lora, {}),
    "ro_lora": Row(ro_lora, {}),
    "fed_sb": Row(fed_sb, {}),
    "flex_lora": Row(flex_lora, {}),
    "fed_ex_lora": Row(fed_ex_lora, {}),
    "fed_ex_lora, remainder 8": Row(fed_ex_lora, {"remainder": 8}),
    "flora": Row(flora, {}),
    "fed_lora, mixed": Row(fed_lora, {}, is_mixed=True),
    "het_lora padded, mixed": Row(het_lora, {"padded": True}, is_mixed=True),
    "het_lora, mixed": Row(het_lora, {}, is_mixed=True),
    "flex_lora, mixed": Row(flex_lora, {}, is_mixed=True),
    "ra_flora, mixed": Row(ra_flora, {}, is_mixed=True),
    "fed_ex_lora, mixed": Row(fed_ex_lora, {}, is_mixed=True),
    "flora, mixed": Row(flora, {}, is_mixed=True),
}
QUICK = ("fed_lora", "fed_ex_lora")


class Work(NamedTuple):
    """The base model, trained by the server, and rows by part."""

    model: Model
    variables: Variables
    train: Mapping[str, np.ndarray]
    validation: Mapping[str, np.ndarray]
    test: Mapping[str, np.ndarray]


def prepare(quick: bool) -> Work:
    """A ViT that knows turned digits, and others as they are, of clients and for tests."""
    rows = digits()
    server, train = (
        {name: x[part] for name, x in rows["train"].examples.items()}
        for part in (slice(400), slice(400, None))
    )
    turned = server | {"image": np.rot90(server["image"], axes=(1, 2)).copy()}
    model = vit(
        VitConfig(
            image_size=8, patch_size=2, num_channels=1, num_classes=10, embed_dim=32,
            num_layers=1 if quick else 2, num_heads=4, mlp_dim=64,
        )
    )  # fmt: skip
    alone = fed_avg(model, TASK, Local(optax.adam(3e-3), 32, 60))
    population = people(federate(turned, [np.arange(400)]), 1)
    engine = compile_rounds(alone, population, cohort_size=1)
    state, _ = engine.run(engine.init(jax.jit(model.init)(jax.random.key(0)), jax.random.key(0)))
    return Work(
        model, state.server.variables, train, rows["validation"].examples, rows["test"].examples
    )


def people(data: Federation, num_buckets: int) -> Population:
    num = len(data.count)
    return Population(data, profiles(num), np.arange(num) % num_buckets)


def adapted(work: Work, row: Row) -> Model:
    rank = max(MIXED) if row.is_mixed else RANK
    return lora(work.model, rank, targets="linear", trained="head")


def algorithm_of(model: Model, row: Row, rate: float) -> Algorithm:
    options = dict(row.options) | ({"ranks": MIXED} if row.is_mixed else {})
    return row.factory(model, TASK, Local(optax.adam(rate), 16, 2), **options)


def spread(model: Model, before: Variables, after: Variables) -> float:
    """The share of ‖change‖² outside of the first singular values, over all adapted kernels."""
    old, new = (merge(model, variables)[1].params for variables in (before, after))
    rest = total = 0.0
    for site in sites_of(adapter_of(model).root).values():
        one, other = (np.asarray(fetch(tree, site.path), np.float64) for tree in (old, new))
        layers, inputs, _ = map(math.prod, site.sizes)
        if site.path[0] != "layers":  # the head is trained itself
            continue
        change = (other - one).reshape(layers, inputs, -1)
        values = np.linalg.svd(change, compute_uv=False)
        rest += np.square(values[:, LOWEST:]).sum()
        total += np.square(values).sum()
    return float(rest / total) if total else 0.0


def measure(work: Work, row: Row, config: Config, rate: float) -> list[Figures]:
    """One run of a method for each seed; one compilation."""
    model = adapted(work, row)
    algorithm = algorithm_of(model, row, rate)
    deal = lambda seed: dirichlet(
        work.train["label"], config.num_clients, beta=config.beta, seed=seed, min_examples=4
    )
    data = of_one_shape([federate(work.train, deal(seed)) for seed in range(config.num_seeds)])
    populations = [people(own, len(algorithm.buckets)) for own in data]
    engine = compile_rounds(algorithm, populations[0], cohort_size=config.num_clients // 2)
    figures = []
    for seed, population in enumerate(populations):
        start = jax.jit(lambda v, key: attach(model, v, key))(work.variables, jax.random.key(seed))
        state, seen, errors = engine.init(start, jax.random.key(seed)), [], []
        for number in range(config.num_rounds):
            state, info = engine.run(state, population)
            errors.append(float(info.server["aggregation_error"][0]))
            if number >= config.num_rounds - LAST:
                now = state.server.variables
                scores = (evaluate(model.apply, now, TASK, x, 64) for x in work[-2:])
                seen.append([metrics["accuracy"] for metrics in scores])
        validation, test = np.mean(seen, 0)
        change = spread(model, start, state.server.variables)
        figures.append(Figures(float(validation), float(test), float(np.mean(errors)), change))
    return figures


def megabytes(work: Work, row: Row) -> np.ndarray:
    """(up, down, once) of the mean client of all buckets."""
    model = adapted(work, row)
    algorithm = algorithm_of(model, row, 0.01)
    population = people(federate(work.train, [np.arange(9)] * 6), len(algorithm.buckets))
    costs = client_costs(algorithm, population, jax.eval_shape(model.init, jax.random.key(0)))
    table = np.array([(cost.bytes_up, cost.bytes_down, cost.bytes_once) for cost in costs])
    half = np.array([0.5 if row.factory is ro_lora else 1.0, 1.0, 1.0])  # A and B in turn
    return table.mean(0) / 1e6 * half


def main(config: Config) -> None:
    if config.quick:
        config = dataclasses.replace(config, num_rounds=12, num_seeds=1, rates=config.rates[1:2])
    work = prepare(config.quick)
    names = QUICK if config.quick else tuple(ROWS)
    table: dict[str, dict[str, float]] = {}
    print(f"{'':26} accuracy        up    down    once MB   error   spread  rate")
    for name in names:
        row = ROWS[name]
        by_rate = {rate: measure(work, row, config, rate) for rate in config.rates}
        rate = max(by_rate, key=lambda r: np.mean([f.validation for f in by_rate[r]]))
        runs = by_rate[rate]
        accuracy = 100 * np.array([f.accuracy for f in runs])
        error = accuracy.std(ddof=1) / len(runs) ** 0.5 if len(runs) > 1 else 0.0  # of one: unknown
        up, down, once = map(float, megabytes(work, row))
        table[name] = {
            "accuracy": float(accuracy.mean()), "standard_error": float(error), "megabytes_up": up,
            "megabytes_down": down, "megabytes_once": once, "rate": rate,
            "aggregation_error": float(np.mean([f.error for f in runs])),
            "spread": float(np.mean([f.spread for f in runs])),
        }  # fmt: skip
        own = table[name]
        print(
            f"{name:26} {own['accuracy']:5.1f} ± {error:4.1f}  {up:7.4f} {down:7.4f} {once:7.4f}  "
            f"{own['aggregation_error']:8.1e} {own['spread']:6.3f}  {rate}",
            flush=True,
        )
    print(json.dumps({"name": "lora_aggregation", **ratios(table), "rows": table}))


def ratios(table: dict[str, dict[str, float]]) -> dict[str, float]:
    """The keys of the last line, of the rows that there are."""

    def minus(one: str, other: str) -> float:
        return table[one]["accuracy"] - table[other]["accuracy"]

    found = {"fed_lora_exact_gain": minus("fed_ex_lora", "fed_lora")}
    if "fed_lora, mixed" in table:
        found["fed_lora_exact_gain_mixed"] = minus("fed_ex_lora, mixed", "fed_lora, mixed")
    if "ra_flora, mixed" in table:
        lost, held = (table[name]["spread"] for name in ("flex_lora, mixed", "ra_flora, mixed"))
        found["collapse_spread"] = lost / held if held else float("nan")
    return found


if __name__ == "__main__":
    configs.run(main, Config)
