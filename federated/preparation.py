"""From the name of an algorithm, a model and data to a run that is ready to train."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfm.data.dealing import Data, subsample
from jaxfm.data.federation import client_weights
from jaxfm.federated.accounting.resources import Device
from jaxfm.federated.algorithm import Algorithm
from jaxfm.federated.local import UNLIMITED_STEPS, Local
from jaxfm.federated.placement import Placement, place, wanted_steps
from jaxfm.federated.registry import Setting, find, last_layer, make
from jaxfm.model import Model, Variables
from jaxfm.subnet import Subnet, axis_sizes, width

# Axes of inputs and outputs, which no slice narrows.
FIXED_AXES = {"input", "channel", "class", "vocab", "position", "layer"}


class Prepared(NamedTuple):
    """A run before its first round, for `train`.

    Attributes:
      algorithm: with its options.
      variables: that it starts from.
      placement: who trains what.
    """

    algorithm: Algorithm
    variables: Variables
    placement: Placement


def prepare(
    name: str,
    model: Model,
    data: Data,
    local: Local,
    *,
    num_rounds: int,
    options: Mapping[str, Any] | None = None,
    wrap: Callable[[Algorithm], Algorithm] | None = None,
    widths: Sequence[float] = (1.0, 0.5, 0.25),
    axes: Sequence[str] | None = None,
    machines: Device | None = None,
    deadline_s: float | None = None,
    max_steps: int = UNLIMITED_STEPS,
    seed: int = 0,
) -> Prepared:
    """Makes an algorithm of the registry for a run, and places its clients.

    Args:
      name: of the algorithm, or the path of a .py file that registers it.
      model, data, local, num_rounds, widths, axes, seed: as in `make_setting`.
      options: of the algorithm, by name.
      wrap: around the algorithm, such as `with_compression`.
      machines, deadline_s, max_steps: as in `place`.
    Raises:
      ValueError: what the task refuses of the data, or the algorithm, `make_setting` or `place`.
    """
    data.check()
    placing: dict[str, Any] = {
        "machines": machines,
        "deadline_s": deadline_s,
        "max_steps": max_steps,
    }
    setting = make_setting(
        model, data, local, num_rounds=num_rounds, widths=widths, axes=axes, seed=seed, **placing
    )
    algorithm = make(find(name), setting, options)
    algorithm = algorithm if wrap is None else wrap(algorithm)
    start = setting.variables
    if algorithm.model is not None and algorithm.model is not model:
        start = algorithm.model.init(jax.random.key(seed))
    placement = place(
        algorithm, data.train, start, public=data.public,
        local_validation=data.local_validation,
        steps=wanted_steps(data.train, local, max_steps), **placing,
    )  # fmt: skip
    return Prepared(algorithm, start, placement)


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
        steps = wanted_steps(data.train, local, placing.get("max_steps", UNLIMITED_STEPS))
        return place(slices, data.train, variables, steps=steps, **placing).bucket

    setting = Setting(
        model=model,
        variables=variables,
        task=data.task,
        local=local,
        num_clients=len(data.train.count),
        total_examples=float(client_weights(data.train).sum()),
        num_rounds=num_rounds,
        is_last=last_layer(model),
        tiers=make_tiers(sizes, axes, widths),
        axes=tuple(axes),
        tier_of=tier_of,
        public=data.public,
        some=subsample(data.validation, 2),
        num_classes=len(data.classes) or (None if labels is None else int(np.max(labels)) + 1),
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
