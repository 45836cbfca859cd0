"""Tuning a part of a model: its biases (BitFit), its head, or any other.

Source: Ben Zaken et al. 2022 (BitFit), section 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxfm.adapters.adapter import adapt
from jaxfm.adapters.targets import is_trained_by
from jaxfm.model import Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartsConfig:
    """Parts of a model that are trained, as they are written beside them.

    Attributes:
      kind: "parts".
      trained: patterns of their names.
    """

    kind: str = "parts"
    trained: tuple[str, ...]


def only(model: Model, trained: str | Sequence[str]) -> Model:
    """Returns the model with all parameters frozen but those that a pattern matches.

    Args:
      model: any.
      trained: beginnings of names, or patterns: "head", "*.bias".
    Raises:
      ValueError: a pattern matches nothing.
    """
    patterns = (trained,) if isinstance(trained, str) else tuple(trained)
    if not patterns:
        raise ValueError("trained is empty: give the name of a part, or a pattern.")
    chosen = is_trained_by(model, patterns)
    return adapt(model, None, (), chosen, PartsConfig(trained=patterns))


def head_only(model: Model) -> Model:
    """Returns the model with all parameters frozen but those of its head, or last linear map."""
    tops = model.axes.params.keys() | model.axes.frozen.keys()
    named = [name for name in ("head", "classifier") if name in tops]
    if not named:
        raise ValueError(
            f"This model has no part named head or classifier, only {', '.join(sorted(tops))}; "
            "say by `only(model, name)` which is its last."
        )
    return only(model, named[0])


def bitfit(model: Model, *, trained: str | Sequence[str] = ()) -> Model:
    """Returns the model with all parameters frozen but its biases, those of norms included.

    Args:
      model: any with leaves named "bias".
      trained: other parts that are trained, too, such as "head".
    """
    more = (trained,) if isinstance(trained, str) else tuple(trained)
    return only(model, ("*.bias", *more))
