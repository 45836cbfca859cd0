"""Typed configs: frozen dataclasses with their command-line flags and their JSON.

    @dataclasses.dataclass(frozen=True)
    class Config:
        rounds: int = option(100, "rounds of training")
        sampler: Literal["uniform", "weighted"] = option("uniform", "how a cohort is drawn")
        model: ModelConfig = ModelConfig()  # its fields become --model.family, ...

        def __post_init__(self):
            check(self)
            if self.rounds < 1:
                raise ValueError(f"rounds={self.rounds}: give at least 1.")

    def main(config: Config) -> None: ...

    if __name__ == "__main__":
        run(main, Config)

A field is an int, float, str, bool, Literal, tuple of these, any of these or None, or another
config, whose name alone stands for its first field (--model=cnn). A name that is unknown, in code,
in a file or on the command line, raises with a suggestion.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import pathlib
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, Union

from absl import app, flags, logging

T = TypeVar("T")


def option(default: T, help: str) -> T:
    """A config field with its default and the line that --help shows (say the unit)."""
    return dataclasses.field(default=default, metadata={"help": help})


def check(config: Any) -> None:
    """Checks each field against its annotation; for `__post_init__`.

    An int given for a float becomes one, a list given for a tuple likewise, so that equal configs
    are equal.

    Raises:
        TypeError: a value is not of its field's type; the message names both.
        ValueError: a Literal field holds something else.
    """
    for field, annotation in _fields(type(config)):
        value = _convert(annotation, getattr(config, field.name), field.name)
        object.__setattr__(config, field.name, value)


def override(config: T, *assignments: str) -> T:
    """The config with some fields replaced: `override(config, "rounds=3", "model.width=64")`.

    Raises:
        ValueError: an unknown name (with a suggestion), or a text that is not a value of the field.
    """
    values = to_dict(config)
    known = _names(type(config))
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"{assignment!r}: write name=value.")
        if name not in known:
            hint = _suggest(name, known, helps={full: leaf.help for full, leaf in known.items()})
            raise ValueError(f"{type(config).__name__} has no {name!r}. {hint}")
        leaf = known[name]
        _put(values, leaf.name, _parse(leaf.annotation, text, leaf.name))
    return from_dict(type(config), values)


def to_dict(config: Any) -> dict[str, Any]:
    """The config as JSON values; infinities and NaN as the strings that `float` reads."""
    return {
        field.name: _to_json(getattr(config, field.name)) for field in dataclasses.fields(config)
    }


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """The inverse of `to_dict`; what is left out keeps its default.

    Raises:
        ValueError: an unknown name, with a suggestion.
        TypeError: a value of another type than the field's, or a required one left out.
    """
    return _from_dict(cls, values, "", None)


def save(config: Any, path: str | os.PathLike[str]) -> None:
    """Writes the config as JSON."""
    pathlib.Path(path).write_text(json.dumps(to_dict(config), indent=2, allow_nan=False) + "\n")


def load(cls: type[T], path: str | os.PathLike[str]) -> T:
    """Reads what `save` wrote; raises like `from_dict`, FileNotFoundError without a file."""
    return from_dict(cls, _read(path))


def define_flags(cls: type, flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines an absl flag for each field of `cls` (--model.width for a nested one), and --config.

    Raises:
        TypeError: a field is of a type that has no textual form.
    """
    for name, leaf in _names(cls).items():
        if leaf.annotation is bool:
            flag: flags.Flag = flags.BooleanFlag(name, None, leaf.help)
        else:
            flag = flags.Flag(_Parser(leaf), None, name, None, leaf.help)
        flags.DEFINE_flag(flag, flag_values, module_name=sys.argv[0])
    if "config" not in flag_values:
        flags.DEFINE_string("config", None, _CONFIG_HELP, flag_values=flag_values)


def from_flags(cls: type[T], flag_values: flags.FlagValues = flags.FLAGS) -> T:
    """The config that parsed flags describe: defaults, then --config, then the flags given."""
    path = flag_values["config"].value
    values = _read(path) if path else {}
    for name, leaf in reversed(_names(cls).items()):  # a field's full name wins
        if flag_values[name].present:
            _put(values, leaf.name, _to_json(flag_values[name].value))
    return from_dict(cls, values)


def run(main: Callable[[T], object], cls: type[T]) -> None:
    """Runs `main` on the config that the command line describes, then exits.

    A mistake on the command line gives one sentence and exit status 2; --help describes every
    field.
    """

    def parse(argv: Sequence[str]) -> T:
        if {"--help", "-help", "-h"} & set(argv[1:]):
            print(describe(cls, sys.modules["__main__"].__doc__ or cls.__doc__ or ""))
            sys.exit(0)
        try:
            extra = flags.FLAGS(argv)[1:]
            if extra:
                raise ValueError(f"{extra[0]!r} is no flag: write --name=value.")
            return from_flags(cls)
        except flags.UnrecognizedFlagError as error:
            helps = {"config": _CONFIG_HELP}
            helps |= {name: leaf.help for name, leaf in _names(cls).items()}
            hint = _suggest(error.flagname, helps, "--", helps)
            message = f"Unknown flag --{error.flagname}. {hint}"
        except (flags.Error, ValueError, TypeError, OSError) as error:
            message = str(error)
        print(f"error: {message}\nTry --help.", file=sys.stderr)
        sys.exit(2)

    def guarded(config: T) -> None:
        try:
            main(config)
        except KeyboardInterrupt:
            print("\nInterrupted.", file=sys.stderr)
            sys.exit(130)

    define_flags(cls)
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file at INFO
    app.run(guarded, flags_parser=parse)  # type: ignore[arg-type]  # what parse returns goes to main


def describe(cls: type, text: str = "") -> str:
    """The text of --help: `text`, then every field with its default, type and meaning."""
    lines = [text.strip(), "", "Flags, written --name=value:", f"  --config\n      {_CONFIG_HELP}"]
    section = ""
    for leaf in _options(cls):
        head = leaf.name.rpartition(".")[0]
        if head != section:
            lines += ["", f"{head}: {(leaf.owner.__doc__ or '').strip().splitlines()[0]}"]
            lines.append(f"  --{head}=X is --{leaf.name}=X.")
            section = head
        default = "required" if leaf.default is dataclasses.MISSING else _show(leaf.default)
        lines.append(f"  --{leaf.name}={default}  ({_type_name(leaf.annotation)})")
        lines += textwrap.wrap(leaf.help, 92, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


_CONFIG_HELP = "a config.json to start from, as every run folder has one; flags given here win"


class _Option(NamedTuple):
    """A leaf of a config class."""

    name: str  # dotted
    annotation: Any
    default: Any  # dataclasses.MISSING where it must be given
    help: str
    owner: type


class _Parser(flags.ArgumentParser):
    """absl's view of `_parse`."""

    def __init__(self, leaf: _Option):
        self.leaf = leaf
        self.syntactic_help = _type_name(leaf.annotation)

    def parse(self, argument: str) -> Any:
        return _parse(self.leaf.annotation, argument, self.leaf.name)


def _fields(cls: type) -> list[tuple[dataclasses.Field, Any]]:
    hints = typing.get_type_hints(cls)
    return [(field, hints[field.name]) for field in dataclasses.fields(cls)]


def _is_config(annotation: Any) -> bool:
    return dataclasses.is_dataclass(annotation)


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _options(cls: type, prefix: str = "", base: Any = None) -> Iterator[_Option]:
    """The leaves, own fields first. `base` holds the defaults where a parent config sets them."""
    nested = []
    for field, annotation in _fields(cls):
        default = _default(field) if base is None else getattr(base, field.name)
        if _is_config(annotation):
            missing = default is dataclasses.MISSING
            nested.append((annotation, f"{prefix}{field.name}.", None if missing else default))
            continue
        _type_name(annotation)  # raises for a type without a textual form
        help = field.metadata.get("help", "")
        yield _Option(prefix + field.name, annotation, default, help, cls)
    for arguments in nested:
        yield from _options(*arguments)


def _names(cls: type) -> dict[str, _Option]:
    """The leaves by name; then by that of a nested config, which stands for its first."""
    leaves = {leaf.name: leaf for leaf in _options(cls)}
    firsts: dict[str, _Option] = {}
    for name, leaf in leaves.items():
        firsts.setdefault(name.rpartition(".")[0], leaf)
    firsts.pop("", None)
    return leaves | firsts


def _unpack_optional(annotation: Any) -> tuple[Any, bool]:
    """(type, may it be None)."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        inner = [a for a in typing.get_args(annotation) if a is not types.NoneType]
        if len(inner) == 1:
            return inner[0], True
    return annotation, False


def _item_types(annotation: Any, length: int, name: str) -> tuple[Any, ...]:
    """The types of a tuple's items."""
    items = typing.get_args(annotation)
    if len(items) == 2 and items[1] is Ellipsis:
        return (items[0],) * length
    if len(items) != length:
        raise ValueError(f"{name}: {length} values given, {len(items)} wanted.")
    return items


def _type_name(annotation: Any) -> str:
    inner, optional = _unpack_optional(annotation)
    origin, arguments = typing.get_origin(inner), typing.get_args(inner)
    if optional:
        return f"{_type_name(inner)} or none"
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is tuple and arguments:
        names = ["..." if a is Ellipsis else _type_name(a) for a in arguments]
        return ",".join(names)
    if inner in (int, float, str, bool):
        return inner.__name__
    raise TypeError(
        f"A config field cannot be of type {annotation}: use int, float, str, bool, Literal, a "
        "tuple of these, one of these or None, or another dataclass."
    )


def _show(value: Any) -> str:
    """A value as one writes it on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(_show, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _parse(annotation: Any, text: str, name: str) -> Any:
    """The value that `text` writes; ValueError names field, text and what is allowed."""
    inner, optional = _unpack_optional(annotation)
    if optional and text.lower() in ("none", "null"):
        return None
    if typing.get_origin(inner) is tuple:
        parts = [part.strip() for part in text.strip("()[] ").split(",")]
        parts = [part for part in parts if part]
        return tuple(
            _parse(a, part, name) for a, part in zip(_item_types(inner, len(parts), name), parts)
        )
    if typing.get_origin(inner) is Literal:
        choices = {str(choice): choice for choice in typing.get_args(inner)}
        if text not in choices:
            raise ValueError(f"{name}={text!r} is not a choice. {_suggest(text, choices)}")
        return choices[text]
    try:
        if inner is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if inner is int and not text.lstrip("+-").replace("_", "").isdigit():
            number = float(text)  # 1e6 is a good way to write an integer
            if number != int(number):
                raise ValueError
            return int(number)
        return inner(text)
    except (KeyError, ValueError, OverflowError):
        raise ValueError(
            f"{name}={text!r}: write a value of type {_type_name(annotation)}."
        ) from None


def _convert(annotation: Any, value: Any, name: str) -> Any:
    """`value`, from code or JSON, as the type of its field."""
    inner, optional = _unpack_optional(annotation)
    if value is None and optional:
        return None
    if _is_config(inner):
        if isinstance(value, inner):
            return value
    elif typing.get_origin(inner) is tuple:
        if isinstance(value, list | tuple):
            items = _item_types(inner, len(value), name)
            return tuple(_convert(a, v, name) for a, v in zip(items, value))
    elif typing.get_origin(inner) is Literal:
        choices = typing.get_args(inner)
        if any(value == choice and type(value) is type(choice) for choice in choices):
            return value
        hint = _suggest(str(value), map(str, choices))
        raise ValueError(f"{name}={value!r} is not a choice. {hint}")
    elif inner is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if value in ("inf", "-inf", "nan"):
            return float(value)
    elif isinstance(value, inner) and (inner is bool or not isinstance(value, bool)):
        return value
    wanted = inner.__name__ if _is_config(inner) else _type_name(annotation)
    raise TypeError(f"{name}={value!r} is of type {type(value).__name__}; wanted: {wanted}.")


def _from_dict(cls: type[T], values: Any, prefix: str, base: T | None) -> T:
    if not isinstance(values, Mapping):
        raise TypeError(f"{prefix.rstrip('.') or cls.__name__}={values!r}: wanted: an object.")
    fields = {field.name: (field, annotation) for field, annotation in _fields(cls)}
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            hint = _suggest(prefix + name, [prefix + known for known in fields])
            raise ValueError(f"{cls.__name__} has no {prefix + name!r}. {hint}")
        field, annotation = fields[name]
        if _is_config(annotation):
            default = _default(field) if base is None else getattr(base, name)
            default = None if default is dataclasses.MISSING else default
            given[name] = _from_dict(annotation, value, f"{prefix}{name}.", default)
        else:
            given[name] = _convert(annotation, value, prefix + name)
    if base is not None:
        return dataclasses.replace(base, **given)  # type: ignore[type-var]
    for name, (field, _) in fields.items():
        if name not in given and _default(field) is dataclasses.MISSING:
            raise TypeError(f"{prefix}{name} must be given: {field.metadata.get('help', '')}")
    return cls(**given)


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    """Sets a dotted name in nested dicts."""
    *heads, last = name.split(".")
    for head in heads:
        values = values.setdefault(head, {})
    values[last] = value


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        return json.loads(pathlib.Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _suggest(
    name: str, known: Iterable[str], prefix: str = "", helps: Mapping[str, str] = {}
) -> str:
    """The sentence that names what is nearest to `name`, or speaks of it, or all there is."""
    known = list(known)
    head, _, last = name.rpartition(".")
    best = difflib.get_close_matches(last, [full.rpartition(".")[2] for full in known], n=1)
    near = [full for full in known if full.rpartition(".")[2] in best]
    near = [full for full in near if full.rpartition(".")[0] == head] or near
    words = lambda full: re.split(r"[\W_]+", f"{full} {helps.get(full, '')}".lower())
    near = near or [full for full in known if last.lower() in words(full)]
    if near:
        return "Did you mean " + " or ".join(prefix + full for full in near) + "?"
    return "Known: " + ", ".join(prefix + full for full in known) + "."
