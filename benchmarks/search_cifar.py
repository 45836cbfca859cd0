"""ResNet on CIFAR-10 at half of its true multiply-adds: every strategy, the same evaluations.

    python benchmarks/search_cifar.py --data_dir=cifar10.npz --weights=resnet20.npz
    python benchmarks/search_cifar.py --quick

With weights trained elsewhere their training images are not known, so the test images are dealt
out: one half serves the rewards, the other half the report, the same for every strategy; training
images re-estimate batch norm and repair. Every strategy proposes equally many candidates, all of
them within the budget by construction. The best one by reward is sliced, its statistics are
re-estimated, it is repaired by least squares and, with `--finetune`, trained for some epochs (with
one recipe for all, also for the dense network: SGD with momentum, cosine to zero). All are
evaluated once on the report images. Baselines that try one candidate (uniform, magnitude by each
importance) are in the same table. Without data (`--quick`) a narrow network on scikit-learn's
digits is trained first.

The last line is one JSON object: "accuracy", "repaired", "finetuned" by strategy, means over seeds,
with half-widths of 95 % confidence intervals over seeds ("ci95") and of one accuracy by its
number of report images ("binomial95").
"""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfm import config as configs
from jaxfm import search
from jaxfm.config import check, option
from jaxfm.data.arrays import digits
from jaxfm.federated.algorithm import ClientData
from jaxfm.federated.local import Local, local_fit, objective
from jaxfm.hub import torch_vision
from jaxfm.model import Model, Variables
from jaxfm.models import resnet_config
from jaxfm.search.recalibration import recalibrate
from jaxfm.tasks import Task, classification
from jaxfm.tasks.evaluation import evaluate, metric_totals
from jaxfm.testing import tiny_resnet

SEARCHED = ("random", "nsga2", "cma_es", "agmc", "agmc_published", "gnn_rl", "gnn_rl_published")
IMPORTANCES = ("l1", "l2", "scale", "activation", "taylor")
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # Student's t, two-sided, by number of seeds


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the benchmark."""

    quick: bool = option(False, "a narrow network on digits, few evaluations, one seed")
    data_dir: str = option("", "npz with train_images, train_labels, test_images, test_labels")
    weights: str = option("", "PyTorch's state dict of a CIFAR ResNet")
    macs: float = option(0.5, "share of the multiply-adds that remains")
    evaluations: int = option(128, "candidates of every strategy")
    num_seeds: int = option(3, "seeds of each search")
    reward: int = option(256, "images that candidates are scored on")
    calibration: int = option(128, "training images that statistics are estimated on")
    report: int = option(3000, "images of the report")
    repair: int = option(512, "training images for least squares")
    finetune: int = option(0, "epochs of training after the repair")
    rate: float = option(0.01, "learning rate of the fine-tuning, which falls to zero")
    repaired: bool = option(False, "score candidates after least squares")
    order: str = option("l2", "importance that ranks units for the searches")
    strategies: tuple[str, ...] = option(SEARCHED, "strategies that search")
    importances: tuple[str, ...] = option(
        IMPORTANCES, "importances of the baselines with one candidate"
    )

    def __post_init__(self):
        check(self)
        if not self.quick and not (self.data_dir and self.weights):
            raise ValueError("Give --data_dir and --weights, or --quick.")


class Work(NamedTuple):
    """A dense network, and rows by what they serve."""

    model: Model
    variables: Variables
    task: Task
    train: dict[str, np.ndarray]
    reward: dict[str, np.ndarray]
    report: dict[str, np.ndarray]


def rows(data: dict[str, np.ndarray], index: np.ndarray) -> dict[str, np.ndarray]:
    return {name: leaf[index] for name, leaf in data.items()}


def load(config: Config) -> Work:
    """The trained network and its data; a narrow one, trained here, with --quick."""
    rng = np.random.default_rng(0)
    if config.quick:
        parts = {k: dict(v.examples) for k, v in digits().items()}
        for part in parts.values():
            part["image"] = np.repeat(part["image"], 3, -1)
        task, model = classification(10), tiny_resnet(num_classes=10, widths=(8, 16))
        train = parts["train"]
        fit = local_fit(objective(model, task), Local(optax.adam(3e-3), 32, 12))
        index = jnp.arange(len(train["label"]), dtype=jnp.int32)
        data = ClientData(jax.tree.map(jnp.asarray, train), index, jnp.int32(len(index)))
        start = model.init(jax.random.key(0))
        variables, _ = jax.jit(fit)(start, data, jnp.int32(2**30), jax.random.key(1))
        return Work(model, variables, task, train, parts["validation"], parts["test"])
    model, variables, task = load_network(config.weights)
    with np.load(config.data_dir) as file:
        data = {
            part: {
                "image": file[f"{part}_images"],
                "label": file[f"{part}_labels"].astype(np.int32),
            }
            for part in ("train", "test")
        }
    order = rng.permutation(len(data["test"]["label"]))
    half = len(order) // 2
    train = rows(data["train"], rng.permutation(len(data["train"]["label"])))
    return Work(
        model, variables, task, train,
        rows(data["test"], order[:half][: config.reward]),
        rows(data["test"], order[half:][: config.report]),
    )  # fmt: skip


def load_network(weights: str) -> tuple[Model, Variables, Task]:
    """A ResNet for CIFAR-10 from PyTorch's state dict, and its task, which scales images for it."""
    model, variables = torch_vision.load_torch(resnet_config(_depth(weights)), weights)
    mean, std = (np.array(x, np.float32) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def scale(images, key):
        wide = lambda x: jnp.broadcast_to(jnp.asarray(x), images.shape)
        return (images.astype(jnp.float32) / 255 - wide(mean)) / wide(std)

    return model, variables, classification(10, transform=scale)


def _depth(weights: str) -> int:
    return int("".join(c for c in weights.rsplit("/", 1)[-1].split("-")[0] if c.isdigit()))


class Bench:
    """One network, its rows and the compiled functions that all strategies share."""

    def __init__(self, work: Work, config: Config):
        self.work, self.config = work, config
        self.calibration = rows(work.train, np.arange(config.calibration))
        self.inputs = work.task.prepare(rows(work.train, np.arange(config.repair)), None)[0]
        self.net = search.model_network(work.model, work.variables, self.inputs[:64])
        self.orders = {
            kind: jax.jit(lambda v, x, k=kind: self._scores(k, v, x))(
                work.variables, self.inputs[:64]
            )
            for kind in {*config.importances, config.order, "l2"}
        }
        self.limits = search.budgets(self.net, macs=config.macs)
        self.judge = jax.jit(self._judge)
        self.repair = jax.jit(lambda v, m, x: search.repair(self.net, v, m, x))

    def _scores(self, kind: str, variables, inputs):
        if kind != "taylor":
            given = (inputs,) if kind == "activation" else ()
            return search.importance(self.net, variables, kind, inputs=given)
        task, model = self.work.task, self.work.model
        x, targets, weight = task.prepare(self.calibration, None)

        def loss(v):
            total, count = task.loss(model.apply(v, x)[0], targets, weight)
            return total / count

        slope = search.gradient(loss, variables)
        return search.importance(self.net, variables, kind, gradient=slope)

    def problem(self, kind: str):
        return search.task_problem(
            self.net, self.work.variables, search.ranks(self.orders[kind]), self.limits,
            self.work.task, self.work.reward, calibration=self.calibration, batch_size=128,
            repaired=self.config.repaired,
        )  # fmt: skip

    def strategy(self, name: str, problem):
        return search.make_strategy(
            name, self.net, self.work.variables, problem, self.orders[self.config.order],
            evaluations=self.config.evaluations, macs_share=self.config.macs,
        )  # fmt: skip

    def judged(self, kind: str, counts: np.ndarray, tuned: bool = True) -> dict[str, float]:
        """The candidate on the report images, before and after repair; masked, so that all share
        one program (`check_slice` holds one of them against its slice)."""
        order = search.ranks(self.orders[kind])
        before, after = self.judge(
            self.work.variables, search.masks(order, jnp.asarray(counts)), self.inputs,
            jax.tree.map(jnp.asarray, self.work.report),
        )  # fmt: skip
        own, dense = search.costs(self.net), self.net.sizes.astype(np.int64)
        share = float(own.macs(np.asarray(counts, np.int64)) / own.macs(dense))
        found = {"accuracy": float(before), "repaired": float(after), "macs": share}
        if self.config.finetune and tuned:
            found["finetuned"] = self.finetuned(search.keep(order, counts))
        return found

    def finetuned(self, kept) -> float:
        """Accuracy of the repaired slice after the training that all candidates get."""
        work, config = self.work, self.config
        masks = tuple(jnp.asarray(m) for m in kept)
        params = search.cut(self.net, self.repair(work.variables, masks, self.inputs), kept)
        run, train = search.sliced(self.net, kept), search.sliced(self.net, kept, 1)
        apply = lambda v, x, train=False, key=None, f=train: (
            f(v, x) if train else (run(v, x), v.stats)
        )
        size, batch = len(work.train["label"]), 128
        steps = config.finetune * -(-size // batch)
        rule = optax.sgd(optax.cosine_decay_schedule(config.rate, steps), momentum=0.9)
        fit = local_fit(
            objective(work.model._replace(apply=apply), work.task),
            Local(rule, batch, config.finetune),
        )
        data = ClientData(work.train, np.arange(size, dtype=np.int32), np.int32(size))
        there, _ = jax.jit(fit)(params, data, np.int32(2**30), jax.random.key(0))
        return float(evaluate(apply, there, work.task, work.report, 250)["accuracy"])

    def _judge(self, variables, masks, inputs, report):
        task, run, train = self.work.task, search.masked(self.net), search.masked(self.net, 1)
        batches = inputs[: len(inputs) // 64 * 64]
        batches = batches.reshape(-1, 64, *batches.shape[1:])

        def measured(params):
            there = recalibrate(lambda v, x: train(v, masks, x)[1], params, batches)
            apply = lambda v, x, train=False: (run(v, masks, x), v.stats)
            totals = metric_totals(apply, there, task, report, batch_size=250)
            total, count = (part.sum() for part in totals["accuracy"])
            return total / count

        return measured(variables), measured(search.repair(self.net, variables, masks, inputs))

    def check_slice(self, kind: str, counts: np.ndarray) -> float:
        """The slice's accuracy before repair, on the report images."""
        kept = search.keep(search.ranks(self.orders[kind]), counts)
        small, train = search.sliced(self.net, kept), search.sliced(self.net, kept, 1)
        batches = self.inputs[: len(self.inputs) // 64 * 64]
        batches = batches.reshape(-1, 64, *batches.shape[1:])
        params = search.cut(self.net, self.work.variables, kept)
        there = jax.jit(lambda p: recalibrate(lambda v, x: train(v, x)[1], p, batches))(params)
        apply = lambda v, x, train=False: (small(v, x), v.stats)
        return float(evaluate(apply, there, self.work.task, self.work.report, 250)["accuracy"])


def main(config: Config) -> None:
    if config.quick:
        config = dataclasses.replace(
            config, evaluations=32, num_seeds=1, repair=256, strategies=("random", "gnn_rl")
        )
    began = time.perf_counter()
    work = load(config)
    bench = Bench(work, config)
    dense = evaluate(work.model.apply, work.variables, work.task, work.report, 250)["accuracy"]
    print(f"dense {dense:.4f}, {len(bench.net.groups)} groups", flush=True)
    whole = tuple(np.ones(group.size, bool) for group in bench.net.groups)
    trained = bench.finetuned(whole) if config.finetune else float("nan")
    print(f"dense, trained as candidates are: {trained:.4f}", flush=True)
    problem = bench.problem(config.order)
    scored = jax.jit(problem.evaluate)
    table: dict[str, list[dict[str, float]]] = {}

    def note(name: str, kind: str, counts: np.ndarray, reward: float) -> None:
        table.setdefault(name, []).append(bench.judged(kind, counts) | {"reward": reward})
        print(f"{name}: {table[name][-1]} ({time.perf_counter() - began:.0f} s)", flush=True)

    uniform = np.asarray(jax.jit(problem.project)(jnp.zeros(len(bench.net.groups))))
    for kind in config.importances:
        note(f"uniform_{kind}", kind, uniform, np.nan)
        one = search.magnitude(problem, [np.asarray(s) for s in bench.orders[kind]])
        actions, _ = one.ask(one.init(jax.random.key(0)), jax.random.key(0))
        note(f"magnitude_{kind}", kind, np.asarray(problem.project(actions[0])), np.nan)
    masked_accuracy = bench.judged("l2", uniform, tuned=False)["accuracy"]
    check = abs(bench.check_slice("l2", uniform) - masked_accuracy)
    print(f"uniform reward {float(scored(problem.data, uniform[None])[0]):.4f}")
    runners = {}
    for name in config.strategies:
        strategy = bench.strategy(name, problem)
        evaluations = max(1, config.evaluations // strategy.batch) * strategy.batch
        runners[name] = search.search(problem, strategy, evaluations)
    for seed in range(config.num_seeds):  # outermost: a run cut off has whole seeds
        for name, runner in runners.items():
            state = runner.advance(runner.init(jax.random.key(seed)), runner.num_steps)
            found = runner.result(state)
            note(name, config.order, found.best_counts, float(found.best_score))
    result: dict[str, Any] = {"name": "search_cifar", "dense": round(float(dense), 4)}
    finetuned = ("finetuned",) if config.finetune else ()
    if finetuned:
        result["dense_finetuned"] = round(trained, 4)
    for field in ("accuracy", "repaired", *finetuned, "macs"):
        values = {n: [row[field] for row in found] for n, found in table.items()}
        result[field] = {n: round(float(np.mean(v)), 4) for n, v in values.items()}
        if field != "macs":
            result[f"{field}_ci95"] = {
                n: round(float(T95[len(v)] * np.std(v, ddof=1) / len(v) ** 0.5), 4)
                for n, v in values.items() if len(v) > 1
            }  # fmt: skip
    count = len(work.report["label"])
    result["binomial95"] = round(1.96 * (dense * (1 - dense) / count) ** 0.5, 4)
    result["evaluations"] = config.evaluations
    result["masked_minus_sliced"] = round(check, 4)
    print(json.dumps(result))


if __name__ == "__main__":
    configs.run(main, Config)
