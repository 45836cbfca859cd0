"""Supernets: one set of weights, of which every prefix of every group is a network of its own.

The channels of each group are put in order of importance, which changes no output; from then on
"keep the first k" is a slice. Training runs the largest, the smallest and some random members a
step, the others learning what the largest says, so that members are good as they are cut. An
architecture is its counts, i32[G]: channels, heads or layers kept of each group, most important
first. Groups are the logical axes of a model (`Model.axes`), per layer where layers differ. The
kernels of convolutions may be elastic, too: a group each, of which the centre is kept.

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
(Once-for-All), section 3.3, where budgets are met by drawing until one fits; here by projection.
There a learned matrix turns the centre of a kernel into the smaller kernel; here it is that kernel,
so that members stay slices of one set of weights, as clients that average them need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxfm.distillation import kl_divergence
from jaxfm.model import Array, Key, Model, PyTree, Variables, is_axes
from jaxfm.optimizer import apply_gradients
from jaxfm.search.strategies.project import Budget, projection
from jaxfm.subnet import Subnet, axis_sizes, centre, extract, is_taps, kernel_sizes, mask
from jaxfm.tasks import Task


class ElasticGroup(NamedTuple):
    """Channels, or the taps of a kernel, that are kept or cut together.

    Attributes:
      axis: logical name; "layer" is depth: a layer left out is the identity, where layers add to a
        residual stream and norms come first. "kernel_..." is the height and width of a kernel.
      layer: which layer's, or None where all layers share the axis or there are none.
      size: channels; of a kernel, taps in a row.
      channel_multiple: counts are multiples of it, or the whole group.
      least: the fewest that members keep.
      kernels: the counts that a kernel may have, ascending; () of channels.
    """

    axis: str
    layer: int | None
    size: int
    channel_multiple: int
    least: int
    kernels: tuple[int, ...] = ()


class Supernet(NamedTuple):
    """A model whose groups are ordered by importance.

    Attributes:
      variables: with every group's channels in order; the model computes what it did before.
      groups: G of them; an architecture is counts i32[G] in this order.
      largest, smallest: i32[G]; the smallest member is the knowledge network that clients of any
        budget share.
      mask: `(variables, counts) -> variables` with zeros outside; counts may be traced, so that all
        members share one compilation.
      extract: `(variables, counts) -> variables` of the member's own size.
      subnet: `(counts) -> Subnet` of the ordered model, for `jaxfm.subnet` and federated learning.
      parameters: `(counts f32[G]) -> f32[]`, an array expression, to be a `Budget`'s cost.
      sample: `(key, n) -> counts i32[n, G]`, uniform in the steps of each group.
      fit: `(budgets) -> (logits f32[G]) -> counts i32[G]`, the proportions of the logits at the
        level that meets all budgets (`jaxfm.search.strategies.project`).
      members: `(budgets) -> counts i32[n, G]`, one uniformly shrunk member a client's budget.
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
    multiple: int | None = None,  # its former name
    smallest: float = 0.25,
    kernels: Sequence[int] | Mapping[str, Sequence[int]] = (),
    importance: Callable[[PyTree, PyTree, str], Array] | None = None,
) -> Supernet:
    """Orders a model's channels and makes a supernet of it.

    Args:
      model: of one of our families, or any with logical axes.
      variables: trained, and of equal layers.
      axes: which logical axes are elastic; "layer" for depth. May be () where kernels are.
      shared: those that all layers share; the others have a group a layer, where there are layers.
      channel_multiple: of counts, for all axes or by axis; depth and heads usually have 1.
      smallest: share of each group that every member keeps, in [0, 1); at least one step. Kernels
        are as small as `kernels` says.
      kernels: sizes, (5, 3) or (3, 1), of every kernel whose own size is the largest of some of
        them: with (5, 3), those of size 5 may be 3. Or by the name of the kernel
        (`jaxfm.subnet.kernel_sizes`), its own size among them.
      importance: `(params, axes, name) -> f32[size]` or f32[layer, size]; `magnitude` if None.
    Raises:
      ValueError: an axis that the model does not have, or a setting out of range.
    """
    channel_multiple = channel_multiple if multiple is None else multiple
    if not 0 <= smallest < 1:
        raise ValueError(f"smallest={smallest} must be in [0, 1).")
    groups = _groups(
        model, axis_sizes(variables, model.axes), axes, shared, channel_multiple, smallest
    )
    groups += _kernel_groups(kernel_sizes(variables, model.axes), kernels)
    if not groups:
        raise ValueError("Nothing is elastic; give `axes`, `kernels` or both.")
    variables = reorder(
        model, variables, [name for name in axes if name != "layer"], shared, importance
    )
    largest = np.array([g.size for g in groups], np.int32)
    fewest = np.array([g.least for g in groups], np.int32)
    low, most, to_counts = _steps(groups, smallest)

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

    def masked(variables: Variables, counts: Array) -> Variables:
        return mask(variables, model.axes, Subnet(_padded_keep(groups, counts)))

    def extracted(variables: Variables, counts: Any) -> Variables:
        return extract(variables, model.axes, subnet(counts))

    def subnet(counts: Any) -> Subnet:
        return Subnet(_keep(groups, _checked(groups, counts)))

    return Supernet(
        variables, groups, largest, fewest, masked, extracted, subnet,
        lambda counts: _parameters(model.axes.params, variables.params, groups, counts),
        sample, fit, members,
    )  # fmt: skip


def reorder(
    model: Model,
    variables: Variables,
    axes: Sequence[str],
    shared: Sequence[str] = ("embed",),
    importance: Callable[[PyTree, PyTree, str], Array] | None = None,
) -> Variables:
    """Puts the channels of each axis in order, the most important first; no output changes.

    Every occurrence of an axis is permuted alike, so products contract the same pairs. Traceable.

    Raises:
      ValueError: channels of a model with group norms, where place matters.
    """
    if axes and getattr(model.config, "norm", None) == "group":
        raise ValueError(
            f"axes={list(axes)} cannot be put in order: a group norm divides channels by place. "
            "Use batch norm, or make depth or kernels alone elastic."
        )
    rate = magnitude if importance is None else importance
    keep = {}
    for name in axes:
        scores = rate(variables.params, model.axes.params, name)
        if name in shared and scores.ndim > 1:
            scores = scores.sum(0)
        keep[name] = jnp.argsort(-jnp.asarray(scores), axis=-1, stable=True).astype(jnp.int32)
    return extract(variables, model.axes, Subnet(keep))


def magnitude(params: PyTree, axes: PyTree, name: str) -> Array:
    """Mean absolute weight of each index of an axis, every leaf counted alike; a row a layer.

    f32[size], or f32[layer, size] where every leaf with the axis is stacked over layers.
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


def sandwich(
    net: Supernet,
    model: Model,
    task: Task,
    optimizer: optax.GradientTransformation,
    *,
    num_random: int = 2,
) -> Callable[..., tuple[Variables, PyTree, Array]]:
    """Returns `step(variables, opt_state, batch, key) -> (variables, opt_state, losses)`, jitted.

    One step minimises CE(largest) + KL(largest || smallest) + Σ KL(largest || random), the soft
    targets held fixed; losses are f32[2 + num_random] in that order. Members are masks, so all of
    them share one compilation, and are run one after the other. Statistics of batch norm are those
    of the largest; `recalibrate` measures a member's own. `optimizer.init(variables.params)`
    makes the first `opt_state`.

    Raises:
      ValueError: num_random < 0.
    """
    if num_random < 0:
        raise ValueError(f"num_random={num_random} must be at least 0.")

    def mean(total: Array, weight: Array) -> Array:
        return total / jnp.maximum(weight, 1)

    @jax.jit
    def step(variables, opt_state, batch, key):
        prepare_key, sample_key, run_key = jax.random.split(key, 3)
        inputs, targets, weight = task.prepare(batch, prepare_key)
        members = jnp.concatenate(
            [jnp.asarray(net.smallest)[None], net.sample(sample_key, num_random)]
        )

        def largest(params):
            own = variables._replace(params=params)
            logits, stats = model.apply(own, inputs, train=True, key=run_key)
            return mean(*task.loss(logits, targets, weight)), (logits, stats)

        def member(params, counts, teacher):
            own = net.mask(variables._replace(params=params), counts)
            logits, _ = model.apply(own, inputs, train=True, key=run_key)
            return mean(*kl_divergence(teacher, logits, weight))

        (first, (teacher, stats)), grads = jax.value_and_grad(largest, has_aux=True)(
            variables.params
        )

        def add(grads, counts):
            loss, own = jax.value_and_grad(member)(
                variables.params, counts, lax.stop_gradient(teacher)
            )
            return jax.tree.map(jnp.add, grads, own), loss

        grads, losses = lax.scan(add, grads, members)
        params, opt_state = apply_gradients(optimizer, grads, opt_state, variables.params)
        losses = jnp.concatenate([first[None], losses])
        return variables._replace(params=params, stats=stats), opt_state, losses

    return step


def _groups(model, sizes, axes, shared, multiples, smallest) -> tuple[ElasticGroup, ...]:
    if not set(axes) <= set(sizes):
        raise ValueError(f"axes={tuple(axes)} must be some of the model's axes, {sorted(sizes)}.")
    of_layers = {
        name
        for name in axes
        if name not in shared
        and name != "layer"
        and all(
            "layer" in names
            for names in jax.tree.leaves(model.axes, is_leaf=is_axes)
            if name in names
        )
    }
    groups = []
    for name in axes:
        step = multiples if isinstance(multiples, int) else multiples.get(name, 1)
        if step < 1:
            raise ValueError(f"channel_multiple of {name!r} is {step}; give at least 1.")
        size = sizes[name]
        # Counted in steps, as the projection counts.
        steps = max(1, int(np.ceil(smallest * -(-size // step))))
        least = min(steps * step, size)
        layers: Sequence[int | None] = range(sizes["layer"]) if name in of_layers else [None]
        groups += [ElasticGroup(name, layer, size, step, least) for layer in layers]
    return tuple(groups)


def _kernel_groups(
    sizes: dict[str, int], kernels: Sequence[int] | Mapping[str, Sequence[int]]
) -> tuple[ElasticGroup, ...]:
    if isinstance(kernels, Mapping):
        chosen = dict(kernels)
    else:
        smaller = {name: [k for k in kernels if k <= size] for name, size in sizes.items()}
        chosen = {name: own for name, own in smaller.items() if sizes[name] in own and len(own) > 1}
    groups = []
    for name, own in chosen.items():
        if name not in sizes or sizes[name] not in own or max(own) > sizes[name]:
            raise ValueError(
                f"kernels of {name!r} are {tuple(own)}; give some up to the whole size of one of "
                f"the model's kernels, that size among them: {sizes}."
            )
        choices = tuple(sorted({len(centre(sizes[name], k)) for k in own}))
        groups.append(ElasticGroup(name, None, sizes[name], 1, choices[0], choices))
    if kernels and not groups:
        raise ValueError(f"kernels={kernels} leave no choice; the model's kernels are {sizes}.")
    return tuple(groups)


def _steps(
    groups: tuple[ElasticGroup, ...], smallest: float
) -> tuple[np.ndarray, np.ndarray, Callable[[Array], Array]]:
    """The first and last step of each group, i32[G], and `(steps [..., G]) -> counts [..., G]`."""
    largest = np.array([g.size for g in groups], np.int32)
    multiple = np.array([g.channel_multiple for g in groups], np.int32)
    low = -(-np.array([g.least for g in groups], np.int32) // multiple)
    most = -(-largest // multiple)
    at = np.array([i for i, g in enumerate(groups) if g.kernels], np.int32)
    for i in at:
        # The projection keeps the share `smallest` of the steps: so many that all choices remain.
        choices = len(groups[i].kernels)
        most[i] = choices
        while most[i] - max(1, int(np.ceil(smallest * most[i]))) + 1 < choices:
            most[i] += 1
        low[i] = most[i] - choices + 1
    width = max((len(groups[i].kernels) for i in at), default=0)
    table = np.array(
        [groups[i].kernels + (0,) * (width - len(groups[i].kernels)) for i in at], np.int32
    )

    def to_counts(steps: Array) -> Array:
        along = lambda x: jnp.broadcast_to(jnp.asarray(x, steps.dtype), steps.shape)
        counts = jnp.minimum(steps * along(multiple), along(largest))
        if not len(at):
            return counts
        own = steps[..., at].astype(jnp.int32)
        place = jnp.clip(own - jnp.broadcast_to(low[at], own.shape), 0)
        return counts.at[..., at].set(
            jnp.asarray(table)[np.arange(len(at)), place].astype(steps.dtype)
        )

    return low, most, to_counts


def _rows(groups: tuple[ElasticGroup, ...]) -> dict[str, list[int]]:
    """Which groups belong to each axis, in the order of layers."""
    rows: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        rows.setdefault(group.axis, []).append(i)
    return rows


def _padded_keep(groups: tuple[ElasticGroup, ...], counts: Array) -> dict[str, Array]:
    """Index arrays of one shape for all members: the first k, or the centre, then padding."""
    keep = {}
    for name, at in _rows(groups).items():
        size = groups[at[0]].size
        index = jnp.arange(size)[None]
        # An index is kept where fewer others come before it than are kept.
        before = jnp.abs(2 * index - (size - 1)) if is_taps(name) else index
        index = jnp.where(before < jnp.asarray(counts)[np.array(at)][:, None], index, size)
        keep[name] = index[0] if groups[at[0]].layer is None else index
    return keep


def _keep(groups: tuple[ElasticGroup, ...], counts: np.ndarray) -> dict[str, Any]:
    keep: dict[str, Any] = {}
    for name, at in _rows(groups).items():
        size, of = groups[at[0]].size, is_taps(name)
        own = [centre(size, k) if of else np.arange(k, dtype=np.int32) for k in counts[at]]
        equal = len(set(counts[at].tolist())) == 1
        keep[name] = own[0] if equal else own
    return keep


def _checked(groups: tuple[ElasticGroup, ...], counts: Any) -> np.ndarray:
    counts = np.asarray(counts)
    if counts.shape != (len(groups),):
        raise ValueError(
            f"counts have shape {counts.shape}; this supernet has {len(groups)} groups."
        )
    for group, count in zip(groups, counts.tolist(), strict=True):
        if not 1 <= count <= group.size or (group.kernels and count not in group.kernels):
            allowed = group.kernels or f"1 to {group.size}"
            raise ValueError(f"{count} of {group} cannot be kept; give {allowed}.")
    return counts


def _parameters(
    axes: PyTree, params: PyTree, groups: tuple[ElasticGroup, ...], counts: Array
) -> Array:
    """Σ over leaves of the product of kept axes; stacked leaves layer by layer."""
    rows = _rows(groups)
    total = jnp.zeros(())
    leaves = jax.tree.leaves(params)
    for names, leaf in zip(jax.tree.leaves(axes, is_leaf=is_axes), leaves, strict=True):
        depth = leaf.shape[names.index("layer")] if "layer" in names else 1
        each = jnp.ones(depth)
        for name, size in zip(names, leaf.shape, strict=True):
            if name == "layer":
                continue
            each = each * (counts[np.array(rows[name])] if name in rows else float(size))
        if "layer" in names and "layer" in rows:
            each = each * jnp.clip(
                counts[rows["layer"][0]] - jnp.arange(depth, dtype=jnp.float32), 0, 1
            )
        total = total + each.sum()
    return total


def recalibrate(model: Model, variables: Variables, batches: PyTree) -> Variables:
    """The former form of `jaxfm.search.recalibrate`."""
    from jaxfm.search.recalibration import recalibrate as of_function

    return of_function(lambda v, x: model.apply(v, x, train=True)[1], variables, batches)
