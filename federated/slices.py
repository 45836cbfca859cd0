"""Clients that train a slice of the global model: what unequal machines share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxfm.federated.algorithm import Bucket, Exact, Mean, scaled
from jaxfm.federated.averaging import Fit, Movement, averaging_client
from jaxfm.model import Model, Variables
from jaxfm.subnet import Subnet, axis_sizes, cover, embed, extract


def slice_bucket(model: Model, fit: Fit, window: Callable[[Any], Subnet]) -> Bucket:
    """Clients that download a slice, train it and upload its movement.

    Slices are physically extracted, so small ones are really faster and cost fewer bytes. Lifted,
    each coordinate has a weight of its own: the examples of the clients whose slice holds it.

    Args:
      model: of full width; its `apply` runs the slices too.
      fit: how a client trains.
      window: `(server_state) -> Subnet`, which slice that is.
    """
    sent_axes = Movement(model.axes.params, Exact(model.axes.stats))
    full = jax.eval_shape(model.init, jax.random.key(0))
    like = Movement(full.params, Exact(full.stats))

    def shared(server) -> Variables:
        return extract(server.variables, model.axes, window(server))

    def lift(server, sums: Mean) -> Mean:
        subnet = window(server)
        num = embed(sums.num, sent_axes, subnet, like)
        return Mean(num, scaled(sums.den.value, cover(sent_axes, subnet, like)))

    return Bucket(
        model, lambda server, public: shared(server), averaging_client(fit), lift=lift,
        shared=shared,
    )  # fmt: skip


def are_nested(tiers: Sequence[Subnet]) -> bool:
    """Whether each tier lies within the one before it; an axis that it does not name is whole."""

    def within(inner: Subnet, outer: Subnet) -> bool:
        return all(
            name in inner.keep and np.isin(inner.keep[name], kept).all()
            for name, kept in outer.keep.items()
        )

    return all(within(inner, outer) for outer, inner in itertools.pairwise(tiers))


def check_tiers(model: Model, tiers: Sequence[Subnet], who: str) -> None:
    """Raises ValueError where an algorithm, `who`, has no tier, or one that does not fit."""
    if not tiers:
        raise ValueError(f"{who} needs at least one tier; Subnet({{}}) is the whole model.")
    full = jax.eval_shape(model.init, jax.random.key(0))
    sizes = axis_sizes(full, model.axes)
    for number, subnet in enumerate(tiers):
        for name in subnet.keep:
            if name not in sizes:
                raise ValueError(
                    f"Tier {number} names the axis {name!r}; the model has {sorted(sizes)}."
                )
        jax.eval_shape(lambda v, subnet=subnet: extract(v, model.axes, subnet), full)
