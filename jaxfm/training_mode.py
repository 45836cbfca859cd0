"""How modules of others are told whether they train: by the names of their own arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

_TRAINS = ("train", "training", "is_training")
_RESTS = ("deterministic", "use_running_average")
MODE_NAMES = (*_TRAINS, *_RESTS)


def mode_arguments(function: Callable, train: bool) -> dict[str, bool]:
    """Returns the keyword arguments that switch a call to training, or out of it.

    Args:
      function: whose parameters called train, training, is_training, deterministic or
        use_running_average are set.
      train: whether the call trains.

    >>> mode_arguments(lambda x, *, deterministic: x, True)
    {'deterministic': False}
    """
    known = inspect.signature(function).parameters.values()
    named = [p.name for p in known if p.kind not in (p.POSITIONAL_ONLY, p.VAR_KEYWORD)]
    return {name: mode_value(name, train) for name in named if name in MODE_NAMES}


def mode_value(name: str, train: bool) -> bool:
    """Returns what an argument of `MODE_NAMES` is in training, or out of it."""
    return train if name in _TRAINS else not train


def takes(function: Callable, name: str) -> bool:
    """Returns whether a function has a parameter of this name."""
    parameters: Any = inspect.signature(function).parameters
    return name in parameters
