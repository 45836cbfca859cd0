"""Elastic groups: the axes of a model that members of a supernet keep a part of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfm.model import Model, is_axes


class ElasticGroup(NamedTuple):
    """Channels, or the taps of a kernel, of which members keep a part.

    Attributes:
      axis: logical name; "layer" is depth: a layer that is left out becomes the identity, where
        layers add to a residual stream and norms come first. "kernel_..." is the height and width
        of a kernel.
      layer: the layer that it belongs to; None where all layers share the axis or there are none.
      size: number of channels; for a kernel, taps in a row.
      channel_multiple: counts are multiples of it, or the whole group.
      least: the fewest that members keep.
      kernels: the counts that a kernel may have, ascending; () for channels.
    """

    axis: str
    layer: int | None
    size: int
    channel_multiple: int
    least: int
    kernels: tuple[int, ...] = ()


def channel_groups(
    model: Model,
    sizes: Mapping[str, int],
    axes: Sequence[str],
    shared: Sequence[str],
    channel_multiple: int | Mapping[str, int],
    smallest: float,
) -> tuple[ElasticGroup, ...]:
    """Returns the groups of logical axes, one per layer where layers have the axis to themselves.

    Args:
      model: whose axes they are.
      sizes: sizes of the model's axes (`jaxfm.subnet.axis_sizes`).
      axes, shared, channel_multiple, smallest: as in `supernet`.
    Raises:
      ValueError: an axis that the model does not have, or a multiple below 1.
    """
    if not set(axes) <= set(sizes):
        raise ValueError(f"axes={tuple(axes)} must be some of the model's axes, {sorted(sizes)}.")
    groups = []
    for name in axes:
        step = (
            channel_multiple if isinstance(channel_multiple, int) else channel_multiple.get(name, 1)
        )
        if step < 1:
            raise ValueError(f"channel_multiple of {name!r} is {step}; give at least 1.")
        size = sizes[name]
        # Counted in steps, as the projection counts.
        steps = max(1, int(np.ceil(smallest * -(-size // step))))
        per_layer = name not in shared and _is_per_layer(model, name)
        layers: Sequence[int | None] = range(sizes["layer"]) if per_layer else [None]
        groups += [
            ElasticGroup(
                axis=name,
                layer=layer,
                size=size,
                channel_multiple=step,
                least=min(steps * step, size),
            )
            for layer in layers
        ]
    return tuple(groups)


def _is_per_layer(model: Model, name: str) -> bool:
    """Whether every parameter with this axis is stacked over layers."""
    leaves = jax.tree.leaves(model.axes, is_leaf=is_axes)
    return name != "layer" and all("layer" in names for names in leaves if name in names)


def rows_by_axis(groups: tuple[ElasticGroup, ...]) -> dict[str, list[int]]:
    """Returns the numbers of the groups of each axis, in the order of layers."""
    rows: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        rows.setdefault(group.axis, []).append(i)
    return rows


def check_counts(groups: tuple[ElasticGroup, ...], counts: Any) -> np.ndarray:
    """Returns counts as a NumPy array i32[G].

    Raises:
      ValueError: a wrong shape, or a count that its group cannot have.
    """
    counts = np.asarray(counts)
    if counts.shape != (len(groups),):
        raise ValueError(
            f"counts have shape {counts.shape}; this supernet has {len(groups)} groups."
        )
    for group, count in zip(groups, counts.tolist(), strict=True):
        if not 1 <= count <= group.size or (group.kernels and count not in group.kernels):
            allowed = group.kernels or f"1 to {group.size}"
            layer = "" if group.layer is None else f" in layer {group.layer}"
            raise ValueError(f"{count} of {group.axis!r}{layer} cannot be kept; give {allowed}.")
    return counts
