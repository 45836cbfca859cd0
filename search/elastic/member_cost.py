"""Multiply-adds of a supernet's members as an expression of their counts: a `Budget`'s cost.

The costs of `jaxfm.search.trace.cost` are read from the function and know channel groups by their
units. Logical axes give those groups their names, hence the counts of the supernet. Taps are not
units: the multiply-adds of a convolution are proportional to the area of its kernel.

    macs(counts) = Σ over products and convolutions of (k / K)² · Π of the kept sizes of their axes
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxfm.model import Model, PyTree, layers_of, unstack, with_layers
from jaxfm.search.elastic.supernet import Supernet
from jaxfm.search.trace.cost import contractions, costs
from jaxfm.search.trace.groups import Network
from jaxfm.search.trace.models import axis_names, model_network


def member_macs(net: Supernet, model: Model, *inputs: PyTree) -> Callable[[Any], Any]:
    """Returns `(counts [G]) -> []`, the multiply-adds of one example.

    Exact in NumPy (float64); in JAX, as a `Budget`'s cost, to the rounding of float32.

    Args:
      net: a supernet of `model` with elastic widths and kernels.
      model: the model.
      *inputs: one example of what `apply` takes, with a batch axis, or its shapes.
    Raises:
      ValueError: an elastic axis whose cost cannot be read from the function, such as depth, since
        the function runs all layers.
    """
    variables = net.variables
    if "layers" in variables.params:  # counts may differ between layers
        variables = with_layers(variables, unstack(layers_of(variables)))
    network = model_network(model, variables, *inputs)
    names = axis_names(model, variables)
    rows = {(group.axis, group.layer): i for i, group in enumerate(net.groups)}
    of_group = _rows_of_groups(network, names, rows)
    of_kernel = _rows_of_kernels(network, names, rows)
    missing = set(range(len(net.groups))) - set(of_group) - set(of_kernel)
    if missing:
        raise ValueError(
            f"The multiply-adds of {[net.groups[i] for i in sorted(missing)]} cannot be read from "
            "the function; budget `net.parameters`, or leave these axes whole."
        )
    each, none = costs(network).each, len(net.groups)
    # One more entry, 1, stands for what is not elastic.
    to_group, to_kernel = (np.where(at < 0, none, at) for at in (of_group, of_kernel))
    whole_kernel = np.array([*(g.size for g in net.groups), 1])[to_kernel] ** 2

    def macs(counts: Any) -> Any:
        xp: Any = np if isinstance(counts, np.ndarray) else jnp
        dtype = np.float64 if xp is np else jnp.float32
        known = xp.append(xp.asarray(counts, dtype), xp.ones(1, dtype))
        whole = xp.asarray(network.sizes, dtype)
        kept = xp.where(xp.asarray(of_group < 0), whole, known[to_group])
        # It is multiplied before it is divided, so that whole numbers stay whole.
        return (each(kept) * known[to_kernel] ** 2 / xp.asarray(whole_kernel, dtype)).sum()

    return macs


def _rows_of_groups(network: Network, names: dict, rows: dict) -> np.ndarray:
    """Returns the number of the elastic group that each group of the network is, or -1."""
    at = np.full(len(network.groups), -1, np.int32)
    for g, group in enumerate(network.groups):
        for member in group.members:
            name = names[member.path][member.axis]
            found = rows.get((name, _layer(member.path)), rows.get((name, None)))
            if found is not None:
                at[g] = found
    return at


def _rows_of_kernels(network: Network, names: dict, rows: dict) -> np.ndarray:
    """Returns the number of the elastic group of each contraction's kernel, or -1."""
    plan = network.plan(0, *network.example)
    leaf = dict(zip(plan.graph.inputs, network.leaves, strict=False))
    at = []
    for item in contractions(plan):
        read = item.op.inputs[1] if item.op.name == "conv_general_dilated" else None
        kernel = leaf.get(read) if isinstance(read, int) else None
        at.append(-1 if kernel is None else rows.get((names[kernel.path][0], None), -1))
    return np.array(at, np.int32)


def _layer(path: str) -> int | None:
    parts = path.split("/")
    after = parts[parts.index("layers") + 1] if "layers" in parts else ""
    return int(after) if after.isdigit() else None
