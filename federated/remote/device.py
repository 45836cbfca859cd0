"""A trained network, or the slice of it that a tier trains, for devices without the library.

    save_for_device("phone", bucket.model, bucket.shared(server), inputs)

writes params.safetensors and model.stablehlo, the program `(tensors, inputs) -> output`, which
`jax.export.deserialize` runs with JAX alone; `program.call` takes what is in the file by name. As
a Hugging Face folder, where the architecture has one: `jaxfm.hub.save`.
"""

from __future__ import annotations

import os
import pathlib

import jax
import numpy as np
from jax import export
from safetensors.numpy import save_file

from jaxfm.adapters import merge
from jaxfm.federated.remote.trees import flat, names_of, shapes_of
from jaxfm.model import Array, Model, PyTree, Variables


def save_for_device(
    folder: str | os.PathLike[str], model: Model, variables: Variables, inputs: PyTree
) -> None:
    """Writes a network's numbers and its program.

    Args:
      folder: is made if it does not exist.
      model, variables: the network; an adapter is merged into it.
      inputs: an example, or shapes, of what the network takes; the program takes the same shapes.
    """
    if model.adapter is not None:
        model, variables = merge(model, variables)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names, tree = names_of("", variables), jax.tree.structure(variables)

    def program(tensors: dict[str, Array], inputs: PyTree) -> PyTree:
        leaves = [tensors[name] for name in names]
        return model.apply(jax.tree.unflatten(tree, leaves), inputs)[0]

    tensors = {name: np.ascontiguousarray(x) for name, x in flat("", variables).items()}
    save_file(tensors, folder / "params.safetensors")
    exported = export.export(jax.jit(program))(shapes_of(tensors), shapes_of(inputs))
    (folder / "model.stablehlo").write_bytes(exported.serialize())
