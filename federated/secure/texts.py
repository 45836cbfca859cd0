"""Messages of a secure sum, and what a client keeps between them, as text (JSON).

A client whose every message is answered by a fresh process keeps its state in a file. What is read
may come from anybody: a text that is not exactly what its kind demands raises ValueError.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from jaxfm.federated.secure.client import ClientState
from jaxfm.federated.secure.keys import KeyPair
from jaxfm.federated.secure.messages import (
    Delivery,
    Introduction,
    Keys,
    Revealed,
    SealedShares,
    Survivors,
)  # fmt: skip

T = TypeVar("T")


class _Form(NamedTuple):
    """How a value is written, and read back."""

    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


def _checked(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{str(value)[:40]!r} is no {kind.__name__}.")
    return value


_INT = _Form(int, lambda x: _checked(int, x))
_BYTES = _Form(lambda x: x.hex(), lambda x: bytes.fromhex(_checked(str, x)))


def _many(one: _Form) -> _Form:
    return _Form(
        lambda xs: [one.write(x) for x in xs],
        lambda xs: tuple(one.read(x) for x in _checked(list, xs)),
    )


def _by_client(one: _Form) -> _Form:
    """A dict by client as a list of pairs: JSON's names are text."""

    def read(pairs: Any) -> dict:
        found = {}
        for pair in _checked(list, pairs):
            client, value = _checked(list, pair)
            found[_INT.read(client)] = one.read(value)
        if len(found) < len(pairs):
            raise ValueError("A client is named twice.")
        return found

    return _Form(lambda xs: [[i, one.write(x)] for i, x in xs.items()], read)


def _tuple(kind: type, *forms: _Form) -> _Form:
    def read(values: Any) -> Any:
        if len(_checked(list, values)) != len(forms):
            raise ValueError(f"A {kind.__name__} has {len(forms)} parts, not {len(values)}.")
        return kind(*(form.read(x) for form, x in zip(forms, values)))

    return _Form(lambda xs: [form.write(x) for form, x in zip(forms, xs, strict=True)], read)


_PARTS = _by_client(_BYTES)
_PAIR = _Form(
    lambda pair: [_BYTES.write(x) for x in pair],
    lambda pair: tuple(_BYTES.read(x) for x in _checked(list, pair)),
)
_INTRODUCTION = _tuple(Introduction, _INT, _PARTS, _PARTS)
_KEY_PAIR = _tuple(KeyPair, _BYTES, _BYTES)
_FORMS: dict[type, _Form] = {
    Keys: _tuple(Keys, _INT, _BYTES, _BYTES),
    Introduction: _INTRODUCTION,
    SealedShares: _tuple(SealedShares, _INT, _PARTS, _BYTES),
    Delivery: _tuple(Delivery, _PARTS),
    Survivors: _tuple(Survivors, _many(_INT), _many(_INT)),
    Revealed: _tuple(Revealed, _INT, _PARTS, _PARTS),
    ClientState: _tuple(
        ClientState, _INT, _INT, _KEY_PAIR, _KEY_PAIR, _BYTES, _INTRODUCTION, _PARTS,
        _by_client(_PAIR),
    ),
}  # fmt: skip


def to_text(message: Any) -> str:
    """A message, or a `ClientState`, as text."""
    return json.dumps(_FORMS[type(message)].write(message))


def from_text(kind: type[T], text: Any) -> T:
    """The message of this kind that a text spells.

    Raises:
      ValueError: the text spells none.
    """
    try:
        return _FORMS[kind].read(json.loads(_checked(str, text)))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"This is no text of a {kind.__name__}: {str(error)[:100]}") from None
