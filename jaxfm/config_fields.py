"""The fields of config classes, nested ones too, as `jaxfm.config` reads them."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from absl import flags

from jaxfm.plain_types import is_config, parse, type_name, unpack_optional


class Choice(NamedTuple):
    """What a section needs: one of the fields has one of the values.

    Attributes:
      fields: dotted names, seen from the outermost config; a field may hold a tuple of values.
      values: any of these will do.
    """

    fields: tuple[str, ...]
    values: tuple[str, ...]


class Leaf(NamedTuple):
    """A field that is not a config itself.

    Attributes:
      name: dotted.
      annotation: its type.
      default: dataclasses.MISSING where a value must be given.
      help: the line for --help.
      owner: the class that has the field.
      choice: what its section needs; None: it is always read.
      repeat: it is a tuple, and each flag of it is one item, as it was written.
    """

    name: str
    annotation: Any
    default: Any
    help: str
    owner: type
    choice: Choice | None
    repeat: bool = False


def fields_of(cls: type) -> list[tuple[dataclasses.Field, Any]]:
    """The fields of a config class, each with its type."""
    hints = typing.get_type_hints(cls)
    return [(field, hints[field.name]) for field in dataclasses.fields(cls)]


def default_of(field: dataclasses.Field) -> Any:
    """The default of a field, or dataclasses.MISSING."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def leaves(
    cls: type, prefix: str = "", base: Any = None, choice: Choice | None = None
) -> Iterator[Leaf]:
    """The leaves, own fields first. `base` holds the defaults where a parent config sets them.

    Raises:
      TypeError: a field is of a type that has no text.
    """
    nested: list[tuple[Any, ...]] = []
    for field, annotation in fields_of(cls):
        default = default_of(field) if base is None else getattr(base, field.name)
        if is_config(annotation):
            needed = field.metadata.get("choice", choice)
            if needed is not choice:
                needed = needed._replace(fields=tuple(prefix + name for name in needed.fields))
            start = None if default is dataclasses.MISSING else default
            nested.append((annotation, f"{prefix}{field.name}.", start, needed))
            continue
        type_name(annotation)  # raises for a type without a text
        if field.metadata.get("required"):
            annotation, default = unpack_optional(annotation)[0], dataclasses.MISSING
        help, repeat = field.metadata.get("help", ""), field.metadata.get("repeat", False)
        yield Leaf(prefix + field.name, annotation, default, help, cls, choice, repeat)
    for arguments in nested:
        yield from leaves(*arguments)


def by_name(cls: type) -> dict[str, Leaf]:
    """The leaves by name; then by that of a nested config, which stands for its first leaf.

    The name of a section that belongs to a choice stands for nothing.
    """
    full = {leaf.name: leaf for leaf in leaves(cls)}
    firsts: dict[str, Leaf] = {}
    for name, leaf in full.items():
        if leaf.choice is None:
            firsts.setdefault(name.rpartition(".")[0], leaf)
    firsts.pop("", None)
    return full | firsts


def is_chosen(leaf: Leaf, config: Any) -> bool:
    """Whether a leaf is read, by the choices in `config`."""
    if leaf.choice is None:
        return True
    for name in leaf.choice.fields:
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        if set(value if isinstance(value, tuple) else (value,)) & set(leaf.choice.values):
            return True
    return False


def as_given(cls: type, values: Mapping[str, Any], base: Any = None) -> Any:
    """An object with the attributes of a config that need not be complete or consistent."""
    result = types.SimpleNamespace()
    for field, annotation in fields_of(cls):
        default = default_of(field) if base is None else getattr(base, field.name)
        value = values.get(field.name, default)
        if is_config(annotation):
            given = value if isinstance(value, Mapping) else {}
            start = None if default is dataclasses.MISSING else default
            value = as_given(annotation, given, start)
        setattr(result, field.name, tuple(value) if isinstance(value, list) else value)
    return result


def renamed(cls: type, name: str, prefix: str = "") -> str:
    """The sentence that answers a retired name with the new ones; "" where it never was a name."""
    retired: Mapping[str, str | tuple[str, ...]] = getattr(cls, "retired", {})
    inside = [old for old in retired if old.startswith(f"{name}.")]  # of a section that is gone
    new: list[str] = []
    for old in [name] if name in retired else inside:
        names = retired[old]
        new += [names] if isinstance(names, str) else names
    return f"{prefix}{name} is now {' or '.join(prefix + n for n in new)}." if new else ""


def put(values: dict[str, Any], name: str, value: Any) -> None:
    """Sets a dotted name in nested dicts."""
    *heads, last = name.split(".")
    for head in heads:
        values = values.setdefault(head, {})
    values[last] = value


class LeafParser(flags.ArgumentParser):
    """absl's view of `parse`."""

    def __init__(self, leaf: Leaf):
        self.leaf = leaf
        self.syntactic_help = type_name(leaf.annotation)

    def parse(self, argument: str) -> Any:
        return parse(self.leaf.annotation, argument, self.leaf.name)


def illegal_value(message: str) -> str:
    """The sentence for a value that is none, of absl's "flag --name=text: " and its parser's."""
    parts = re.fullmatch(r"flag --([\w.]+)=(.*?): (.*)", message, re.DOTALL)
    if parts is None:
        return message
    is_ours = re.match(r"[\w.]+=", parts[3])
    return parts[3] if is_ours else f"{parts[1]}={parts[2]!r}: write true or false."
