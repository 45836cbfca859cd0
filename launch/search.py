"""Shrinks a model to a budget: search, repair, fine-tuning, and a report of what it cost.

    python -m jaxfm.launch.search
    python -m jaxfm.launch.search --model=resnet20 --weights=resnet20.npz --normalise=imagenet \\
        --data.source=cifar10 --data.folder=cifar10.npz --data.partition=iid --finetune_epochs=3
    python -m jaxfm.launch.search --model=runs/demo/model --data.source=stdlib --parameters=0.5

Without weights, or where a folder's model needs a new head, the dense model is trained first. Rows
have separate purposes: training rows train, re-estimate statistics and repair; the reward of the
search comes from validation rows (for a model that was trained elsewhere, from one half of the test
rows), and the report from test rows that nothing else has seen. The run folder holds config,
results, report.html and pruned/ (parameters, manifest, program). Transformers are also written in
Hugging Face format where it can express them: language models to draft/, others to huggingface/.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from jaxfm import config as configs
from jaxfm import hub, search, tasks
from jaxfm.data.augment import image_transform
from jaxfm.data.dealing import subsample
from jaxfm.data.federation import merge
from jaxfm.hub import torch_vision
from jaxfm.launch.cores import use_cores
from jaxfm.launch.optimizers import make_optimizer
from jaxfm.launch.report import write_report
from jaxfm.launch.search_config import SearchConfig
from jaxfm.launch.setup import Data, ModelConfig, load_data, make_model, save_classes
from jaxfm.model import Model, Variables
from jaxfm.models import build, mobilenet_config, resnet_config, shufflenet_config, vgg_config
from jaxfm.run_folder import in_folder, open_run, save_results
from jaxfm.search import Refinement, Rows, Selection
from jaxfm.tasks import Task, evaluate

# The published networks by name: (number, image shape, fields) to a config.
_NAMED: dict[str, Callable[..., Any]] = {
    "resnet": lambda n, shape, **fields: resnet_config(n, **fields),
    "vgg": lambda n, shape, **fields: vgg_config(n, cifar=shape[0] < 64, **fields),
    "mobilenet": lambda n, shape, **fields: mobilenet_config(n, **fields),
    "shufflenet": lambda n, shape, **fields: shufflenet_config(n, **fields),
}
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Setting(NamedTuple):
    """A dense model, its task, and rows by purpose."""

    data: Data
    task: Task
    model: Model
    variables: Variables
    rows: Rows


def prepare(config: SearchConfig) -> Setting:
    """Loads or trains the dense model and sets rows aside."""
    if config.policy:
        search.load_policy(config.policy)  # refused now, not after the dense training
    source = config.model if pathlib.Path(config.model).is_dir() else config.network.family
    data = load_data(config.data, config.seed, ModelConfig(family=source))
    task, train = _task(config, data), merge(data.train)
    elsewhere = bool(config.weights) or pathlib.Path(config.model).is_dir()
    reward, report = data.validation, data.test
    if elsewhere:  # its training rows are not known, so one half of the test rows is the reward
        count = len(next(iter(data.test.values())))
        halves = search.split_rows(count, 0, count // 2, seed=config.seed)
        reward, report = (_take(data.test, part) for part in (halves.reward, halves.report))
    for part, left in (("validation", reward), ("test", report)):
        if not len(next(iter(left.values()))):
            raise ValueError(
                f"data.source={config.data.source}: the {part} split is empty; give more data."
            )
    rows = Rows(
        train=train,
        calibration=subsample(train, config.calibration_examples),
        reward=subsample(reward, config.reward_examples),
        aside=reward,
        report=report,
    )
    return Setting(data, task, *_dense_model(config, data, task, rows), rows)


def _dense_model(
    config: SearchConfig, data: Data, task: Task, rows: Rows
) -> tuple[Model, Variables]:
    variables = None
    if config.model == "auto":
        model = make_model(config.network, data)
    elif pathlib.Path(config.model).is_dir():
        fitted = hub.load_for(data, config.model, seed=config.seed)
        print(*fitted.notes, sep="\n", end="\n" if fitted.notes else "")
        model = hub.pretrained(fitted.model, fitted.variables)
        variables = None if fitted.drawn else fitted.variables
    else:
        model = build(_named(config.model, data))
    if config.weights:
        model, variables = torch_vision.load_torch(model.config, config.weights)
    if variables is not None:
        return model, variables
    print(f"Training the dense model: {config.train_steps} steps.")
    start = model.init(jax.random.key(config.seed))
    search.check_shares(
        model, start, task, rows, _shares(config), channel_multiple=config.channel_multiple
    )
    forward = lambda v, x, key: model.apply(v, x, train=True, key=key)
    fit = search.fine_tuner(forward, task, make_optimizer(config.finetune), config.batch_size)
    return model, fit(start, rows.train, config.train_steps, jax.random.key(config.seed + 1))


def _take(examples: Mapping[str, Any], rows: Any) -> dict[str, Any]:
    return {name: leaf[rows] for name, leaf in examples.items()}


def _named(name: str, data: Data) -> Any:
    family = name.rstrip("0123456789").rstrip("_v-")
    number = name[len(family) :].strip("_v-")
    if family not in _NAMED or not number.isdigit():
        raise ValueError(
            f"model={name!r} is neither a folder nor a known network; give auto, or one of "
            f"{sorted(_NAMED)} with a number, as in resnet20."
        )
    if "image" not in data.validation:
        raise ValueError(f"model={name} takes images; these data have none.")
    shape = data.validation["image"].shape[1:]
    return _NAMED[family](int(number), shape, num_classes=len(data.classes), num_channels=shape[2])


def _task(config: SearchConfig, data: Data) -> Task:
    if config.normalise == "none":
        return data.task
    if "image" not in data.validation:
        raise ValueError(f"normalise={config.normalise} scales images, but the data are text.")

    mean, std = _IMAGENET
    if data.validation["image"].shape[3] != len(mean):
        raise ValueError(
            f"normalise={config.normalise} is for images of {len(mean)} channels; these have "
            f"{data.validation['image'].shape[3]}."
        )
    scale = image_transform(mean=mean, std=std)
    return tasks.classification(len(data.classes), transform=scale)


def _shares(config: SearchConfig) -> dict[str, float]:
    names = ("macs", "parameters", "activation_bytes", "latency")
    return {name: getattr(config, name) for name in names}


def find(config: SearchConfig, setting: Setting) -> Selection:
    """Searches within the budgets of a config, and goes on where the run was stopped."""
    return search.select_units(
        setting.model, setting.variables, setting.task, setting.rows,
        _shares(config),
        strategy=config.strategy,
        policy=search.load_policy(config.policy) if config.policy else None,
        importance=config.importance,
        channel_multiple=config.channel_multiple,
        evaluations=config.evaluations,
        finalists=config.finalists,
        score_repaired=config.score_repaired,
        batch_size=config.batch_size,
        seed=config.seed,
        folder=config.run_dir,
    )  # fmt: skip


def finish(config: SearchConfig, setting: Setting, selection: Selection) -> dict[str, Any]:
    """Refines, saves and measures the model; returns what the report shows."""
    task, rows, size = setting.task, setting.rows, config.batch_size
    refinement = search.refine(
        setting.variables, selection, task, rows, make_optimizer(config.finetune),
        repair=config.repair, finetune_epochs=config.finetune_epochs, batch_size=size,
        seed=config.seed,
    )  # fmt: skip
    search.save_pruned(pathlib.Path(config.run_dir) / "pruned", refinement.model)
    _save_hugging_face(config, setting, refinement)
    return {
        "strategy": config.strategy,
        "dense": evaluate(setting.model.apply, setting.variables, task, rows.report, size),
        **search.summarise(selection, refinement),
        "latency_s": search.measure_speed(setting.variables, selection, task, rows),
    }


def _save_hugging_face(config: SearchConfig, setting: Setting, refinement: Refinement) -> None:
    """Writes a pruned transformer in its own format; a language model drafts for its parent."""
    if not hub.has_format(setting.model):
        return
    tokenizer = setting.data.tokenizer
    name = "huggingface" if setting.data.classes else "draft"
    folder = pathlib.Path(config.run_dir) / name
    try:
        hub.save(
            setting.model, refinement.model.params, folder, tokenizer,
            classes=setting.data.classes,
        )  # fmt: skip
    except ValueError as error:  # pruned/ holds it anyway
        print(f"{name}: not written. {error}")
        return
    print(f"{name}: {folder}")


def main(config: SearchConfig) -> None:
    """Runs the search and writes its report."""
    use_cores(config.batch_size)
    words = (config.strategy, config.model if config.model != "auto" else "", config.data.source)
    config = in_folder(config, "search", *words)
    run_dir = open_run(config, config.run_dir)
    setting = prepare(config)
    save_classes(run_dir, setting.data)
    results = finish(config, setting, find(config, setting))
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
