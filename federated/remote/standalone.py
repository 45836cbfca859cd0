"""A client's process: answers an order of the server with an exported step, in one file.

Flower starts a fresh process for every message. To be quick, this one imports NumPy and JAX and
not the library: the first order of a run exports the client's step into its folder (`prepare`,
which does need the library), and later ones load it from there, compiled (JAX's persistent cache).
An app for Flower carries a copy of this file.

What lies in the folder of a client, which never leaves its machine:

    about.json                  names, dtypes and shapes of everything below
    first.bin, step.bin         the exported programs
    data.safetensors            the client's own rows, ready for the step
    memory_00000007.safetensors what the client keeps between rounds, after its round 7
    xla/                        compiled programs

A round counts for a client only when the server says so in its next order (`counted`): an upload
that came too late, or was refused, leaves the client's memory as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  # makes NumPy know bfloat16
import numpy as np

BYTES = "jaxfm.bytes"  # how arrays are serialized: their bytes, little-endian, rows first
FIRST = "first:"  # before the name of what a client's first memory is made of
NEVER = -1  # the round that counted last, for a client of which none has
_RUN = re.compile(r"[0-9a-z]{1,64}")
_MEMORY = re.compile(r"memory_(\d+)\.safetensors")

Arrays = dict[str, np.ndarray]
Config = dict[str, Any]


class Refusal(ValueError):
    """Why a message is not taken, as one sentence."""


class Leaf(NamedTuple):
    """What is known of an array before it comes: the name of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


class Wire(NamedTuple):
    """An array on its way; the fields of Flower's `Array`."""

    dtype: str
    shape: tuple[int, ...]
    stype: str
    data: bytes


def leaf_of(array: Any) -> Leaf:
    """Of an array, or of its shape and dtype."""
    return Leaf(np.dtype(array.dtype).name, tuple(int(n) for n in array.shape))


def pack(arrays: Mapping[str, np.ndarray]) -> dict[str, Wire]:
    """Arrays as they travel."""
    found = {}
    for name, array in arrays.items():
        array = np.asarray(array)
        found[name] = Wire(*leaf_of(array), BYTES, np.ascontiguousarray(array).tobytes())
    return found


def unpack(wires: Mapping[str, Any], expected: Mapping[str, Leaf]) -> Arrays:
    """Arrays from what came, which must be what is expected, byte for byte in size.

    Args:
      wires: by name, objects with the fields of `Wire`.
      expected: by name.
    Raises:
      Refusal: a leaf that is missing or nobody asked for, another dtype, shape, serialization or
        number of bytes; nothing is allocated before these are checked.
    """
    missing = [name for name in expected if name not in wires]
    if missing:
        raise Refusal(f"{len(missing)} arrays are missing, the first of them {missing[0]!r}.")
    more = [name for name in wires if name not in expected]
    if more:
        raise Refusal(f"{len(more)} arrays are not asked for, such as {str(more[0])[:80]!r}.")
    arrays = {}
    for name, leaf in expected.items():
        wire = wires[name]
        for what, given, wanted in (
            ("serialized as", wire.stype, BYTES),
            ("of dtype", wire.dtype, leaf.dtype),
            ("of shape", wire.shape, leaf.shape),
        ):
            if type(given) is not type(wanted) or given != wanted:
                raise Refusal(f"{name} is {what} {str(given)[:80]}, where {wanted} is expected.")
        if not isinstance(wire.data, bytes) or len(wire.data) != leaf.nbytes:
            size = len(wire.data) if isinstance(wire.data, bytes) else "no"
            raise Refusal(f"{name} has {size} bytes, where {leaf.nbytes} are expected.")
        arrays[name] = np.frombuffer(wire.data, leaf.dtype).reshape(leaf.shape)
    return arrays


def not_finite(arrays: Mapping[str, np.ndarray]) -> str:
    """A sentence on the first array with entries that are not finite; empty if there is none."""
    for name, array in arrays.items():
        if np.dtype(array.dtype).kind in "biu?":
            continue
        bad = int((~np.isfinite(np.asarray(array, np.float64))).sum())
        if bad:
            return f"{name} has {bad} of {array.size} entries that are not finite."
    return ""


def digest(array: np.ndarray) -> str:
    """Of an array's dtype, shape and bytes."""
    sums = hashlib.blake2b(repr(leaf_of(array)).encode(), digest_size=16)
    sums.update(np.ascontiguousarray(array).tobytes())
    return sums.hexdigest()


def save_arrays(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays of any dtype into one file, which appears when it is complete."""
    from safetensors.numpy import save_file

    leaves = {name: leaf_of(np.asarray(x)) for name, x in arrays.items()}
    words = {
        name: np.frombuffer(np.ascontiguousarray(x).tobytes(), np.uint8)
        for name, x in arrays.items()
    }
    part = path.with_name(path.name + ".part")
    save_file(words, part, metadata={"leaves": json.dumps(leaves)})
    os.replace(part, path)


def load_arrays(path: pathlib.Path) -> Arrays:
    """What `save_arrays` wrote."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        leaves = json.loads(file.metadata()["leaves"])
        return {
            name: file.get_tensor(name).view(dtype).reshape(shape)
            for name, (dtype, shape) in leaves.items()
        }


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a small file atomically."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


class Site(NamedTuple):
    """A client's folder after `prepare`.

    Attributes:
      folder: of the client in this run.
      leaves: by part ("download", "key", "memory", "data", "upload", "info"), names to `Leaf`.
      own_randomness: whether the client draws keys that the server cannot know.
      is_masked: whether its uploads leave it only under masks.
    """

    folder: pathlib.Path
    leaves: dict[str, dict[str, Leaf]]
    own_randomness: bool
    is_masked: bool


def open_site(folder: pathlib.Path) -> Site:
    """Reads about.json."""
    about = json.loads((folder / "about.json").read_text())
    leaves = {
        part: {name: Leaf(dtype, tuple(shape)) for name, (dtype, shape) in own.items()}
        for part, own in about["leaves"].items()
    }
    return Site(folder, leaves, bool(about["own_randomness"]), bool(about["is_masked"]))


def answer(
    config: Config,
    wires: Mapping[str, Any],
    root: pathlib.Path,
    prepare: Callable[[pathlib.Path, Config], None],
) -> tuple[Config, dict[str, Wire]]:
    """Does what an order asks for.

    Args:
      config: of the order; see `server.Order`.
      wires: its arrays.
      root: folder of this machine's clients.
      prepare: `(folder, config) -> None`, writes a client's folder before its first step.
    Returns:
      The config and the arrays of the reply.
    Raises:
      Refusal: an order that is none, a name that is no name of a run, a memory that is gone.
    """
    folder = _folder(config, root)
    if not (folder / "about.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder, config)
    site = open_site(folder)
    if site.is_masked or "stage" in config:
        from jaxfm.federated.remote.masked import answer_stage

        if not (site.is_masked and "stage" in config):
            raise Refusal("A run masks the uploads of all its clients, or of none.")
        return answer_stage(config, wires, site)
    upload, info, fault = trained(config, wires, site)
    return about_of(config) | {"fault": fault}, pack(info if fault else upload | info)


def about_of(config: Config) -> Config:
    """What a reply says of its order."""
    return {name: config[name] for name in ("run", "round", "client", "nonce")}


def trained(config: Config, wires: Mapping[str, Any], site: Site) -> tuple[Arrays, Arrays, str]:
    """One round of the client, whose memory is written: upload, report, and what is not finite."""
    folder = site.folder
    download, first = _download(config, wires, site)
    memory = _memory(config, site, download, first)
    data = load_arrays(folder / "data.safetensors")
    key = _key(site, download.pop("key"))
    inputs = (_listed(site, "download", download), memory, _listed(site, "data", data), key)
    outputs = _program(folder / "step.bin")(*inputs)
    upload, kept, info = (
        dict(zip(site.leaves[part], map(np.asarray, values), strict=True))
        for part, values in zip(("upload", "memory", "info"), outputs, strict=True)
    )
    fault = not_finite(upload) or not_finite(kept)
    if not fault:
        number = int(config["round"])
        save_arrays(folder / f"memory_{number:08d}.safetensors", kept)
        _forget(folder, {number, int(config["counted"])})
    return upload, info, fault


def _folder(config: Config, root: pathlib.Path) -> pathlib.Path:
    """Of the client in the run, whose names come from elsewhere and must be plain."""
    run, client = config.get("run"), config.get("client")
    if not isinstance(run, str) or not _RUN.fullmatch(run):
        raise Refusal(f"run={str(run)[:80]!r} is no name of a run.")
    if type(client) is not int or client < 0:
        raise Refusal(f"client={str(client)[:80]!r} is no number of a client.")
    return root / run / f"client_{client}"


def _download(config: Config, wires: Mapping[str, Any], site: Site) -> tuple[Arrays, Arrays]:
    """The download, and those of its leaves that were others before the first round.

    Leaves that never change (a frozen backbone, public data) come once, and lie in constants/.
    """
    held = dict(zip(config["held_names"], config["held_digests"], strict=True))
    kept = dict(zip(config["keep_names"], config["keep_digests"], strict=True))
    constants = site.folder / "constants"
    leaves = site.leaves["download"] | site.leaves["key"]
    early = {FIRST + name: leaf for name, leaf in leaves.items() if FIRST + name in wires}
    expected = {name: leaf for name, leaf in leaves.items() if name not in held}
    arrays = unpack(wires, expected | early)
    for name, mark in held.items():
        path = constants / f"{_plain(mark)}.safetensors"
        if not path.exists():
            raise Refusal(f"The client no longer has {name}, which the server sent it earlier.")
        arrays[name] = load_arrays(path)["it"]
    for name, mark in kept.items():
        constants.mkdir(exist_ok=True)
        save_arrays(constants / f"{_plain(mark)}.safetensors", {"it": arrays[name]})
    first = {name.removeprefix(FIRST): arrays.pop(name) for name in early}
    return arrays, first


def _plain(mark: Any) -> str:
    if not isinstance(mark, str) or not _RUN.fullmatch(mark):
        raise Refusal(f"{str(mark)[:80]!r} is no digest.")
    return mark


def _memory(config: Config, site: Site, download: Arrays, first: Arrays) -> list[np.ndarray]:
    """What the client has kept after the last of its rounds that counted."""
    counted = int(config["counted"])
    if counted == NEVER:
        data = load_arrays(site.folder / "data.safetensors")
        start = download | first
        key = _key(site, start["key"])
        inputs = (_listed(site, "download", start), _listed(site, "data", data), key)
        return list(map(np.asarray, _program(site.folder / "first.bin")(*inputs)))
    path = site.folder / f"memory_{counted:08d}.safetensors"
    if not path.exists():
        raise Refusal(
            f"Client {config['client']} has no memory of round {counted} in {site.folder.name}; "
            "give its node the folder that it had then."
        )
    return _listed(site, "memory", load_arrays(path))


def _listed(site: Site, part: str, arrays: Arrays) -> list[np.ndarray]:
    return [arrays[name] for name in site.leaves[part]]


def _key(site: Site, key: np.ndarray) -> np.ndarray:
    """The words of the order's key, or of one that nobody else can know."""
    if not site.own_randomness:
        return key
    return np.frombuffer(os.urandom(key.nbytes), key.dtype).reshape(key.shape)


def _forget(folder: pathlib.Path, rounds: set[int]) -> None:
    """Removes memories of all other rounds."""
    for path in folder.iterdir():
        match = _MEMORY.fullmatch(path.name)
        if match and int(match[1]) not in rounds:
            path.unlink()


def use_cache(folder: pathlib.Path) -> None:
    """Keeps compiled programs on disk; each client has a cache of its own, as entries are not
    written atomically."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _program(path: pathlib.Path) -> Callable[..., Sequence]:
    """An exported program, compiled or from the cache."""
    import jax
    from jax import export

    return jax.jit(export.deserialize(bytearray(path.read_bytes())).call)


def to_records(config: Mapping[str, Any], wires: Mapping[str, Wire]) -> Any:
    """A message's content as Flower's `RecordDict`: "config" and "arrays"."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    arrays = ArrayRecord({name: Array(*wire) for name, wire in wires.items()})
    return RecordDict({"config": ConfigRecord(dict(config)), "arrays": arrays})


def client_app(prepare: Callable[[pathlib.Path, Config, Any], None]) -> Any:
    """A Flower ClientApp that answers orders.

    The node's config (`flower-supernode --node-config`) says which "client" it is, and may name a
    "folder" in which clients keep what is theirs.

    Args:
      prepare: `(folder, config, context) -> None`, as of `answer`, with Flower's context.
    """
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.query()
    def hello(message: Any, context: Any) -> Any:
        record = ConfigRecord({"client": _number(context.node_config)})
        return Message(RecordDict({"config": record}), reply_to=message)

    @app.train()
    def train(message: Any, context: Any) -> Any:
        node = context.node_config
        config = dict(message.content["config"])
        if config.get("client") != _number(node):
            raise Refusal(f"An order for client {config.get('client')} reached {_number(node)}.")
        home = os.environ.get("FLWR_HOME", "~/.flwr")
        root = pathlib.Path(str(node.get("folder", f"{home}/jaxfm"))).expanduser()
        ready = lambda folder, order: prepare(folder, order, context)
        use_cache(_folder(config, root) / "xla")
        reply = answer(config, dict(message.content["arrays"]), root, ready)
        return Message(to_records(*reply), reply_to=message)

    return app


def _number(node_config: Mapping[str, Any]) -> int:
    """Which client a node is."""
    client = node_config.get("client", node_config.get("partition-id"))
    if type(client) is not int or client < 0:
        raise Refusal("The node does not say which client it is: --node-config 'client=3'.")
    return client
