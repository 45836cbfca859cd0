"""Every federated algorithm on the same work, tuned alike: accuracy, bytes, size, speed.

    python benchmarks/federated_table.py [--quick] [--work=NAME --data_dir=FOLDER]

The works are:

- digits: scikit-learn's, by Dirichlet(0.1) on labels over ten clients, half of them in a round;
- mnist: the same with MNIST's idx files in the folder;
- mnist_writers: fifty people's digits, ten people in a round; the folder also holds QMNIST's
  labels;
- cifar10: ResNet-8 with batch norm, Dirichlet(0.1), ten clients, all of them in a round;
- cifar10_resnet20, cifar10_vgg11: the same with ResNet-20, whose shortcuts have no parameters, and
  with VGG-11;
- paper_resnet20, paper_vgg11: the papers' own setting, for an accelerator: all of CIFAR-10 over ten
  clients, all of them in a round, ten epochs of batches of 64.

The rows are the algorithms of the registry (`federated_parts.rows`). A sixth of each client's rows
is its own validation set, another sixth its own test set. Every algorithm climbs the same ladder of
learning rates, from its middle as long as the validation accuracy of the first seed improves (on
the clients' own rows where there is no global model), and runs the other seeds at the best rate;
figures are of test rows, means over the last three rounds and over seeds of partition and weights.
Each row is printed as soon as it is done, so that an interrupted run has shown what it found.

Then, with digits, `federated_sizes.py` measures, without training, the bytes of a round of the
published networks and what compression and slices do to a model's size and step time; with
`--distilled`, `federated_kd.py` measures distillation. The last line is one JSON object (all of its
keys are there with `--distilled` and the defaults):

- spatl_bytes_saving: FedAvg's bytes to the target over SPATL's, both with all of the network
  shared, by the accuracy of the global model; the target is the accuracy of FedAvg's best round.
  spatl_accuracy_gain: points of test accuracy at the end. Prefixes: `compressed_`, uploads of top-k
  and 8 bits; `narrow_`, 8 bits both ways; `personal_`, a personal predictor, on the clients' own
  test rows; `narrow_personal_`, both; `scaffold_`, SCAFFOLD in SPATL's place; `fed_per_`, FedPer on
  own rows, which has a personal head and nothing else of SPATL.
  spatl_slice_drop: points on own rows that clients lose with only their salient channels;
  `_measured`, with statistics of norms measured anew; `_repaired`, after least squares, too;
- fedkemf_bytes_saving, rafl_distillation_gain: see `federated_kd.py`;
- raffm_subnet_gap: points that a slice of 60 % of the parameters lies below the full network;
  raffm_full_over_mean_parameters: parameters of the full network over the clients' mean; `low_`,
  both with tiers of widths 1, 1/2 and 1/4 in place of 1, 3/4 and 1/2;
  raffm_step_speedup: time of a training step of the full network over that of the smallest tier;
- adp_flops, adp_accuracy_drop, adp_latency_speedup: the share of operations that clients keep, the
  points that they lie below FedAvg on their own test rows, and the latency of the dense network
  over that of a slice.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from typing import Any

import federated_kd
import federated_sizes
import numpy as np
import optax
from federated_parts.rows import choose_rows
from federated_parts.runs import LAST, OWN, TEST, Run, tune
from federated_parts.slices import measure_slices
from federated_parts.work import WORKS, load, setting_of

from jaxfm import config as configs
from jaxfm.config import check, option
from jaxfm.federated import Local


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    quick: bool = option(False, "few rounds, one seed, one learning rate, fewer algorithms")
    work: str = option("digits", f"one of {', '.join(WORKS)}")
    data_dir: str = option("", "folder with the data, or CIFAR-10's .npz file; digits need none")
    num_rounds: int = option(20, "rounds of each algorithm")
    num_seeds: int = option(3, "partitions and initial weights")
    beta: float = option(0.1, "of the Dirichlet distribution of labels")
    rates: tuple[float, ...] = option(
        (0.001, 0.003, 0.01, 0.03, 0.1, 0.3), "the ladder of learning rates, from low to high"
    )
    keep: float = option(0.5, "share of the multiply-adds that SPATL's and ADP's clients keep")
    distilled: bool = option(False, "also run federated_kd.py")
    only: tuple[str, ...] = option(
        (), "rows, registered algorithms or .py files to run beside fed_avg; if empty, all rows"
    )

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


def main(config: Config) -> None:
    if config.quick:
        config = dataclasses.replace(config, num_rounds=6, num_seeds=1, rates=(0.03,))
    began = time.perf_counter()
    work = load(config.work, config.data_dir, num_seeds=config.num_seeds, beta=config.beta)
    local = Local(optax.sgd(0.1), work.size.batch)  # runs have a learning rate of their own
    setting = setting_of(work, local, config.num_rounds)
    rows = choose_rows(setting, keep=config.keep, only=config.only, quick=config.quick)
    runs: dict[str, Run] = {}
    print("algorithm        rate  global    own         MB a round  (validation, seconds so far)")
    for name, row in rows.items():
        runs[name] = tune(
            row, work, config.rates, num_rounds=config.num_rounds, num_seeds=config.num_seeds,
            watch_own=name == "fed_avg",
        )  # fmt: skip
        seconds = time.perf_counter() - began
        score = 100 * runs[name].score()
        print(line_of(name, runs[name]), f"({score:.1f}, {seconds:.0f} s)", flush=True)
    result: dict[str, Any] = {"name": "federated_table", "work": config.work}
    result |= savings(runs) | measure_slices(runs, work, setting, config.keep)
    if config.work == "digits":
        result |= federated_sizes.measured()
    result["accuracy"] = {
        name: [None if np.isnan(x) else round(x, 4) for x in (run.end(TEST), run.end(OWN))]
        for name, run in runs.items()
    }
    result["rates"] = {name: run.rate for name, run in runs.items()}
    result["bytes_a_round"] = {name: round(run.bytes) for name, run in runs.items()}
    if config.distilled:
        kd = federated_kd.measured(federated_kd.Config(quick=config.quick))
        result |= {k: kd[k] for k in ("fedkemf_bytes_saving", "rafl_distillation_gain")}
    print(json.dumps(result))


def savings(runs: Mapping[str, Run]) -> dict[str, float]:
    """SPATL against FedAvg, in bytes to the accuracy of FedAvg's best round."""
    out, base = {}, runs["fed_avg"]
    for prefix, name, column in (
        ("", "spatl", TEST),
        ("compressed_", "spatl_topk8", TEST),
        ("narrow_", "spatl_narrow", TEST),
        ("scaffold_", "scaffold", TEST),
        ("fed_per_", "fed_per", OWN),
        ("personal_", "spatl_personal", OWN),
        ("narrow_personal_", "spatl_personal_narrow", OWN),
    ):
        if name not in runs:
            continue
        run = runs[name]
        target = float(base.curve[:, :, column].mean(0).max())
        saving = base.bytes_to(column, target) / run.bytes_to(column, target)
        gain = run.end(column) - base.end(column)
        out[f"{prefix}spatl_bytes_saving"] = round(saving, 2)
        out[f"{prefix}spatl_bytes_a_round_saving"] = round(base.bytes / run.bytes, 2)
        out[f"{prefix}spatl_accuracy_gain"] = round(100 * gain, 2)
    return out


def line_of(name: str, run: Run) -> str:
    """Rate, test accuracies, globally and on the clients' own rows (±: over seeds), and MB."""
    tail = 100 * run.curve[:, -LAST:].mean(1)
    whole, own = (f"{tail[:, c].mean():5.1f}±{tail[:, c].std():3.1f}" for c in (TEST, OWN))
    return f"{name:16} {run.rate:5.3f} {whole} {own} {run.bytes / 1e6:8.3f}"


if __name__ == "__main__":
    configs.run(main, Config)
