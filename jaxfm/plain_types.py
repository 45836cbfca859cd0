"""The plain types that a config field may have: their names, their texts and their JSON.

A plain type is int, float, str, bool, Literal, a tuple of these, or any of these or None. Its
values have a text (`show`, read back by `parse`) and a JSON form (`to_json`, read by `convert`).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union


def is_plain(annotation: Any) -> bool:
    """Whether values of this type have a text."""
    try:
        type_name(annotation)
    except TypeError:
        return False
    return True


def is_config(annotation: Any) -> bool:
    """Whether this is a config class, not a plain type."""
    return dataclasses.is_dataclass(annotation)


def type_name(annotation: Any) -> str:
    """The type's name, as --help shows it.

    Raises:
      TypeError: values of this type have no text.
    """
    inner, optional = unpack_optional(annotation)
    origin, arguments = typing.get_origin(inner), typing.get_args(inner)
    if optional:
        return f"{type_name(inner)} or none"
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is tuple and arguments:
        names = ["..." if a is Ellipsis else type_name(a) for a in arguments]
        return ",".join(names)
    if inner in (int, float, str, bool):
        return inner.__name__
    raise TypeError(
        f"A config field cannot be of type {annotation}: use int, float, str, bool, Literal, a "
        "tuple of these, one of these or None, or another dataclass."
    )


def unpack_optional(annotation: Any) -> tuple[Any, bool]:
    """(the type without None, whether it may be None)."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        inner = [a for a in typing.get_args(annotation) if a is not types.NoneType]
        if len(inner) == 1:
            return inner[0], True
    return annotation, False


def show(value: Any) -> str:
    """The value's text, as one writes it on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(show, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def parse(annotation: Any, text: str, name: str) -> Any:
    """The value that `text` writes.

    Args:
      annotation: its type.
      text: what was given.
      name: of the field, for the message.
    Raises:
      ValueError: the text is no value of this type; the message names field, text and type.
    """
    inner, optional = unpack_optional(annotation)
    if optional and text.lower() in ("none", "null"):
        return None
    if typing.get_origin(inner) is tuple:
        parts = [part.strip() for part in text.strip("()[] ").split(",")]
        parts = [part for part in parts if part]
        return tuple(
            parse(a, part, name) for a, part in zip(_item_types(inner, len(parts), name), parts)
        )
    if typing.get_origin(inner) is Literal:
        choices = {str(choice): choice for choice in typing.get_args(inner)}
        if text not in choices:
            raise ValueError(f"{name}={text!r} is not a choice. {suggest(text, choices)}")
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
            f"{name}={text!r}: write a value of type {type_name(annotation)}."
        ) from None


def convert(annotation: Any, value: Any, name: str) -> Any:
    """The value, from code or JSON, as the type of its field: 1 for a float becomes 1.0.

    Args:
      annotation: a plain type or a config class.
      value: what was given.
      name: of the field, for the message.
    Raises:
      TypeError: the value is not of this type.
      ValueError: the value is not one of the Literal's, or a tuple has another length.
    """
    inner, optional = unpack_optional(annotation)
    if value is None and optional:
        return None
    if is_config(inner):
        if isinstance(value, inner):
            return value
    elif typing.get_origin(inner) is tuple:
        if isinstance(value, list | tuple):
            items = _item_types(inner, len(value), name)
            return tuple(convert(a, v, name) for a, v in zip(items, value))
    elif typing.get_origin(inner) is Literal:
        choices = typing.get_args(inner)
        if any(value == choice and type(value) is type(choice) for choice in choices):
            return value
        hint = suggest(str(value), map(str, choices))
        raise ValueError(f"{name}={value!r} is not a choice. {hint}")
    elif inner is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if value in ("inf", "-inf", "nan"):
            return float(value)
    elif isinstance(value, inner) and (inner is bool or not isinstance(value, bool)):
        return value
    wanted = inner.__name__ if is_config(inner) else type_name(annotation)
    raise TypeError(f"{name}={value!r} is of type {type(value).__name__}; wanted: {wanted}.")


def to_json(value: Any) -> Any:
    """The value in JSON's types: tuples become lists, configs dicts, infinities and NaN strings."""
    if dataclasses.is_dataclass(value):
        return {
            field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def suggest(
    name: str, known: Iterable[str], prefix: str = "", helps: Mapping[str, str] = {}
) -> str:
    """The sentence that names what is nearest to `name`, or mentions it, or all that is known.

    Args:
      name: the unknown name, perhaps dotted.
      known: all names.
      prefix: put before each name that is shown, as in "--".
      helps: the descriptions that may mention `name`.
    """
    known = list(known)
    head, _, last = name.rpartition(".")
    best = difflib.get_close_matches(last, [full.rpartition(".")[2] for full in known], n=1)
    near = [full for full in known if full.rpartition(".")[2] in best]
    near = [full for full in near if full.rpartition(".")[0] == head] or near
    words = lambda full: re.split(r"[\W_]+", f"{full} {helps.get(full, '')}".lower())
    if not near or best == [last]:  # the very word, which others may go by as well
        near += [full for full in known if full not in near and last.lower() in words(full)]
    if near:
        return "Did you mean " + " or ".join(prefix + full for full in near) + "?"
    return "Known: " + ", ".join(prefix + full for full in known) + "."


def _item_types(annotation: Any, length: int, name: str) -> tuple[Any, ...]:
    """The types of a tuple's items."""
    items = typing.get_args(annotation)
    if len(items) == 2 and items[1] is Ellipsis:
        return (items[0],) * length
    if len(items) != length:
        raise ValueError(f"{name}: {length} values given, {len(items)} wanted.")
    return items
