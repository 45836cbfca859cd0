"""Shrinks a model to a budget: search, repair, fine-tune, and a report of what it cost.

    python -m jaxfm.launch.search
    python -m jaxfm.launch.search --model=resnet20 --weights=resnet20.npz --normalise=imagenet \\
        --data.source=cifar10 --data.folder=cifar10.npz --data.partition=iid --finetune_epochs=3
    python -m jaxfm.launch.search --model=runs/demo/model --data.source=stdlib --parameters=0.5

Without weights the dense model is trained first. Rows are kept apart: training rows train, measure
statistics and repair; the reward of the search comes from validation rows (for a model trained
elsewhere, from one half of the test rows), the report from test rows that nothing else has seen.
The run folder holds config, results, report.html and pruned/ (parameters, manifest, program; for
transformers in Hugging Face format, where it can say them: draft/ of a language model, else
huggingface/).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfm import config as configs
from jaxfm import hub, search, tasks
from jaxfm.checkpoint import Checkpointer
from jaxfm.config import check, option
from jaxfm.data.dealing import subsample
from jaxfm.data.federation import merge
from jaxfm.federated.local import objective
from jaxfm.hub import torch_vision
from jaxfm.launch.report import write_report
from jaxfm.launch.setup import (
    NUM_CLASSES,
    Data,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    load_data,
    make_model,
    make_optimizer,
    use_cores,
)
from jaxfm.model import Array, Model, PyTree, Variables
from jaxfm.models import build, mobilenet_config, resnet_config, shufflenet_config, vgg_config
from jaxfm.run_folder import open_run, save_results
from jaxfm.search.latency import fit_latency, latency_of, measure
from jaxfm.search.ranking import gradient
from jaxfm.search.recalibration import recalibrate
from jaxfm.search.strategies.agmc import agmc, agmc_published, warm_up_of
from jaxfm.search.strategies.gnn_rl import gnn_rl, load_policy, save_policy
from jaxfm.search.strategies.gnn_rl_published import gnn_rl_published
from jaxfm.search.strategies.policy_graph import policy_graph
from jaxfm.tasks import Task, evaluate

STRATEGIES = (
    "gnn_rl", "gnn_rl_published", "agmc", "agmc_published", "nsga2", "cma_es", "random", "uniform",
    "magnitude",
)  # fmt: skip
# The published networks by name: (number, image size, classes) to a config.
_NAMED: dict[str, Callable[[int, int, int], Any]] = {
    "resnet": lambda n, size, classes: resnet_config(n, num_classes=classes),
    "vgg": lambda n, size, classes: vgg_config(n, cifar=size < 64, num_classes=classes),
    "mobilenet": lambda n, size, classes: mobilenet_config(n, num_classes=classes),
    "shufflenet": lambda n, size, classes: shufflenet_config(n, num_classes=classes),
}
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """What is shrunk, to what, and how."""

    run_dir: str = option("runs/search", "folder of the run; an unfinished search there goes on")
    model: str = option(
        "auto",
        "auto: by --network.*; resnet20, resnet56, vgg11, mobilenet2, shufflenet2, ...; or a "
        "folder in Hugging Face format",
    )
    weights: str = option("", "PyTorch state dict of a named network (.npz, .safetensors, .th)")
    normalise: Literal["none", "imagenet"] = option("none", "how images are scaled beyond 0..1")
    train_steps: int = option(300, "steps of dense training where no weights are given")
    strategy: Literal[STRATEGIES] = option("gnn_rl", "who proposes")  # type: ignore[valid-type]
    policy: str = option(
        "", "gnn_rl: a policy.safetensors of another run, of any network, to start from"
    )
    importance: Literal["l1", "l2", "taylor", "scale", "l2_scale", "activation"] = option(
        "l2", "which units of a group stay"
    )
    macs: float = option(0.5, "share of the multiply-adds that remains; 0: no such budget")
    parameters: float = option(0.0, "share of the parameters; 0: no such budget")
    activation_bytes: float = option(0.0, "share of the most bytes alive; 0: no such budget")
    latency: float = option(0.0, "share of the dense latency at batch 32, by a fitted table")
    channel_multiple: int = option(1, "groups keep multiples of it")
    evaluations: int = option(256, "candidates that the strategy may try")
    reward_examples: int = option(512, "rows that score a candidate; 0: all that are set aside")
    finalists: int = option(
        8, "best candidates that are judged again, on 4 and 16 times the rows; 0: none"
    )
    calibration_examples: int = option(512, "training rows that statistics are measured on")
    score_repaired: bool = option(
        False, "candidates are scored after least squares: dearer, and closer to the end"
    )
    repair: bool = option(True, "least squares on the calibration rows after the search")
    finetune_epochs: int = option(3, "passes over the training rows after the cut; 0: none")
    batch_size: int = option(64, "examples a step and a batch of evaluation")
    seed: int = option(0, "of data, parameters, search and training")
    data: DataConfig = DataConfig(source="digits", partition="iid")
    network: ModelConfig = ModelConfig()
    finetune: OptimizerConfig = OptimizerConfig()

    def __post_init__(self):
        check(self)
        shares = ("macs", "parameters", "activation_bytes", "latency")
        if not any(getattr(self, name) for name in shares):
            raise ValueError("Give a budget: --macs=0.5, --parameters=0.5 or --latency=0.5.")
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a share from 0 to 1.")
        if self.strategy == "gnn_rl_published" and not self.macs:
            raise ValueError("strategy=gnn_rl_published acts until --macs is met; give it.")
        for name in ("train_steps", "channel_multiple", "evaluations", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1.")
        if self.policy and self.strategy != "gnn_rl":
            raise ValueError(f"policy={self.policy!r} is for --strategy=gnn_rl.")
        if self.finalists < 0:
            raise ValueError(f"finalists={self.finalists}: give a number, or 0 for none.")


class Setting(NamedTuple):
    """A dense model and the rows of each purpose; `aside` are all that `reward` is drawn from."""

    data: Data
    task: Task
    model: Model
    variables: Variables
    train: Mapping[str, np.ndarray]
    aside: Mapping[str, np.ndarray]
    reward: Mapping[str, np.ndarray]
    report: Mapping[str, np.ndarray]


def prepare(config: SearchConfig) -> Setting:
    """Loads or trains the dense model and sets rows aside."""
    data = load_data(config.data, config.seed)
    task = _task(config, data)
    train = merge(data.train)
    examples = next(iter(data.validation.values()))
    if config.model == "auto":
        model = make_model(config.network, data)
    elif pathlib.Path(config.model).is_dir():
        model, variables = hub.load(config.model)
    else:
        model = build(_named(config.model, examples.shape[1], data))
    elsewhere = bool(config.weights) or pathlib.Path(config.model).is_dir()
    if config.weights:
        model, variables = torch_vision.load_torch(model.config, config.weights)
    elif not elsewhere:
        print(f"Training the dense model: {config.train_steps} steps.")
        fit = trainer(lambda v, x, key: model.apply(v, x, train=True, key=key), task, config)
        start = model.init(jax.random.key(config.seed))
        variables = fit(start, train, config.train_steps, jax.random.key(config.seed + 1))
    reward, report = data.validation, data.test
    if elsewhere:  # its training rows are not known, so the test rows serve both purposes, apart
        rows = len(next(iter(data.test.values())))
        halves = search.split_rows(rows, 0, rows // 2, seed=config.seed)
        reward, report = _rows(data.test, halves.reward), _rows(data.test, halves.report)
    for part, left in (("validation", reward), ("test", report)):
        if not len(next(iter(left.values()))):
            raise ValueError(
                f"data.source={config.data.source}: no {part} rows are left to judge by; give more "
                "data."
            )
    few = subsample(reward, config.reward_examples)
    return Setting(data, task, model, variables, train, reward, few, report)


def _named(name: str, size: int, data: Data) -> Any:
    family = name.rstrip("0123456789").rstrip("_v-")
    if family not in _NAMED or not name[len(family) :].strip("_v-").isdigit():
        raise ValueError(
            f"model={name!r} is neither a folder nor a known network; give auto, or one of "
            f"{sorted(_NAMED)} with a number, as in resnet20."
        )
    if "image" not in data.validation:
        raise ValueError(f"model={name} takes images; --data.source={data.names[0]} has none.")
    return _NAMED[family](int(name[len(family) :].strip("_v-")), size, NUM_CLASSES)


def _task(config: SearchConfig, data: Data) -> Task:
    if config.normalise == "none":
        return data.task
    if "image" not in data.validation:
        raise ValueError("normalise scales images; the data are text.")

    def scale(images: Array, key: Any) -> Array:
        wide = lambda values: jnp.broadcast_to(jnp.array(values, jnp.float32), images.shape)
        mean, std = _IMAGENET
        return (images.astype(jnp.float32) / 255 - wide(mean)) / wide(std)

    return tasks.classification(NUM_CLASSES, transform=scale)


def _rows(examples: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    return {name: leaf[rows] for name, leaf in examples.items()}


Forward = Callable[[PyTree, PyTree, Any], tuple[PyTree, PyTree]]


def trainer(forward: Forward, task: Task, config: SearchConfig) -> Callable[..., Variables]:
    """Returns `fit(variables, examples, steps, key) -> variables`, one compiled scan.

    `forward(variables, inputs, key) -> (outputs, stats)` runs in training mode.
    """
    apply = lambda variables, inputs, train=True, key=None: forward(variables, inputs, key)
    loss = objective(Model(lambda key: None, apply, None), task)  # type: ignore
    optimizer = make_optimizer(config.finetune)
    size = config.batch_size

    @functools.partial(jax.jit, static_argnums=2)
    def fit(variables: Variables, examples: PyTree, steps: int, key: Array) -> Variables:
        rows = len(next(iter(examples.values())))
        schedule = optax.cosine_decay_schedule(1.0, steps)

        def step(carry, i):
            variables, opt_state = carry
            rows_key, batch_key = jax.random.split(jax.random.fold_in(key, i))
            chosen = jax.random.randint(rows_key, (size,), 0, rows)
            batch = {name: leaf[chosen] for name, leaf in examples.items()}
            grads, (stats, _, _) = jax.grad(loss, has_aux=True)(
                variables.params, variables, batch, jnp.ones(size), batch_key
            )
            with jax.numpy_dtype_promotion("standard"):  # optax mixes counts and floats
                updates, opt_state = optimizer.update(grads, opt_state, variables.params)
                updates = jax.tree.map(lambda u: (u * schedule(i)).astype(u.dtype), updates)
            params = optax.apply_updates(variables.params, updates)
            return (variables._replace(params=params, stats=stats), opt_state), None

        start = (variables, optimizer.init(variables.params))
        return jax.lax.scan(step, start, jnp.arange(steps))[0][0]

    return lambda v, examples, steps, key: fit(v, dict(examples), steps, key)


def make_strategy(
    name: str, network: search.Network, variables: Variables, problem: search.Problem,
    scores: Any, macs: float, evaluations: int, policy: str = "",
) -> search.Strategy:  # fmt: skip
    """The strategy of a name, on a problem."""
    size = len(problem.sizes)
    if name in ("gnn_rl", "gnn_rl_published", "agmc", "agmc_published"):
        graph = policy_graph(network, variables)
        if name == "gnn_rl_published":
            own, dense = search.costs(network), network.sizes.astype(np.int64)
            return gnn_rl_published(graph, lambda c: own.macs(c) / float(own.macs(dense)), macs)
        if name == "gnn_rl":
            return gnn_rl(graph, policy=load_policy(policy) if policy else None)
        agent = agmc if name == "agmc" else agmc_published
        return agent(graph, warm_up=warm_up_of(evaluations))
    if name == "magnitude":
        flat = [np.asarray(s).mean(0) if s.ndim > 1 else s for s in scores]
        return search.magnitude(problem, flat)
    return {
        "nsga2": lambda: search.nsga2(problem.sizes),
        "cma_es": lambda: search.cma_es(size),
        "random": lambda: search.random_search(size),
        "uniform": lambda: search.uniform(size),
    }[name]()


class Found(NamedTuple):
    """What the search gave."""

    network: search.Network
    kept: Any
    result: search.Result
    seconds: float


def find(config: SearchConfig, setting: Setting) -> Found:
    """Traces the model, searches, and goes on from the run's checkpoints where it was stopped."""
    model, variables, task = setting.model, setting.variables, setting.task
    calibration = subsample(setting.train, config.calibration_examples)
    rows = min(config.batch_size, len(next(iter(calibration.values()))))
    inputs = task.prepare(_rows(calibration, np.arange(rows)), None)[0]
    # A config of its family says one size of all heads.
    whole = ("qk_dim", "v_dim") if hub.has_format(model) else ()
    network = search.model_network(model, variables, inputs, whole=whole)
    if network.unknown:
        print(f"Primitives without a rule freeze what they touch: {network.unknown}.")
    names = ("macs", "parameters", "activation_bytes")
    shares = {name: float(getattr(config, name)) for name in names if getattr(config, name)}
    limits = list(search.budgets(network, **shares))
    if config.latency:
        limits.append(_latency(config, network, variables, inputs))
    scores = _importance(config, setting, network, inputs)
    order = search.ranks(scores)
    metric = "accuracy" if "label" in setting.reward else "loss"
    judged_on = lambda rows: search.task_problem(
        network, variables, order, limits, task, rows, calibration=calibration,
        metric=metric, batch_size=config.batch_size, channel_multiple=config.channel_multiple,
        repaired=config.score_repaired,
    )  # fmt: skip
    problem = judged_on(setting.reward)
    strategy = make_strategy(
        config.strategy,
        network,
        variables,
        problem,
        scores,
        config.macs,
        config.evaluations,
        config.policy,
    )
    evaluations = max(1, config.evaluations // strategy.batch) * strategy.batch
    evaluations = strategy.batch if config.strategy in ("uniform", "magnitude") else evaluations
    print(f"{len(network.groups)} groups; {config.strategy} tries {evaluations} candidates.")
    start = time.perf_counter()
    with Checkpointer(pathlib.Path(config.run_dir) / "search", keep=1) as checkpoints:
        key = jax.random.key(config.seed + 2)
        result = search.run(problem, strategy, evaluations, key, checkpoints=checkpoints, every=4)
    if config.strategy == "gnn_rl":
        path = pathlib.Path(config.run_dir) / "policy.safetensors"
        save_policy(path, search.transfer_policy(result.state.strategy))
    kept = search.keep(order, _final(config, setting, result, judged_on))
    return Found(network, kept, result, time.perf_counter() - start)


def _final(config: SearchConfig, setting: Setting, result: search.Result, judged_on) -> np.ndarray:
    """The best of the finalists on ever more rows: the luckiest on few need not be it."""
    few, rows = (len(next(iter(part.values()))) for part in (setting.reward, setting.aside))
    if not config.finalists or few == rows:
        return result.best_counts

    def again(count: int):
        more = judged_on(subsample(setting.aside, min(count, rows)))
        return lambda counts: jax.jit(more.evaluate)(more.data, counts)

    stages = [(again(4 * few), max(1, config.finalists // 4)), (again(16 * few), 1)]
    return search.halving(result, stages, config.finalists)[0]


def _latency(config: SearchConfig, network: search.Network, variables, inputs) -> search.Budget:
    """Measured once a run: one that goes on keeps its table, and so its candidates."""
    path = pathlib.Path(config.run_dir) / "latency.json"
    if path.exists():
        kept = json.loads(path.read_text())
        table = latency_of(network, np.array(kept["coefficients"]), kept["error"], kept["dense_s"])
    else:
        table = fit_latency(network, variables, jax.tree.map(lambda x: x[:32], inputs))
        kept = {"coefficients": table.coefficients.tolist(), "error": table.error,
                "dense_s": table.dense_s}  # fmt: skip
        path.write_text(json.dumps(kept) + "\n")
    print(f"Latency table: {table.error:.0%} off on slices that it did not see.")
    return table.budget(config.latency)


def _importance(config: SearchConfig, setting: Setting, network: search.Network, inputs: PyTree):
    slope = None
    if config.importance == "taylor":
        rows = min(config.batch_size, len(next(iter(setting.train.values()))))
        batch = _rows(setting.train, np.arange(rows))
        loss = objective(setting.model, setting.task)
        key = jax.random.key(config.seed)
        total = lambda v: loss(v.params, v, batch, jnp.ones(rows), key)[0]
        slope = jax.jit(lambda v: gradient(total, v))(setting.variables)
    given = (inputs,) if config.importance == "activation" else ()
    return search.importance(
        network, setting.variables, config.importance, gradient=slope, inputs=given
    )


def finish(config: SearchConfig, setting: Setting, found: Found) -> dict[str, Any]:
    """Cuts, calibrates, repairs, fine-tunes, measures; returns what the report shows.

    Repair and fine-tuning are kept where the reward rows say that they help.
    """
    network, kept, task = found.network, found.kept, setting.task
    variables = setting.variables
    calibration = subsample(setting.train, config.calibration_examples)
    prepared = task.prepare(calibration, None)[0]
    small = search.pruned(network, variables, kept)
    train = search.sliced(network, kept, 1)
    apply = lambda v, x, train=False: (small.apply(v, x), v.stats)
    report = lambda v: evaluate(apply, v, task, setting.report, config.batch_size)
    metric = "accuracy" if "label" in setting.reward else "loss"
    sign = 1 if metric == "accuracy" else -1

    def better(new: Variables, old: Variables) -> Variables:
        """The one with the higher score on the reward rows, which is not where it is reported."""
        score = lambda v: sign * evaluate(apply, v, task, setting.reward, config.batch_size)[metric]
        return new if score(new) >= score(old) else old

    size = min(64, len(jax.tree.leaves(prepared)[0]))
    batches = jax.tree.map(
        lambda x: x[: len(x) // size * size].reshape(-1, size, *x.shape[1:]), prepared
    )
    calibrated = jax.jit(lambda v: recalibrate(lambda v, x: train(v, x)[1], v, batches))
    stages = {"before calibration": report(small.params)}
    params = calibrated(small.params)
    stages["after calibration"] = report(params)
    if config.repair:
        mended = jax.jit(lambda v, x: search.repair(network, v, kept, x))(variables, prepared)
        mended = calibrated(search.cut(network, mended, kept))
        stages["after repair"] = report(mended)
        params = better(mended, params)
    if config.finetune_epochs:
        fit = trainer(lambda v, x, key: train(v, x), task, config)
        rows = len(next(iter(setting.train.values())))
        steps = max(1, config.finetune_epochs * rows // config.batch_size)
        tuned = fit(params, setting.train, steps, jax.random.key(config.seed + 3))
        stages["after fine-tuning"] = report(tuned)
        params = better(tuned, params)
    stages["kept"] = report(params)
    dense = evaluate(setting.model.apply, variables, task, setting.report, config.batch_size)
    folder = pathlib.Path(config.run_dir) / "pruned"
    search.save_pruned(folder, small._replace(params=params))
    _save_hugging_face(config, setting, params)
    speed = {}
    for size in (1, 32):
        inputs = jax.tree.map(lambda x, n=size: x[:n], prepared)
        everything = search.full(network)
        speed[f"batch {size}"] = (
            measure(network, variables, everything, (inputs,)),
            measure(network, variables, kept, (inputs,)),
        )
    return {
        "strategy": config.strategy, "seconds": found.seconds, "dense": dense, "stages": stages,
        "costs": small.table() | {"nominal_macs": _nominal(network, kept)},
        "ratios": small.ratios(), "latency_s": speed,
        "curve": found.result.curve.tolist(), "scores": found.result.scores.tolist(),
        "macs": _shares(network, found.result.counts, "macs"),
        "parameters": _shares(network, found.result.counts, "parameters"),
        "frozen": network.frozen,
        "unknown": network.unknown,
    }  # fmt: skip


def _nominal(network: search.Network, kept: Any) -> tuple[float, float]:
    count = search.nominal_macs(network)
    now = search.counts_of(network, kept)
    return float(count(network.sizes.astype(np.int64))), float(count(now))


def _shares(network: search.Network, counts: np.ndarray, name: str) -> list[float]:
    cost, dense = getattr(search.costs(network), name), network.sizes.astype(np.int64)
    return [float(cost(k.astype(np.int64)) / cost(dense)) for k in counts]


def _save_hugging_face(config: SearchConfig, setting: Setting, params: Variables) -> None:
    """A pruned transformer in its own format; a language model is a draft for its parent."""
    if not hub.has_format(setting.model):
        return
    tokenizer = setting.data.tokenizer
    name = "huggingface" if tokenizer is None else "draft"
    folder = pathlib.Path(config.run_dir) / name
    try:
        hub.save(setting.model, params, folder, tokenizer=tokenizer)
    except ValueError as error:  # pruned/ holds it anyway
        print(f"{name}: not written. {error}")
        return
    print(f"{name}: {folder}")


def main(config: SearchConfig) -> None:
    """The whole run."""
    use_cores(config.batch_size)
    run_dir = open_run(config, config.run_dir)
    setting = prepare(config)
    found = find(config, setting)
    results = finish(config, setting, found)
    save_results(run_dir, "search", results)
    for name, (before, after) in results["costs"].items():
        print(f"{name}: {before:,.0f} -> {after:,.0f} ({after / before:.1%})")
    metric = "accuracy" if "accuracy" in results["dense"] else "bits_per_byte"
    print(f"test {metric}: {results['dense'][metric]:.4f} dense")
    for stage, metrics in results["stages"].items():
        print(f"test {metric}: {metrics[metric]:.4f} {stage}")
    print(f"report: {write_report(run_dir)}")


if __name__ == "__main__":
    configs.run(main, SearchConfig)
