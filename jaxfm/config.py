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

A nested config may belong to a choice: `section(SpatlOptions(), "algorithm", "spatl")` is the
options that --algorithm=spatl reads. `jaxfm.options` makes such sections of the signatures of
functions. Names that a config once had are listed in its class attribute
`retired = {"old": "new", "shared": ("one.new", "other.new")}`; whoever gives one is told the new.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from absl import app, flags, logging

from jaxfm import processes
from jaxfm.config_fields import (
    Choice,
    LeafParser,
    as_given,
    by_name,
    default_of,
    fields_of,
    illegal_value,
    is_chosen,
    leaves,
    put,
    renamed,
)
from jaxfm.errors import explain, reported
from jaxfm.plain_types import convert, is_config, parse, show, suggest, to_json, type_name
from jaxfm.together import as_one, ends_with_others

T = TypeVar("T")

_LARGEST = 2**31 - 1


def option(default: T, help: str, *, repeat: bool = False) -> T:
    """A config field with its default and the line that --help shows (say the unit).

    Args:
      default: of the field.
      help: the line.
      repeat: for a tuple[str, ...] of any strings: each --name=text on the command line adds one
        string, exactly as it was written. Without it one text holds all strings, with commas.
    """
    return dataclasses.field(default=default, metadata={"help": help, "repeat": repeat})


def section(default: T, choice: str | tuple[str, ...], value: str | tuple[str, ...]) -> T:
    """A nested config that is read only where another field has a certain value.

    --help shows it only then, and its flags are refused otherwise.

    Args:
      default: the nested config.
      choice: name of the other field, or names of several: one of them is enough. A field that
        holds a tuple has all values in it.
      value: the value, or several: one of them is enough.
    """
    needed = Choice(*((x,) if isinstance(x, str) else tuple(x) for x in (choice, value)))
    return dataclasses.field(default=default, metadata={"choice": needed})


def check(config: Any) -> None:
    """Checks each field against its annotation; for `__post_init__`.

    An int given for a float becomes one, and a list given for a tuple likewise, so that equal
    configs are equal.

    Raises:
      TypeError: a value is not of its field's type; the message names both.
      ValueError: a Literal field holds something else.
    """
    for field, annotation in fields_of(type(config)):
        value = convert(annotation, getattr(config, field.name), field.name)
        object.__setattr__(config, field.name, value)


def check_whole(config: Any, least: Mapping[str, float], prefix: str = "") -> None:
    """Checks that numbers are large enough, and that whole ones fit in 32 bits, as in arrays.

    Args:
      config: whose fields they are.
      least: the least value of each field.
      prefix: of the names, for the message.
    Raises:
      ValueError: a number is too small, too large, or NaN.
    """
    for name, low in least.items():
        value = getattr(config, name)
        if not value >= low:
            raise ValueError(f"{prefix}{name}={value}: give at least {low}.")
        if isinstance(value, int) and value > _LARGEST:
            raise ValueError(f"{prefix}{name}={value}: give at most {_LARGEST}.")


def override(config: T, *assignments: str) -> T:
    """The config with some fields replaced: `override(config, "rounds=3", "model.width=64")`.

    Raises:
      ValueError: an unknown name (with a suggestion), or a text that is not a value of the field.
    """
    values = to_dict(config)
    known = by_name(type(config))
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"{assignment!r}: write name=value.")
        if name not in known:
            helps = {full: leaf.help for full, leaf in known.items()}
            hint = f"{type(config).__name__} has no {name!r}. {suggest(name, known, helps=helps)}"
            raise ValueError(renamed(type(config), name) or hint)
        leaf = known[name]
        put(values, leaf.name, [text] if leaf.repeat else parse(leaf.annotation, text, leaf.name))
    return from_dict(type(config), values)


def to_dict(config: Any) -> dict[str, Any]:
    """The config as JSON values; infinities and NaN as the strings that `float` reads."""
    return to_json(config)


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """The inverse of `to_dict`; what is left out keeps its default.

    Raises:
      ValueError: an unknown name, with a suggestion.
      TypeError: a value of another type than the field's, or a required one left out.
    """
    return _from_dict(cls, values, "", None, cls)


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
    for name, leaf in by_name(cls).items():
        flag: flags.Flag
        if leaf.annotation is bool:
            flag = flags.BooleanFlag(name, None, leaf.help)
        elif leaf.repeat:
            flag = flags.MultiFlag(flags.ArgumentParser(), None, name, None, leaf.help)
        else:
            flag = flags.Flag(LeafParser(leaf), None, name, None, leaf.help)
        flags.DEFINE_flag(flag, flag_values, module_name=sys.argv[0])
    if "config" not in flag_values:
        flags.DEFINE_string("config", None, _CONFIG_HELP, flag_values=flag_values)


def from_flags(cls: type[T], flag_values: flags.FlagValues = flags.FLAGS) -> T:
    """The config that parsed flags describe: defaults, then --config, then the flags given.

    Raises:
      ValueError, TypeError: as `from_dict`; also a flag of a section that is not chosen.
    """
    config = from_dict(cls, _given(cls, flag_values))
    for leaf in leaves(cls):
        if flag_values[leaf.name].present and not is_chosen(leaf, config):
            assert leaf.choice is not None
            needed = [f"--{field}={v}" for field in leaf.choice.fields for v in leaf.choice.values]
            raise ValueError(f"--{leaf.name} requires {' or '.join(needed)}.")
    return config


def run(
    main: Callable[[T], object], cls: type[T], *, joins: bool = False, saves: bool = True
) -> None:
    """Runs `main` on the config that the command line describes, then exits.

    A mistake on the command line, in a file or in the data gives one sentence and exit status 2; a
    run that fails for another reason gives one and exit status 1; --traceback shows where it was
    found. --help describes the fields that matter for the choices made, --help=all every field.

    Args:
      main: the script.
      cls: its config.
      joins: whether it runs in several processes, which then meet before `main`
        (`jaxfm.processes`).
      saves: whether one that joins answers SIGTERM (`jaxfm.preemption`); else it ends at once.
    """

    def parse_flags(argv: Sequence[str]) -> T:
        wanted = {word.lstrip("-") for word in argv[1:] if word.startswith("-")}
        if wanted & {"help", "h", "help=all"}:
            rest = [word for word in argv if word.lstrip("-") not in ("help", "h", "help=all")]
            choices = None if "help=all" in wanted else _choices(cls, rest)
            text = sys.modules["__main__"].__doc__ or cls.__doc__ or ""
            with reported():
                print(describe(cls, text, choices, processes.FLAGS if joins else None))
                sys.stdout.flush()
            sys.exit(0)
        try:
            return read_command(cls, argv)
        except (ValueError, TypeError, OSError) as error:
            print(f"error: {explain(error)[0]}\nTry --help.", file=sys.stderr)
            sys.exit(2)

    def guarded(config: T) -> None:
        with ends_with_others(), reported(flags.FLAGS["traceback"].value):
            if not flags.FLAGS["traceback"].value:
                logging.set_verbosity(logging.FATAL)  # Orbax logs a traceback, and raises as well
            if joins:
                processes.join_from(flags.FLAGS.flag_values_dict(), os.environ, saves=saves)
            with as_one():
                main(config)

    if isinstance(sys.stdout, io.TextIOWrapper):  # what is said goes into a file at once, too
        sys.stdout.reconfigure(line_buffering=True)
    define_flags(cls)
    flags.DEFINE_bool("traceback", False, _TRACEBACK_HELP)
    for name in processes.FLAGS if joins else ():
        flags.DEFINE_string(name, None, processes.FLAGS[name])
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file at INFO
    app.run(guarded, flags_parser=parse_flags)  # type: ignore[arg-type]  # its result goes to main


def read_command(
    cls: type[T], argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS
) -> T:
    """The config that a command line describes.

    Args:
      cls: the config class, whose flags `flag_values` has.
      argv: the words, the program's name first.
      flag_values: to parse them with.
    Raises:
      ValueError, TypeError, OSError: a word that is no flag, or as `from_flags`.
    """
    try:
        extra = flag_values(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        raise ValueError(_unknown(cls, error.flagname)) from None
    except flags.IllegalFlagValueError as error:
        raise ValueError(illegal_value(str(error))) from None
    except flags.Error as error:
        raise ValueError(f"{error}.") from None
    if extra:
        raise ValueError(f"{extra[0]!r} is not a flag: write --name=value.")
    return from_flags(cls, flag_values)


def describe(
    cls: type, text: str = "", choices: Any = None, more: Mapping[str, str] | None = None
) -> str:
    """The text of --help: `text`, then the fields with their defaults, types and meanings.

    Args:
      cls: the config class.
      text: what comes first.
      choices: an object with the values of the fields that sections depend on: only the sections
        that they choose are shown. None shows all.
      more: flags that are no fields, with their help.
    """
    lines = [text.strip(), "", "Flags, written --name=value:"]
    for name, meaning in {**_GENERAL, **(more or {})}.items():
        lines.append(f"  --{name}")
        lines += textwrap.wrap(meaning, 92, initial_indent=" " * 6, subsequent_indent=" " * 6)
    current, hidden = "", []
    for leaf in leaves(cls):
        head = leaf.name.rpartition(".")[0]
        if choices is not None and not is_chosen(leaf, choices):
            hidden += [head] if head not in hidden else []
            continue
        if head != current:
            lines += ["", f"{head}: {(leaf.owner.__doc__ or '').strip().splitlines()[0]}"]
            if leaf.choice is None:
                lines.append(f"  --{head}=X is --{leaf.name}=X.")
            current = head
        required = leaf.default is dataclasses.MISSING
        default = "required" if required else show(leaf.default)
        kind = "str, once for each" if leaf.repeat else type_name(leaf.annotation)
        lines.append(f"  --{leaf.name}={default}  ({kind})")
        lines += textwrap.wrap(leaf.help, 92, initial_indent=" " * 6, subsequent_indent=" " * 6)
    if hidden:
        others = f"--help=all shows the options of {', '.join(hidden)}, too."
        lines += ["", *textwrap.wrap(others, 98)]
    return "\n".join(lines)


_TRACEBACK_HELP = "after an error, also show where in the code it was found"
_CONFIG_HELP = "a config.json to start from, as every run folder has one; flags given here win"
_GENERAL = {"config": _CONFIG_HELP, "traceback": _TRACEBACK_HELP}


def _given(cls: type, flag_values: flags.FlagValues) -> dict[str, Any]:
    """What --config and the flags say, as JSON values."""
    path = flag_values["config"].value
    values = _read(path) if path else {}
    for name, leaf in reversed(by_name(cls).items()):  # a field's full name wins
        if flag_values[name].present:
            put(values, leaf.name, to_json(flag_values[name].value))
    return values


def _choices(cls: type, argv: Sequence[str]) -> Any:
    """The choices on a command line, for `describe`; up to a mistake, if there is one."""
    flag_values = flags.FlagValues()
    define_flags(cls, flag_values)
    mistakes = (flags.Error, ValueError, TypeError, OSError)
    with contextlib.suppress(*mistakes):
        flag_values(argv, known_only=True)
    try:
        return as_given(cls, _given(cls, flag_values))
    except mistakes:
        return as_given(cls, {})


def _unknown(cls: type, name: str) -> str:
    """The sentence that answers an unknown flag."""
    for old in (name, name.removeprefix("no")):
        if sentence := renamed(cls, old, "--"):
            return sentence
    if name in processes.FLAGS:
        return f"--{name} is for scripts that run in several processes; this one runs in one."
    helps = _GENERAL | {full: leaf.help for full, leaf in by_name(cls).items()}
    hint = suggest(name, helps, "--", helps)
    return f"Unknown flag --{name}. {'' if hint.startswith('Known') else hint}".rstrip()


def _from_dict(cls: type[T], values: Any, prefix: str, base: T | None, root: type) -> T:
    if not isinstance(values, Mapping):
        raise TypeError(f"{prefix.rstrip('.') or cls.__name__}={values!r}: wanted: an object.")
    fields = {field.name: (field, annotation) for field, annotation in fields_of(cls)}
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            hint = suggest(prefix + name, [prefix + known for known in fields])
            unknown = f"{cls.__name__} has no {prefix + name!r}. {hint}"
            raise ValueError(renamed(root, prefix + name) or unknown)
        field, annotation = fields[name]
        if is_config(annotation):
            default = default_of(field) if base is None else getattr(base, name)
            default = None if default is dataclasses.MISSING else default
            given[name] = _from_dict(annotation, value, f"{prefix}{name}.", default, root)
        else:
            given[name] = convert(annotation, value, prefix + name)
    if base is not None:
        return dataclasses.replace(base, **given)  # type: ignore[type-var]
    for name, (field, _) in fields.items():
        if name not in given and default_of(field) is dataclasses.MISSING:
            raise TypeError(f"{prefix}{name} must be given: {field.metadata.get('help', '')}")
    return cls(**given)


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        values = json.loads(pathlib.Path(path).read_text())
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is not JSON ({error}); give a config.json.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; give a config.json, an object.")
    return values
