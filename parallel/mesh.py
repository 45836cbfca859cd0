"""Meshes and shardings: the one place where devices get names and arrays get places.

Every mesh has the same four axes, most of them of size 1, so that any spec is valid on any mesh:
`stage` (layers of a pipeline), `clients` (of a federation), `data` (batch) and `tensor` (channels
of one layer). Which axis of an array goes where follows from its logical axis names
(`Model.axes`) and one small table of rules:

>>> mesh = make_mesh()
>>> dict(mesh.shape)
{'stage': 1, 'clients': 1, 'data': 1, 'tensor': 1}
>>> tuple(shardings({"up": ("embed", "mlp")}, {"up": jax.numpy.ones((4, 8))}, mesh)["up"].spec)
(None, 'tensor')
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxfm.model import Array, PyTree, Variables, is_axes, is_stacked, layers_of, with_layers

AXES = ("stage", "clients", "data", "tensor")

# Column- then row-parallel, as in Shoeybi et al. 2019 (Megatron-LM, section 3): one sum over
# devices after each attention and one after each MLP.
TENSOR_RULES: Mapping[str, str] = {"kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor"}


def make_mesh(
    *,
    stage: int = 1,
    clients: int = 1,
    data: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with the axes stage, clients, data and tensor, of the sizes given.

    Axes are Auto: XLA propagates shardings within a jitted function.

    Args:
      stage, clients, data, tensor: sizes.
      devices: which to use; None: the first ones that there are.
    Raises:
      ValueError: a size below 1, or more devices needed than there are.
    """
    sizes = dict(zip(AXES, (stage, clients, data, tensor), strict=True))
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"Mesh axis {name} must have size 1 or more, got {size}.")
    devices = list(jax.devices() if devices is None else devices)
    needed = math.prod(sizes.values())
    if needed > len(devices):
        wanted = " x ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
        raise ValueError(
            f"A mesh of {wanted} needs {needed} devices; there are {len(devices)}. On CPU, start "
            f"Python with XLA_FLAGS=--xla_force_host_platform_device_count={needed}."
        )
    shape = tuple(sizes.values())
    if devices[:needed] == jax.devices()[:needed]:
        # Lets JAX order the devices by the network between them.
        return jax.make_mesh(
            shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:needed]
        )
    grid = np.array(devices[:needed]).reshape(shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shardings(
    axes: PyTree,
    like: PyTree,
    mesh: Mesh,
    rules: Mapping[str, str] = TENSOR_RULES,
    *,
    replicate_uneven: bool = False,
) -> PyTree:
    """One NamedSharding for each leaf.

    Args:
      axes: tuples of logical axis names (`Model.axes`); names without a rule are not split.
      like: arrays or their shapes, in the structure of `axes`; layers may be unstacked.
      mesh: of `make_mesh`.
      rules: logical axis name -> mesh axis.
      replicate_uneven: leave an axis whole if the mesh axis does not divide its size, instead of
        raising.
    Raises:
      ValueError: a rule names an axis that the mesh lacks, or a size is not divisible.
    """
    for name, axis in rules.items():
        if axis not in mesh.shape:
            raise ValueError(f"Rule {name!r} -> {axis!r}: the mesh has axes {mesh.axis_names}.")

    def place(path, names: tuple, leaf) -> NamedSharding:
        spec: list[str | None] = []
        for name, size in zip(names, leaf.shape, strict=True):
            axis = rules.get(name)
            if axis is not None and axis not in spec and size % mesh.shape[axis]:
                if not replicate_uneven:
                    raise ValueError(
                        f"{jax.tree_util.keystr(path, simple=True, separator='.')}: axis {name!r} "
                        f"of size {size} does not divide over mesh axis {axis!r} of size "
                        f"{mesh.shape[axis]}; choose another mesh, or pass replicate_uneven=True."
                    )
                axis = None
            # A mesh axis splits one axis of an array at most.
            spec.append(None if axis in spec else axis)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(
        place, _unstacked_axes(axes, like), like, is_leaf=is_axes
    )


def shard(
    variables: PyTree,
    axes: PyTree,
    mesh: Mesh,
    rules: Mapping[str, str] = TENSOR_RULES,
    *,
    replicate_uneven: bool = False,
) -> PyTree:
    """The variables, moved to where `shardings` puts them; arguments and errors are the same."""
    return jax.device_put(
        variables, shardings(axes, variables, mesh, rules, replicate_uneven=replicate_uneven)
    )


def spread(tree: PyTree, mesh: Mesh, axis: str = "data") -> PyTree:
    """One NamedSharding for each leaf, which splits it over a mesh axis whatever it means.

    A leaf is split by the longest of its axes that the mesh axis divides, and lies whole where
    there is none. Source: Rajbhandari et al. 2020 (ZeRO, stage 3), fully sharded data parallelism.

    Args:
      tree: arrays or their shapes, such as a training's state.
      mesh: of `make_mesh`.
      axis: of the mesh.
    """
    devices = mesh.shape[axis]

    def place(leaf) -> NamedSharding:
        fits = [(size, -at) for at, size in enumerate(leaf.shape) if size % devices == 0]
        if not fits or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return NamedSharding(mesh, PartitionSpec())
        at = -max(fits)[1]
        return NamedSharding(mesh, PartitionSpec(*[None] * at, axis))

    return jax.tree.map(place, tree)


def put(x: Any, sharding: NamedSharding) -> Array:
    """`x` on the devices of `sharding`, which may belong to several processes."""
    x = x if hasattr(x, "dtype") else np.asarray(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):  # device_put keeps keys within a process
        words = jax.device_put(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(x))
    return jax.device_put(x, sharding)


def _unstacked_axes(axes: PyTree, like: PyTree) -> PyTree:
    """The axes of stacked layers, repeated for a dict of layers where `like` has one."""
    if not isinstance(like, Variables) or is_stacked(layers_of(like)):
        return axes
    if not is_stacked(layers_of(axes)):  # a module's own list of layers: named one by one
        return axes
    stacked = jax.tree.map(lambda names: names[1:], layers_of(axes), is_leaf=is_axes)
    pairs = zip(stacked, layers_of(like), strict=True)
    return with_layers(axes, Variables(*(dict.fromkeys(layers, part) for part, layers in pairs)))
