"""A causal language model cut by layers over the mesh axis "stage".

Each device of the axis holds some of the layers with their keys and values; embedding and head are
on every device. Where stages hold different numbers of layers, all are padded to the longest, and
the padding is skipped at run time. A slot before the first stage may hold no layers: it drafts.

Within a stage, the mesh axis "tensor" splits key/value heads (with their rows of the cache) and the
units of the MLP; embedding and head are whole on every device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxfm.model import (
    Array,
    PyTree,
    Stages,
    Variables,
    is_axes,
    is_stacked,
    layer_at,
    layers_of,
    num_layers,
    unstack,
    with_layers,
)
from jaxfm.parallel.cache import CausalModel
from jaxfm.parallel.mesh import TENSOR_RULES

STAGE, TENSOR = "stage", "tensor"
# The vocabulary stays whole: embedding and head are every stage's.
_RULES = {name: axis for name, axis in TENSOR_RULES.items() if name != "vocab"}


class Cut(NamedTuple):
    """A model's variables, laid out for a pipe.

    Attributes:
      shared: embedding and head, the same on all devices; no layers.
      layers: like the layers of one stage, every leaf with a leading axis of slots, which is split
        over the mesh axis "stage"; heads and MLP units are split over "tensor".
    """

    shared: Variables
    layers: Variables


def even_split(layers: int, stages: int) -> tuple[int, ...]:
    """The layers of each stage, as even as possible; the last stages get fewer.

    Raises:
      ValueError: fewer layers than stages.
    """
    if not 1 <= stages <= layers:
        raise ValueError(
            f"A model of {layers} layers cannot be cut into {stages} stages; give from 1 to "
            f"{layers}."
        )
    each, more = divmod(layers, stages)
    return tuple(each + (i < more) for i in range(stages))


def cut(variables: Variables, axes: Variables, split: Sequence[int], mesh: Mesh) -> Cut:
    """Distributes the layers over the slots of the mesh axis "stage", in order.

    Args:
      variables: of a causal language model whose layers have equal shapes.
      axes: its logical axis names (`Model.axes`).
      split: layers of each slot; may be 0.
      mesh: of `make_mesh`.
    Raises:
      ValueError: the split does not fit the model or the mesh, layers of unequal shape, or heads or
        MLP units that the mesh axis "tensor" does not divide.
    """
    layers = unstack(layers_of(variables))
    total = num_layers(layers)
    if sum(split) != total or min(split) < 0:
        raise ValueError(
            f"split={tuple(split)} has {sum(split)} of the model's {total} layers; place each "
            "layer once."
        )
    if len(split) != mesh.shape[STAGE]:
        raise ValueError(
            f"split={tuple(split)} names {len(split)} slots; mesh axis {STAGE!r} has "
            f"{mesh.shape[STAGE]}."
        )
    each = [layer_at(layers, i) for i in range(total)]
    if len({str(jax.tree.map(jnp.shape, layer)) for layer in each}) > 1:
        raise ValueError(
            "The layers have unequal shapes, so they cannot be cut over stages; such a model can "
            "only draft."
        )
    specs = _tensor_specs(layers_of(axes), each[0], mesh.shape.get(TENSOR, 1))
    nothing = jax.tree.map(jnp.zeros_like, each[0])
    firsts = [sum(split[:i]) for i in range(len(split))]
    uneven = len(set(split) - {0}) > 1

    def column(j: int) -> Variables:
        own = [each[a + j] if j < n else nothing for a, n in zip(firsts, split)]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *own)
        if not uneven:
            return stacked
        present = jnp.asarray([j < n for n in split])
        return stacked._replace(live={**stacked.live, _PRESENT: present})

    columns = [column(j) for j in range(max(split))]
    if uneven:
        specs = specs._replace(live={**specs.live, _PRESENT: PartitionSpec()})
    if jax.default_backend() == "cpu":  # slices of a stack are copied there (decoding_layout)
        apart = lambda parts: Variables(
            *({str(j): p for j, p in enumerate(part)} if part[0] else {} for part in zip(*parts))
        )
        held, specs = apart(columns), apart([specs] * len(columns))
        lead: tuple = (STAGE,)
    else:
        held, lead = jax.tree.map(lambda *x: jnp.stack(x, axis=1), *columns), (STAGE, None)
    place = lambda spec: NamedSharding(mesh, PartitionSpec(*lead, *spec))
    shared = Variables(*({k: v for k, v in p.items() if k != "layers"} for p in variables))
    return Cut(
        jax.device_put(shared, NamedSharding(mesh, PartitionSpec())),
        jax.device_put(held, jax.tree.map(place, specs, is_leaf=_is_spec)),
    )


def _is_spec(x) -> bool:
    return isinstance(x, PartitionSpec)


def _tensor_specs(axes: Variables, layer: Variables, size: int) -> Variables:
    """The spec of each leaf of one layer; `axes` are of the layers, stacked or not."""
    if size == 1:
        return jax.tree.map(lambda _: PartitionSpec(), layer)
    if is_stacked(axes):
        axes = jax.tree.map(lambda names: names[1:], axes, is_leaf=is_axes)
    else:
        axes = layer_at(axes, 0)

    def spec(names: tuple, leaf: Array) -> PartitionSpec:
        for name, units in zip(names, leaf.shape, strict=True):
            if name in _RULES and units % size:
                raise ValueError(
                    f"Axis {name!r} of size {units} does not divide over the tensor={size} devices "
                    f"of a stage; choose a mesh whose `tensor` divides it."
                )
        return PartitionSpec(*(_RULES.get(name) for name in names))

    return jax.tree.map(spec, axes, layer, is_leaf=is_axes)


_PRESENT = "present"  # whether a slot's place holds a layer or padding


@functools.cache
def skipping(lm: CausalModel) -> CausalModel:
    """The model whose blocks skip padding."""

    def block(layer: Variables, x, positions, mask, past=None):
        if _PRESENT not in layer.live:
            return lm.stages.block(layer, x, positions, mask, past)
        live = {name: leaf for name, leaf in layer.live.items() if name != _PRESENT}
        own = layer._replace(live=live)
        run = lambda x: lm.stages.block(own, x, positions, mask, past)
        rows = jax.eval_shape(run, x)[1]
        by = lambda x: (x, jax.tree.map(lambda r: jnp.zeros(r.shape, r.dtype), rows))
        return lax.switch(layer.live[_PRESENT].astype(jnp.int32), [by, run], x)

    return CausalModel(Stages(lm.stages.embed, block, lm.stages.head), lm.window)


def local(tree: PyTree) -> PyTree:
    """A device's own part of leaves that are split over slots."""
    return jax.tree.map(lambda x: x[0], tree)


def assemble(cut: Cut) -> Variables:
    """The variables of one stage, inside `shard_map`."""
    return with_layers(cut.shared, local(cut.layers))
