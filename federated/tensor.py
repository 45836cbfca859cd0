"""Where a model that one device cannot hold lies: split over the mesh axis "tensor".

A round is written for one device a client (`shard_map` over "clients" alone); what a client does is
left to XLA, which splits it over "tensor" by where the parameters lie. So the state of a run only
needs a place: server moments, variates and residuals lie as the parameters do that they belong to.
Column- then row-parallel, as in Shoeybi et al. 2019 (Megatron-LM, section 3).
"""

from __future__ import annotations

import functools

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxfm.model import PyTree, Variables, is_axes
from jaxfm.parallel.mesh import TENSOR_RULES, make_mesh


def clients_mesh(together: int = 1) -> Mesh:
    """All devices as a mesh of clients, `together` of which hold one client's model.

    Raises:
      ValueError: their number is no multiple of it.
    """
    devices = len(jax.devices())
    if devices % together:
        raise ValueError(
            f"tensor={together} does not divide the {devices} device{'s' * (devices > 1)}; give a "
            "divisor of their number."
        )
    return make_mesh(clients=devices // together, tensor=together)


def is_split(mesh: Mesh) -> bool:
    """Whether several devices hold one client's model."""
    return mesh.shape.get("tensor", 1) > 1


def check_divides(variables: Variables, axes: PyTree, mesh: Mesh) -> None:
    """Raises ValueError where the mesh is to split a model of which it can split nothing."""
    if is_split(mesh) and all(
        place.is_fully_replicated for place in jax.tree.leaves(places(variables, axes, mesh))
    ):
        raise ValueError(
            f"tensor={mesh.shape['tensor']} splits nothing of this model: it needs axes named "
            f"{', '.join(TENSOR_RULES)} whose size it divides; leave out --tensor."
        )


def places(tree: PyTree, axes: PyTree, mesh: Mesh, *, rows: P | None = None) -> PyTree:
    """A NamedSharding for each leaf of a state.

    A leaf belongs to the parameter whose path its own path ends with, if both have as many axes. It
    is split as `parallel.mesh.TENSOR_RULES` say, but for axes that do not divide, and lies whole
    where it belongs to none.

    Args:
      tree: arrays or their shapes, such as a server's state.
      axes: `Model.axes`; None: nothing is split.
      mesh: of `make_mesh`.
      rows: of leaves with one more axis in front, such as clients' memories: how that is split.
    """
    lead = P() if rows is None else rows
    if axes is None or not is_split(mesh):
        return jax.tree.map(lambda _: NamedSharding(mesh, lead), tree)
    named = jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_axes)
    by_path = {_words(path)[1:]: names for path, names in named}  # without "params" or "stats"
    front = 0 if rows is None else 1

    def place(path, leaf) -> NamedSharding:
        words = _words(path)
        ends = (by_path.get(words[i:]) for i in range(len(words)))
        names = next((found for found in ends if found is not None), None)
        if names is None or len(names) != len(leaf.shape) - front:
            return NamedSharding(mesh, lead)
        spec: list[str | None] = []
        for name, size in zip(names, leaf.shape[front:], strict=True):
            axis = TENSOR_RULES.get(name)
            fits = axis is not None and axis not in spec and size % mesh.shape[axis] == 0
            spec.append(axis if fits else None)
        first = [] if rows is None else [lead[0] if len(lead) else None]
        return NamedSharding(mesh, P(*first, *spec))

    return jax.tree_util.tree_map_with_path(place, tree)


def whole(tree: PyTree) -> PyTree:
    """The tree with every leaf on this process, also those whose parts lie in several processes."""
    at_hand = lambda x: x.is_fully_addressable or x.is_fully_replicated
    gather = functools.partial(multihost_utils.process_allgather, tiled=True)
    return jax.tree.map(lambda x: x if at_hand(x) else gather(x), tree)


def _words(path: tuple) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
