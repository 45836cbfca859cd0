"""Supernets: one set of weights in which every prefix of every group is a network.

The channels of each group are put in order of importance, which changes no output; after that,
"keep the first k" is a slice. In each training step (`jaxfm.search.sandwich`) the largest, the
smallest and some random members run, and the others learn from the largest, so that members are
good as soon as they are cut. An architecture is its counts i32[G]: the channels, heads or layers
that are kept of each group, the most important first. Groups are the logical axes of a model
(`Model.axes`), per layer where layers differ. The kernels of convolutions may be elastic, too: each
is a group, of which the centre is kept.

>>> import jax, numpy as np
>>> from jaxfm.testing import random_variables, tiny_cnn
>>> model = tiny_cnn()
>>> net = supernet(model, random_variables(model), ("conv1", "conv2"), channel_multiple=2)
>>> small = net.extract(net.variables, net.smallest)
>>> small.params["conv1"]["kernel"].shape
(5, 5, 1, 2)
>>> half = Budget("parameters", net.parameters, 0.5 * float(net.parameters(net.largest * 1.0)))
>>> net.members([half])[0].tolist()
[2, 4]
>>> kernels = supernet(model, random_variables(model), ("conv1",), kernels=(5, 3))
>>> kernels.smallest.tolist()
[1, 3, 3]

Source: Yu and Huang 2019 (universally slimmable networks), sections 3.2 and 3.3; Cai et al. 2020
(Once-for-All), section 3.3. There budgets are met by drawing until a member fits, here by
projection. There a learned matrix turns the centre of a kernel into the smaller kernel; here the
centre is that kernel, so that members stay slices of one set of weights, which clients can average.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.model import Array, Key, Model, PyTree, Variables, is_axes
from jaxfm.search.elastic.groups import ElasticGroup, channel_groups, check_counts
from jaxfm.search.elastic.kernels import kernel_groups
from jaxfm.search.elastic.members import (
    count_steps,
    kept_indices,
    member_parameters,
    padded_keep,
)
from jaxfm.search.strategies.project import Budget, projection
from jaxfm.subnet import Subnet, axis_sizes, extract, kernel_sizes, mask


class Supernet(NamedTuple):
    """A model whose groups are ordered by importance.

    Attributes:
      variables: the model's, with the channels of every group in order; it computes what it did.
      groups: the G elastic groups; an architecture is counts i32[G] in this order.
      largest, smallest: i32[G]; clients of any budget share the smallest member, the knowledge
        network.
      mask: `(variables, counts) -> variables` with zeros outside of the member; counts may be
        traced, so that all members share one compilation.
      extract: `(variables, counts) -> variables` of the member's own size.
      subnet: `(counts) -> Subnet` of the ordered model, for `jaxfm.subnet` and federated learning.
      parameters: `(counts f32[G]) -> f32[]`, an array expression, the cost of a `Budget`.
      sample: `(key, n) -> counts i32[n, G]`, uniform in the steps of each group.
      fit: `(budgets) -> (logits f32[G]) -> counts i32[G]`, the proportions of the logits at the
        level that meets all budgets (`jaxfm.search.strategies.project`).
      members: `(budgets) -> counts i32[n, G]`, for each budget one uniformly shrunk member.
    """

    variables: Variables
    groups: tuple[ElasticGroup, ...]
    largest: np.ndarray
    smallest: np.ndarray
    mask: Callable[[Variables, Array], Variables]
    extract: Callable[[Variables, Any], Variables]
    subnet: Callable[[Any], Subnet]
    parameters: Callable[[Array], Array]
    sample: Callable[[Key, int], Array]
    fit: Callable[[Sequence[Budget]], Callable[[Array], Array]]
    members: Callable[[Sequence[Budget]], np.ndarray]


def supernet(
    model: Model,
    variables: Variables,
    axes: Sequence[str],
    *,
    shared: Sequence[str] = ("embed",),
    channel_multiple: int | Mapping[str, int] = 1,
    smallest: float = 0.25,
    kernels: Sequence[int] | Mapping[str, Sequence[int]] = (),
    importance: Callable[[PyTree, PyTree, str], Array] | None = None,
) -> Supernet:
    """Orders a model's channels by importance and returns the supernet.

    Args:
      model: a model with logical axes.
      variables: its trained variables, of equal layers.
      axes: which logical axes are elastic; "layer" for depth. It may be () where kernels are.
      shared: axes that all layers share; the others have a group for each layer, where there are
        layers.
      channel_multiple: counts are multiples of it, or the whole group; for all axes or by axis.
        Depth and heads usually have 1.
      smallest: share of each group that every member keeps, in [0, 1), but at least one step.
        Kernels are as small as `kernels` says.
      kernels: sizes such as (5, 3): every kernel whose own size is among them may have the smaller
        ones, too. Or sizes by the name of the kernel (`jaxfm.subnet.kernel_sizes`), its own size
        among them.
      importance: `(params, axes, name) -> f32[size]` or f32[layer, size]; None means
        `weight_magnitude`.
    Raises:
      ValueError: an axis that the model does not have, or a setting out of range.
    """
    if not 0 <= smallest < 1:
        raise ValueError(f"smallest={smallest} must be in [0, 1).")
    groups = channel_groups(
        model, axis_sizes(variables, model.axes), axes, shared, channel_multiple, smallest
    )
    groups += kernel_groups(kernel_sizes(variables, model.axes), kernels)
    if not groups:
        raise ValueError("Nothing is elastic; give `axes`, `kernels` or both.")
    variables = reorder(
        model, variables, [name for name in axes if name != "layer"], shared, importance
    )
    largest = np.array([g.size for g in groups], np.int32)
    fewest = np.array([g.least for g in groups], np.int32)
    sample, fit, members = _search_space(groups, smallest)
    mask_member, extract_member, subnet = _slices(model, groups)
    return Supernet(
        variables=variables,
        groups=groups,
        largest=largest,
        smallest=fewest,
        mask=mask_member,
        extract=extract_member,
        subnet=subnet,
        parameters=lambda counts: member_parameters(
            model.axes.params, variables.params, groups, counts
        ),
        sample=sample,
        fit=fit,
        members=members,
    )


def _search_space(groups: tuple[ElasticGroup, ...], smallest: float) -> tuple[Callable, ...]:
    """Returns `Supernet.sample`, `fit` and `members`."""
    low, most, to_counts = count_steps(groups, smallest)

    def sample(key: Key, n: int) -> Array:
        ends = (jnp.broadcast_to(end, (n, len(groups))) for end in (low, most + 1))
        return to_counts(jax.random.randint(key, (n, len(groups)), *ends))

    def fit(budgets: Sequence[Budget]) -> Callable[[Array], Array]:
        of_steps = lambda cost: lambda steps: cost(to_counts(steps))
        in_steps = [b._replace(cost=of_steps(b.cost)) for b in budgets]
        project = projection(most, in_steps, smallest=smallest)
        return jax.jit(lambda logits: to_counts(project(logits)))

    def members(budgets: Sequence[Budget]) -> np.ndarray:
        same = jnp.zeros(len(groups))
        return np.stack([np.asarray(fit([budget])(same)) for budget in budgets])

    return sample, fit, members


def _slices(model: Model, groups: tuple[ElasticGroup, ...]) -> tuple[Callable, ...]:
    """Returns `Supernet.mask`, `extract` and `subnet`."""

    def mask_member(variables: Variables, counts: Array) -> Variables:
        return mask(variables, model.axes, Subnet(padded_keep(groups, counts)))

    def extract_member(variables: Variables, counts: Any) -> Variables:
        return extract(variables, model.axes, subnet(counts))

    def subnet(counts: Any) -> Subnet:
        return Subnet(kept_indices(groups, check_counts(groups, counts)))

    return mask_member, extract_member, subnet


def reorder(
    model: Model,
    variables: Variables,
    axes: Sequence[str],
    shared: Sequence[str] = ("embed",),
    importance: Callable[[PyTree, PyTree, str], Array] | None = None,
) -> Variables:
    """Returns variables with the channels of each axis in order of importance; no output changes.

    Every occurrence of an axis is permuted alike, so products contract the same pairs. Traceable.

    Args:
      model: a model with logical axes.
      variables: its variables.
      axes: the axes to be ordered.
      shared, importance: as in `supernet`.
    Raises:
      ValueError: the model has group norms, in which the place of a channel matters.
    """
    if axes and getattr(model.config, "norm", None) == "group":
        raise ValueError(
            f"axes={list(axes)} cannot be reordered: a group norm divides channels by place. Use "
            "batch norm, or make only depth or kernels elastic."
        )
    rate = weight_magnitude if importance is None else importance
    keep = {}
    for name in axes:
        scores = rate(variables.params, model.axes.params, name)
        if name in shared and scores.ndim > 1:
            scores = scores.sum(0)
        keep[name] = jnp.argsort(-jnp.asarray(scores), axis=-1, stable=True).astype(jnp.int32)
    return extract(variables, model.axes, Subnet(keep))


def weight_magnitude(params: PyTree, axes: PyTree, name: str) -> Array:
    """Returns the mean absolute weight of each index of an axis; every leaf counts alike.

    The result is f32[size], or f32[layer, size] where all leaves with the axis are stacked over
    layers.
    """
    pairs = zip(jax.tree.leaves(axes, is_leaf=is_axes), jax.tree.leaves(params), strict=True)
    found = [(names, leaf) for names, leaf in pairs if name in names]
    stacked = all("layer" in names for names, _ in found)
    total: Any = 0
    for names, leaf in found:
        kept = ("layer", name) if stacked else (name,)
        size = jnp.abs(leaf.astype(jnp.float32))
        scores = size.mean([i for i, own in enumerate(names) if own not in kept])
        total = total + scores / (scores.mean() + 1e-12)
    return total
