"""The registry: every algorithm by its name, and how a run makes one.

A file in `federated/algorithms` registers its factory, and `train` scripts, the contract test and
benchmarks find it here; a user's own file works in the same way (`load_file`):

    @register
    def fed_new(model: Model, task: Task, local: Local, *, strength: float = 0.1) -> Algorithm:

Parameters that a run offers (`Setting`: model, task, local, num_clients, tiers, ...) are filled in
by name. Others of plain types are options: on the command line `--fed_new.strength=0.3`, explained
by the docstring. What is neither is supplied by a function of the setting, whose own keywords are
options too: `@register(select=selection_for)`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import pathlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfm.federated.algorithm import Algorithm, IsPersonal
from jaxfm.federated.local import Local
from jaxfm.federated.wrappers.masters import has_halves, wide_model, widened, with_masters
from jaxfm.model import Model, PyTree, Variables
from jaxfm.options import Option, options_of
from jaxfm.subnet import Subnet, extract
from jaxfm.tasks import Task

LAWS = {
    "identical_clients": "Several clients with the same rows equal one client.",
    "one_step": "One client that takes one step moves the global model by a gradient step.",
    "statistics": "Statistics of batch norm are averaged over clients by their examples.",
}


class Setting(NamedTuple):
    """What a run offers to the factory of an algorithm.

    Attributes:
      model: of full width.
      variables: that the run starts from.
      task: what is learned.
      local: how clients train.
      num_clients: all that there are.
      total_examples: training rows of all of them; with weights, the sum of these.
      num_rounds: of the run.
      is_last: of the path of a leaf, whether it belongs to the last layer.
      tiers: slices of the model, the widest first.
      axes: the axes that tiers cut.
      tier_of: `() -> i32[C]`, the tier that each client's machine can hold.
      public: unlabelled examples of the server's; None: there are none.
      some: a few examples, for the shapes of inputs.
      num_classes: of labels; None: the task has none.
    """

    model: Model
    variables: Variables
    task: Task
    local: Local
    num_clients: int
    total_examples: float
    num_rounds: int
    is_last: IsPersonal
    tiers: tuple[Subnet, ...]
    axes: tuple[str, ...]
    tier_of: Callable[[], np.ndarray]
    public: Mapping[str, Any] | None
    some: Mapping[str, Any]
    num_classes: int | None

    @property
    def models(self) -> list[Model]:
        """The tiers as architectures of their own, each initialised by its own key."""

        def cut(tier: Subnet) -> Model:
            model = self.model
            return model._replace(init=lambda key: extract(model.init(key), model.axes, tier))

        return [cut(tier) for tier in self.tiers]

    @property
    def inputs(self) -> PyTree:
        """A few inputs of the model, as the task prepares them."""
        return self.task.prepare(dict(self.some), None)[0]

    @property
    def public_inputs(self) -> PyTree:
        """The inputs of the public examples, as the task prepares them, having seen no label."""
        from jaxfm.federated.parts.ensemble import public_inputs

        return public_inputs(self.task, self.public)[0]


class Entry(NamedTuple):
    """A registered algorithm.

    Attributes:
      name: of the factory.
      factory: `(...) -> Algorithm`.
      supply: by parameter, `(setting, **options) -> value`.
      like: the algorithm that this one is a variant of, from the same parts; None: of none.
      breaks: by name of a law (`LAWS`), why this algorithm does not keep it.
      has_tiers: whether the tiers of a run make a difference.
      adapted: whether its model must have an adapter.
      options: the plain keywords of the factory and of what is supplied.
    """

    name: str
    factory: Callable[..., Algorithm]
    supply: Mapping[str, Callable[..., Any] | None]
    like: str | None
    breaks: Mapping[str, str]
    has_tiers: bool
    adapted: bool
    options: tuple[Option, ...]


_ENTRIES: dict[str, Entry] = {}


def register(
    factory: Callable[..., Algorithm] | None = None,
    *,
    like: str | None = None,
    breaks: Mapping[str, str] | None = None,
    has_tiers: bool | None = None,
    adapted: bool = False,
    **supply: Callable[..., Any] | None,
) -> Any:
    """Registers the factory of an algorithm under its own name; a decorator.

    Args:
      factory: of keyword parameters; see the module.
      like: the algorithm of which it is a variant.
      breaks: laws of the contract that it does not keep, each with the reason.
      has_tiers: whether the tiers of a run make a difference; None: if the factory takes "tiers" or
        "models". Needed where only a function of `supply` reads them.
      adapted: whether its model must have an adapter (`jaxfm.adapters`).
      **supply: functions of the `Setting` for parameters that it does not offer by name; None
        leaves a parameter at its default.
    Raises:
      ValueError: an unknown law, a supplied parameter that the factory lacks, one option twice.
    """
    if factory is None:
        return functools.partial(
            register, like=like, breaks=breaks, has_tiers=has_tiers, adapted=adapted, **supply
        )
    name, breaks = factory.__name__, dict(breaks or {})
    unknown = [law for law in breaks if law not in LAWS]
    if unknown:
        raise ValueError(f"{name}: there is no law {unknown[0]!r}; laws are {sorted(LAWS)}.")
    parameters = inspect.signature(factory).parameters
    lost = [parameter for parameter in supply if parameter not in parameters]
    if lost:
        raise ValueError(f"{name} has no parameter {lost[0]!r}; it has {list(parameters)}.")
    given = [parameter for parameter in _OFFERED if parameter in parameters]
    options = list(options_of(factory, skip=(*supply, *given)))
    for function in filter(None, supply.values()):
        options += options_of(function)
    names = [option.name for option in options]
    twice = [option for option in names if names.count(option) > 1]
    if twice:
        raise ValueError(f"{name} has the option {twice[0]!r} twice; rename one.")
    if has_tiers is None:
        has_tiers = not {"tiers", "models"}.isdisjoint(parameters)
    _ENTRIES[name] = Entry(
        name=name,
        factory=factory,
        supply=supply,
        like=like,
        breaks=breaks,
        has_tiers=has_tiers,
        adapted=adapted,
        options=tuple(options),
    )
    return factory


_OFFERED = (*Setting._fields, "models", "inputs", "public_inputs")


def entries() -> dict[str, Entry]:
    """All registered algorithms by name, those of `federated/algorithms` first, file by file."""
    algorithms = importlib.import_module("jaxfm.federated.algorithms")
    modules = [m.name for m in pkgutil.iter_modules(algorithms.__path__, f"{algorithms.__name__}.")]
    for module in modules:
        importlib.import_module(module)
    place = {module: number for number, module in enumerate(modules)}
    known = sorted(
        _ENTRIES.values(), key=lambda entry: place.get(entry.factory.__module__, len(place))
    )
    return {entry.name: entry for entry in known}


def find(name: str) -> Entry:
    """The entry of an algorithm by its name, or by the path of a file that registers one.

    Raises:
      ValueError: there is none.
    """
    if name.endswith(".py"):
        return load_file(name)
    known = entries()
    if name not in known:
        raise ValueError(
            f"There is no algorithm {name!r}; choose one of {', '.join(known)}, or give the path "
            "of a .py file that registers one."
        )
    return known[name]


@functools.cache
def load_file(path: str | os.PathLike[str]) -> Entry:
    """Runs a user's file and returns the last algorithm that it registers.

    Raises:
      ValueError: there is no such file, it raises an error, or it registers nothing.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path} to read an algorithm from.")
    before = list(entries().values())
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except Exception as error:  # the user's code may do anything
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise ValueError(
            f"{path} cannot be run ({reason}); --traceback shows where it fails."
        ) from error
    new = [entry for entry in _ENTRIES.values() if entry not in before]
    if not new:
        raise ValueError(
            f"{path} registers no algorithm; put @register (of jaxfm.federated) over its factory."
        )
    return new[-1]


def load_named_files(argv: Sequence[str]) -> list[str]:
    """Registers the algorithms of .py files that a command line names.

    Args:
      argv: with `--algorithm=path.py` or `--compare=fed_avg,path.py`, say.
    Returns:
      The same command line with the algorithms' names in the place of paths.
    """

    def named(argument: str) -> str:
        flag, equals, value = argument.partition("=")
        if flag.lstrip("-") not in ("algorithm", "compare") or not equals:
            return argument
        names = [find(name).name if name.endswith(".py") else name for name in value.split(",")]
        return f"{flag}={','.join(names)}"

    return [named(argument) for argument in argv]


def make(entry: Entry, setting: Setting, options: Mapping[str, Any] | None = None) -> Algorithm:
    """The algorithm of an entry for a run; over a model of 16 bits one that keeps 32.

    Args:
      setting: what the run offers.
      options: values by name; those that are left out keep their defaults.
    Raises:
      ValueError: an unknown option, or a parameter that nothing supplies.
    """
    if not has_halves(setting.variables):
        return _made(entry, setting, dict(options or {}))
    over = setting._replace(model=wide_model(setting.model), variables=widened(setting.variables))
    return with_masters(*(_made(entry, each, dict(options or {})) for each in (setting, over)))


def _made(entry: Entry, setting: Setting, options: Mapping[str, Any]) -> Algorithm:
    unknown = options.keys() - {option.name for option in entry.options}
    if unknown:
        known = [option.name for option in entry.options]
        raise ValueError(f"{entry.name} has no option {sorted(unknown)[0]!r}; it has {known}.")
    values: dict[str, Any] = {}
    for name, parameter in inspect.signature(entry.factory).parameters.items():
        if name in entry.supply:
            function = entry.supply[name]
            if function is None:
                continue
            own = {o.name for o in options_of(function)}
            values[name] = function(setting, **{n: v for n, v in options.items() if n in own})
        elif name in _OFFERED:
            values[name] = getattr(setting, name)
        elif name in options:
            values[name] = options[name]
        elif parameter.default is inspect.Parameter.empty:
            raise ValueError(
                f"{entry.name} needs {name!r}, which a run does not offer; say where it comes "
                f"from: @register({name}=...)."
            )
    return entry.factory(**values)


def last_layer(model: Model) -> IsPersonal:
    """A predicate of paths that holds for the classifier; of a perceptron, for its last layer."""
    from jaxfm.federated.partition import head, under

    def place(name: str) -> tuple[str, int]:  # conv3 stands before dense1, dense9 before dense10
        kind = name.rstrip("0123456789")
        return kind, int(name[len(kind) :] or 0)

    params = jax.eval_shape(model.init, jax.random.key(0)).params
    is_map = lambda part: any(leaf.ndim > 1 for leaf in jax.tree.leaves(part))  # no norm
    names = sorted([name for name in params if is_map(params[name])] or params, key=place)
    return head if {"head", "classifier"} & params.keys() else under(names[-1])
