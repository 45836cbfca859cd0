"""What a run offers to the algorithms of the registry, from a model and data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxfm.data.dealing import Data, subsample
from jaxfm.federated.local import Local
from jaxfm.federated.placement import place, wanted_steps
from jaxfm.federated.registry import Setting, find, last_layer, make
from jaxfm.model import Model, Variables
from jaxfm.subnet import Subnet, axis_sizes, width

# Axes of inputs and outputs, which no slice narrows.
FIXED_AXES = {"input", "channel", "class", "vocab", "position", "layer"}


def make_setting(
    model: Model,
    data: Data,
    local: Local,
    *,
    num_rounds: int,
    widths: Sequence[float] = (1.0, 0.5, 0.25),
    axes: Sequence[str] | None = None,
    variables: Variables | None = None,
    seed: int = 0,
    **placing: Any,
) -> Setting:
    """What a run offers to the factory of an algorithm.

    Args:
      model: of full width.
      data: that it is trained on.
      local: how clients train.
      num_rounds: of the run.
      widths: share of each width that the clients of a tier hold, in any order.
      axes: that tiers cut; None: all named axes of the model but those of inputs and outputs.
      variables: that the run starts from; None: `model.init`.
      seed: of these.
      **placing: `machines`, `deadline_s` and `max_steps` as in `place`, by which tiers are dealt.
    """
    variables = model.init(jax.random.key(seed)) if variables is None else variables
    sizes = axis_sizes(variables, model.axes)
    axes = sorted(sizes.keys() - FIXED_AXES) if axes is None else axes
    labels = data.train.examples.get("label")

    def tier_of() -> np.ndarray:
        slices = make(find("hetero_fl"), setting)
        steps = wanted_steps(data.train, local, placing.get("max_steps") or 2**30)
        return place(slices, data.train, variables, steps=steps, **placing).bucket

    setting = Setting(
        model=model,
        variables=variables,
        task=data.task,
        local=local,
        num_clients=len(data.train.count),
        num_rounds=num_rounds,
        is_last=last_layer(model),
        tiers=make_tiers(sizes, axes, widths),
        axes=tuple(axes),
        tier_of=tier_of,
        public=data.public,
        some=subsample(data.validation, 2),
        num_classes=None if labels is None else int(np.max(labels)) + 1,
    )
    return setting


def make_tiers(
    sizes: Mapping[str, int], axes: Sequence[str], widths: Sequence[float]
) -> tuple[Subnet, ...]:
    """Leading slices of some of the axes, whose sizes are given, the widest first.

    Raises:
      ValueError: a width that is not a share above 0 and up to 1, or none.
    """
    if not widths or any(not 0 < share <= 1 for share in widths):
        raise ValueError(f"tiers={tuple(widths)} must be shares of the width above 0 and up to 1.")
    return tuple(width(sizes, dict.fromkeys(axes, share)) for share in sorted(widths)[::-1])
