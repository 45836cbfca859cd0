"""A client's folder before its first step: its rows, and its step exported as StableHLO.

What a process needs afterwards is `standalone`, which does not import the library.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

import jax
from jax import export

from jaxfm.federated.algorithm import Algorithm, Bucket, ClientData, Profile
from jaxfm.federated.remote.standalone import save_arrays, write_text
from jaxfm.federated.remote.trees import flat, leaves_of, shapes_of, tree_of, words_of
from jaxfm.federated.wrappers.secure import SecureUpload
from jaxfm.model import Key, PyTree, Variables


class Client(NamedTuple):
    """What a client's process knows before its first round.

    Attributes:
      algorithm: the server's.
      variables: that the run starts from, or their shapes.
      data, profile: its own, as of `client_data`.
      public: the server's public data or their shapes; None: there are none.
      has_secrets: whether its draws are secret, as those of noise on its examples' gradients are:
        it then trains with keys that the server does not know.
    """

    algorithm: Algorithm
    variables: Variables
    data: ClientData
    profile: Profile
    public: PyTree = None
    has_secrets: bool = False


class Shapes(NamedTuple):
    """Trees of `jax.ShapeDtypeStruct` of what a client of one bucket gets, keeps and sends."""

    download: PyTree
    key: Any
    memory: PyTree
    data: tuple[ClientData, Profile]
    upload: PyTree
    info: PyTree


def shapes_of_client(bucket: Bucket, server: PyTree, public: PyTree, data: PyTree) -> Shapes:
    """Shapes of everything that a client of the bucket sees.

    Args:
      server, public: the server's state and public data, or their shapes.
      data: (data, profile) of a client, or their shapes.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    download = jax.eval_shape(bucket.send, server, public)
    memory = jax.eval_shape(bucket.init_client, download, *data, key)
    upload, _, info = jax.eval_shape(bucket.client, download, memory, *data, key)
    return Shapes(download, key, memory, shapes_of(data), upload, info)


def is_masked(shapes: Shapes) -> bool:
    """Whether uploads are words that are summed under masks (`with_secure_sums`)."""
    return isinstance(shapes.upload, SecureUpload)


def first_program(bucket: Bucket, shapes: Shapes) -> export.Exported:
    """`(download, data, key) -> memory` of a client before its first round, on lists of arrays."""

    def first(download: list, data: list, key: Key) -> list:
        return words_of(
            bucket.init_client(
                tree_of(shapes.download, download),
                *tree_of(shapes.data, data),
                tree_of(shapes.key, [key]),
            )
        )

    return _exported(first, shapes.download, shapes.data, shapes.key)


def step_program(bucket: Bucket, shapes: Shapes) -> export.Exported:
    """`(download, memory, data, key) -> (upload, memory, info)`, on lists of arrays."""

    def step(download: list, memory: list, data: list, key: Key) -> tuple[list, list, list]:
        outputs = bucket.client(
            tree_of(shapes.download, download),
            tree_of(shapes.memory, memory),
            *tree_of(shapes.data, data),
            tree_of(shapes.key, [key]),
        )
        upload, kept, info = map(words_of, outputs)
        return upload, kept, info

    return _exported(step, shapes.download, shapes.memory, shapes.data, shapes.key)


def _exported(function: Any, *trees: PyTree) -> export.Exported:
    """Exported for shapes of lists; a key, which comes last, is one array of words."""
    *lists, key = (jax.eval_shape(words_of, tree) for tree in trees)
    return export.export(jax.jit(function))(*lists, key[0])


def prepare_site(folder: pathlib.Path, client: Client, b: int) -> None:
    """Writes the folder of a client of bucket b; see `standalone`.

    Raises:
      ValueError: the algorithm has no such bucket.
    """
    buckets = client.algorithm.buckets
    if not 0 <= b < len(buckets):
        raise ValueError(f"bucket={b}: the algorithm has buckets 0 to {len(buckets) - 1}.")
    own = (client.data, client.profile)
    server = jax.eval_shape(client.algorithm.init, client.variables)
    shapes = shapes_of_client(buckets[b], server, client.public, own)
    save_arrays(folder / "data.safetensors", flat("data", own))
    for name, program in (("first", first_program), ("step", step_program)):
        (folder / f"{name}.bin").write_bytes(program(buckets[b], shapes).serialize())
    leaves = {part: leaves_of(part, tree) for part, tree in shapes._asdict().items()}
    about = {
        "leaves": leaves,
        "own_randomness": client.has_secrets or buckets[b].privacy == "clients",
        "is_masked": is_masked(shapes),
    }
    write_text(folder / "about.json", json.dumps(about))  # the last: now it is complete
