"""Pruned models on disk: parameters, what was kept, and the program."""

from __future__ import annotations

import glob
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from safetensors.numpy import load_file, save_file

from jaxfm.model import Array, PyTree
from jaxfm.search.pruning import Pruned
from jaxfm.search.trace.groups import IGNORED, Network, network
from jaxfm.search.trace.interpret import sliced
from jaxfm.search.trace.plan import Leaf


def save_pruned(folder: str | os.PathLike, model: Pruned, *inputs: PyTree) -> None:
    """Writes parameters (safetensors), a manifest of kept units, and the program (StableHLO).

    `model.stablehlo` holds the program `(tensors of params.safetensors, *inputs) -> output`;
    `jax.export.deserialize` runs it without this library and without the model's own code.

    Args:
      folder: where the files go; it is made if it does not exist.
      model: what `prune` or `pruned` returned.
      *inputs: arrays or shapes that the program takes; without them those of the network's example.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    leaves = jax.tree.leaves(model.params)
    named = zip(model.network.leaves, leaves, strict=True)
    save_file({leaf.path: _stored(x) for leaf, x in named}, folder / "params.safetensors")
    manifest = {
        "groups": {
            group.name: [np.flatnonzero(row).tolist() for row in np.atleast_2d(mask)]
            for group, mask in zip(model.network.groups, model.kept, strict=True)
        },
        "dense": {leaf.path: list(leaf.shape) for leaf in model.network.leaves},
        "ignored": [name for name, why in model.network.frozen.items() if why == IGNORED],
        "costs": model.table(),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    inputs = inputs or model.network.example
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), inputs)
    order = [leaf.path for leaf in model.network.leaves]
    treedef = model.network.treedef

    def from_file(tensors: Mapping[str, Array], *inputs: PyTree) -> PyTree:
        leaves = [_restored(x, tensors[x.path]) for x in model.network.leaves]
        return model.apply(jax.tree.unflatten(treedef, leaves), *inputs)

    held = {path: jnp.asarray(_stored(x)) for path, x in zip(order, leaves, strict=True)}
    program = export.export(jax.jit(from_file))(held, *shapes)
    (folder / "model.stablehlo").write_bytes(program.serialize())


def _stored(leaf: Any) -> np.ndarray:
    """Returns a leaf as it is written; random keys become their words."""
    key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if key else leaf)


def _restored(leaf: Leaf, stored: Any) -> Array:
    key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.wrap_key_data(stored) if key else jnp.asarray(stored)


def load_pruned(
    folder: str | os.PathLike, function: Callable | Network, like: PyTree, *inputs: PyTree
) -> Pruned:
    """Returns what `save_pruned` wrote, to be evaluated, fine-tuned or pruned again.

    Args:
      folder: where it was written.
      function: the dense function, or its Network.
      like: dense parameters or their shapes, for the structure.
      *inputs: an example, as `network` takes it.
    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: the folder holds a cut of another network.
    """
    folder = pathlib.Path(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    ignore = [glob.escape(name) for name in manifest["ignored"]]
    own = (
        function
        if isinstance(function, Network)
        else network(function, like, *inputs, ignore=ignore)
    )
    dense = {leaf.path: list(leaf.shape) for leaf in own.leaves}
    if dense != manifest["dense"]:
        raise ValueError(f"{folder} holds another network; its parameters are {manifest['dense']}.")
    names = [group.name for group in own.groups]
    if names != list(manifest["groups"]):
        raise ValueError(
            f"{folder} was cut along {list(manifest['groups'])}, but this network has {names}; "
            "give the Network that was cut."
        )
    kept = []
    for group, rows in zip(own.groups, manifest["groups"].values(), strict=True):
        mask = np.zeros((len(rows), group.size), bool)
        for own_row, index in zip(mask, rows, strict=True):
            own_row[index] = True
        kept.append(mask if group.layers else mask[0])
    tensors = load_file(folder / "params.safetensors")
    params = jax.tree.unflatten(own.treedef, [_restored(x, tensors[x.path]) for x in own.leaves])
    return Pruned(params, sliced(own, tuple(kept)), tuple(kept), own)
