"""Models of this library as networks: groups follow logical axes, kept units become a `Subnet`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxfm.model import Model, PyTree, Variables, is_axes
from jaxfm.search.trace.groups import Kept, Network, key_name, network
from jaxfm.search.trace.interpret import check, positions
from jaxfm.subnet import FIXED, Subnet

_LAYER = re.compile(r"/layers/(\d+)/")


def model_network(
    model: Model,
    variables: Variables,
    *inputs: PyTree,
    ignore: Sequence[str] = (),
    whole: Sequence[str] = (),
) -> Network:
    """Returns the network of `model.apply`; its second function is the model in training mode.

    Stacked layers keep equal numbers of units, each layer its own; unstacked layers
    (`model.unstack`) have separate groups. The mask of a norm's live channels is tied to the norm's
    scale. Axes that `jaxfm.subnet` cannot cut are ignored.

    Args:
      model: a model with logical axes.
      variables: its arrays or their shapes.
      inputs: one example of what `apply` takes.
      ignore: further patterns, as in `network`.
      whole: further logical axes that are not cut, such as the sizes that all heads share
        ("qk_dim", "v_dim"), so that the slice has a config of its family.
    Raises:
      ValueError: as `network`.
    """
    names = axis_names(model, variables)
    ties = []
    for path, axes in names.items():
        place = path.removeprefix("live").removesuffix("live")
        for scale in (f"params{place}scale", f"frozen{place}scale"):
            if path.startswith("live/") and scale in names:
                ties.append((f"{path}:{len(axes) - 1}", f"{scale}:{len(axes) - 1}"))
    stay = {*FIXED, *whole}
    fixed = [f"{p}:{d}" for p, axes in names.items() for d, n in enumerate(axes) if n in stay]

    def evaluate(variables: Variables, *x: PyTree) -> PyTree:
        return model.apply(variables, *x)[0]

    def train(variables: Variables, *x: PyTree) -> PyTree:
        return model.apply(variables, *x, train=True)

    return network(evaluate, variables, *inputs, also=(train,), ignore=(*fixed, *ignore), ties=ties)


def axis_names(model: Model, variables: Variables) -> dict[str, tuple[str | None, ...]]:
    """Returns the logical axis names of every leaf by path; unstacked layers lack "layer"."""
    join = lambda path: "/".join(map(key_name, path))
    flat, _ = jax.tree_util.tree_flatten_with_path(model.axes, is_leaf=is_axes)
    known = {join(path): names for path, names in flat}
    out = {}
    for path, _ in jax.tree_util.tree_flatten_with_path(variables)[0]:
        name = join(path)
        stacked = _LAYER.sub("/layers/", name)
        out[name] = known[name] if name in known else known[stacked][1:]
    return out


def to_subnet(network: Network, model: Model, variables: Variables, kept: Kept) -> Subnet:
    """Returns the kept units as indices of logical axes, for `jaxfm.extract` and clients.

    Args:
      network: what `model_network` returned.
      model: the model.
      variables: what the network was made from; the Subnet is one of the stacked model.
      kept: the units that stay.
    Raises:
      ValueError: a cut group lies on an axis without a logical name (`cut` and `sliced` need no
        names).
    """
    kept = check(network, kept)
    names = axis_names(model, variables)
    keep: dict[str, Any] = {}
    layered: dict[str, dict[int, np.ndarray]] = {}
    for leaf in network.leaves:
        layer = _LAYER.search(leaf.path)
        for d, axis in enumerate(leaf.axes):
            if not axis.shape[1]:
                continue
            name, index = names[leaf.path][d], positions(axis, network.groups, kept)
            if name is None:
                if index.shape[-1] < len(axis):
                    raise ValueError(
                        f"{leaf.path}:{d} is cut but has no logical axis; use `cut` and `sliced`, "
                        "or ignore it."
                    )
                continue
            own = layered.setdefault(name, {}) if layer and name != "embed" else keep
            place: Any = int(layer[1]) if own is not keep and layer else name
            if place in own and not np.array_equal(own[place], index):
                raise ValueError(
                    f"{leaf.path}:{d} is cut differently from other axes named {name!r}."
                )
            own[place] = index.astype(np.int32)
    for name, rows in layered.items():
        found = [rows[i] for i in sorted(rows)]
        equal = len({len(row) for row in found}) == 1
        keep[name] = np.stack(found) if equal else found
    return Subnet(keep)
