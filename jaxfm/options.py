"""Options from signatures: a function's keyword arguments as command-line flags.

    def spatl(model: Model, task: Task, *, keep: float = 0.5, select: Select | None = None): ...

    @with_options("algorithm", {"fed_avg": options_config(fed_avg), "spatl": options_config(spatl)})
    @dataclasses.dataclass(frozen=True)
    class Config:
        algorithm: str = option("fed_avg", "how the model is trained")

The config has a section for each function that has options: --algorithm=spatl --spatl.keep=0.7.
Help texts are those of the docstring's "Args:". `chosen_options(config, "algorithm")` gives the
arguments to call the chosen function with.

An option is a keyword-only parameter of a plain type (`jaxfm.plain_types`). All others, such as
models and functions, are the caller's to give.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

from jaxfm.config import check, section
from jaxfm.config_fields import fields_of
from jaxfm.plain_types import is_plain

C = TypeVar("C", bound=type)


class Option(NamedTuple):
    """A parameter that can be given as a text.

    Attributes:
      name: of the parameter.
      annotation: its type.
      default: its default; dataclasses.MISSING: it must be given.
      help: what the docstring says of it, on one line and without a final full stop.
    """

    name: str
    annotation: Any
    default: Any
    help: str


def options_of(function: Callable, skip: Collection[str] = ()) -> tuple[Option, ...]:
    """The options of a function: its keyword-only parameters of plain types.

    Args:
      function: with annotations, and a docstring with an "Args:" section.
      skip: names of parameters that are not options.
    Raises:
      ValueError: `skip` has a name that the function has no parameter for.

    >>> def prune(model, *, keep: float = 0.5, score=None):
    ...     '''Prunes.
    ...
    ...     Args:
    ...       keep: share of the channels that stay.
    ...       score: of each channel.
    ...     '''
    >>> [(option.name, option.default, option.help) for option in options_of(prune)]
    [('keep', 0.5, 'share of the channels that stay')]
    """
    parameters = inspect.signature(function).parameters
    unknown = sorted(set(skip) - set(parameters))
    if unknown:
        raise ValueError(f"{_name(function)} has no parameter {unknown[0]!r} to skip.")
    hints, helps = typing.get_type_hints(_inner(function)), argument_docs(function)
    return tuple(
        Option(
            name=parameter.name,
            annotation=hints[parameter.name],
            default=dataclasses.MISSING if _is_required(parameter) else parameter.default,
            help=helps.get(parameter.name, ""),
        )
        for parameter in parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        and parameter.name not in skip
        and is_plain(hints.get(parameter.name))
    )


def options_config(
    function: Callable, *, name: str = "", skip: Collection[str] = (),
    defaults: Mapping[str, Any] = {},
) -> type:  # fmt: skip
    """A frozen config class with a field for each option of a function.

    An option without a default may be left out of the config, where it is None; it is shown as
    required, and `arguments` raises if it is missing.

    Args:
      function: as in `options_of`.
      name: of the class, by default the function's.
      skip: names of parameters that are not options.
      defaults: values that replace the function's defaults.
    Raises:
      ValueError: `skip` or `defaults` has a name that is not an option's.
    """
    doc = (inspect.getdoc(_inner(function)) or f"Options of {_name(function)}.").splitlines()[0]
    return config_of(name or _name(function), options_of(function, skip), doc, defaults)


def config_of(
    name: str, options: Iterable[Option], doc: str, defaults: Mapping[str, Any] = {}
) -> type:
    """A frozen config class with a field for each of some options; see `options_config`.

    Args:
      name: of the class.
      options: of one function, or of several.
      doc: one sentence that --help shows over them.
      defaults: values that replace the functions' defaults.
    Raises:
      ValueError: `defaults` has a name that is not an option's.
    """
    options = list(options)
    unknown = sorted(set(defaults) - {option.name for option in options})
    if unknown:
        raise ValueError(f"{name} has no option {unknown[0]!r} to set a default of.")
    fields: list[tuple[str, Any, dataclasses.Field]] = []
    for option in options:
        default = defaults.get(option.name, option.default)
        required = default is dataclasses.MISSING
        fields.append((
            option.name,
            option.annotation | None if required else option.annotation,
            dataclasses.field(
                default=None if required else default,  # type: ignore[arg-type]
                metadata={"help": option.help, "required": required},
            ),
        ))  # fmt: skip
    namespace = {"__doc__": doc, "__post_init__": check, "__module__": __name__}
    return dataclasses.make_dataclass(name, fields, frozen=True, namespace=namespace)


def with_options(choice: str | tuple[str, ...], configs: Mapping[str, type]) -> Callable[[C], C]:
    """A decorator that gives a config class a section of options for each value of a field.

    Args:
      choice: name of the field, or names of several, of type str or tuple[str, ...]. They then
        accept the names in `configs` only.
      configs: for each name its options, of `options_config`. One without fields gets no section.
    """
    choices = (choice,) if isinstance(choice, str) else choice
    names: Any = Literal[tuple(configs)]  # type: ignore[valid-type]

    def decorate(cls: C) -> C:
        fields: list[tuple[str, Any, Any]] = []
        for field, annotation in fields_of(cls):
            if field.name in choices:
                narrowed = names if annotation is str else tuple[names, ...]
                fields.append((field.name, narrowed, _copy(field)))
        for name, options in configs.items():
            if dataclasses.fields(options):
                fields.append((name, options, section(options(), choices, name)))
        namespace = {"__doc__": cls.__doc__, "__module__": cls.__module__}
        made = dataclasses.make_dataclass(
            cls.__name__, fields, bases=(cls,), frozen=True, namespace=namespace
        )
        return typing.cast(C, made)

    return decorate


def chosen_options(config: Any, choice: str) -> dict[str, Any]:
    """The keyword arguments of the function that the field `choice` names.

    Raises:
      ValueError: a required one is missing.
    """
    name = getattr(config, choice)
    options = getattr(config, name, None)
    return {} if options is None else arguments(options, name)


def arguments(options: Any, name: str = "") -> dict[str, Any]:
    """The keyword arguments that a config of `options_config` holds.

    Args:
      options: the config.
      name: of the section, for the message.
    Raises:
      ValueError: a required one is missing.
    """
    values = {}
    for field in dataclasses.fields(options):
        values[field.name] = getattr(options, field.name)
        if values[field.name] is None and field.metadata.get("required"):
            full = f"{name or type(options).__name__}.{field.name}"
            raise ValueError(f"{full} must be given: {field.metadata['help']}.")
    return values


def argument_docs(function: Callable) -> dict[str, str]:
    """What the "Args:" section of a docstring says of each parameter.

    `a, b: text` speaks of both. Lines are joined, and a final full stop is left out.
    """
    doc = inspect.getdoc(_inner(function)) or ""
    match = re.search(r"^Args:\n((?:[ ]+\S.*\n|\s*\n)*)", doc + "\n", re.MULTILINE)
    if match is None:
        return {}
    lines = [line for line in match.group(1).splitlines() if line.strip()]
    indent = min((len(line) - len(line.lstrip()) for line in lines), default=0)
    docs: dict[str, str] = {}
    names: list[str] = []
    for line in lines:
        head = re.match(rf"[ ]{{{indent}}}(\*{{0,2}}\w+(?:, \*{{0,2}}\w+)*): ?(.*)", line)
        if head:
            names = [name.lstrip("*") for name in head.group(1).split(", ")]
        text = head.group(2) if head else line.strip()
        for name in names:
            docs[name] = f"{docs.get(name, '')} {text}".strip()
    return {name: text.removesuffix(".") for name, text in docs.items()}


def _inner(function: Callable) -> Callable:
    """The function that was written, below partials and wrappers."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.unwrap(function)


def _name(function: Callable) -> str:
    return getattr(_inner(function), "__name__", "function")


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is inspect.Parameter.empty


def _copy(field: dataclasses.Field) -> Any:
    """A new field with the default and the metadata of a field."""
    return dataclasses.field(
        default=field.default, default_factory=field.default_factory, metadata=field.metadata
    )  # type: ignore[call-overload]
