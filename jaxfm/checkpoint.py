"""Checkpoints of any pytree, written by Orbax in the background.

    with Checkpointer("runs/demo/checkpoints", keep=3) as checkpoints:
        if checkpoints.latest_step() is not None:
            step, state = checkpoints.restore(like=state)
        for step in range(step + 1, num_steps + 1):
            state = train(state)
            if checkpoints.is_due() or step == num_steps:
                checkpoints.save(step, state)

A checkpoint is one folder, `step_00000012`. It gets that name only when everything is in it, so a
process killed at any moment leaves the earlier ones whole; checksums of its files tell damage that
the storage format would read as numbers. Leaves are stored by name, typed keys
as their words; the tree they go back into comes from `like`, and so do their shardings: what two
devices saved, one restores.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import re
import shutil
import time
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

PyTree = Any

_STEP = re.compile(r"step_(\d+)")
_CHECKSUMS = "crc32.json"
_SHARE = 0.02  # of a run's time that saves may take


class Checkpointer:
    """Saves and restores numbered checkpoints of one run. In one folder, one writer at a time.

    Args:
      folder: where they are; created by the first save.
      keep: how many of the newest are kept; None keeps all.
    Raises:
      ValueError: keep < 1, or a path that Orbax would write to and never read from.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int | None = 3):
        if keep is not None and keep < 1:
            raise ValueError(f"keep={keep}: give the number of checkpoints to keep, or None.")
        self.folder = pathlib.Path(folder).absolute()
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file, where a folder of checkpoints should be.")
        # Orbax looks for what it has written by a pattern, in which these have a meaning.
        if bad := next((c for c in "[\\" if c in str(self.folder)), None):
            raise ValueError(
                f"{self.folder} has {bad!r} in its path, where checkpoints could be written but "
                "not read: choose another folder."
            )
        self.keep = keep
        import orbax.checkpoint as ocp  # late: most programs save nothing

        self._ocp = ocp
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        self._unreadable: set[int] = set()
        self._newest: pathlib.Path | None = None  # the last one this process began to write
        self._began, self._seconds = 0.0, 0.0  # of that one; inf while it is being written

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Returns the steps of all finished checkpoints, oldest first, readable or not."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return sorted(int(match[1]) for name in names if (match := _STEP.fullmatch(name)))

    def latest_step(self) -> int | None:
        """Returns the newest finished step, or None if there is none."""
        return max(self.steps(), default=None)

    def is_due(self) -> bool:
        """Whether one more save, as long as the last, takes at most 2 % of the time since.

        The first save of a process always is due. All processes of a job call this together, and
        hear what the first of them found.

        Raises:
          OSError: the last save could not be written.
        """
        with self._naming_failures():
            self._orbax.check_for_errors()
        due = self._seconds <= _SHARE * (time.monotonic() - self._began)
        if jax.process_count() > 1:
            due = bool(multihost_utils.broadcast_one_to_all(np.bool_(due)))
        return due

    def save(self, step: int, tree: PyTree) -> None:
        """Starts writing `tree` and returns once its leaves are copied off the device.

        The arrays may be donated or changed right after. A save that is still being written is
        waited for; if it failed (a full disk), its error is raised here.

        Args:
          step: non-negative, beyond every readable checkpoint in the folder.
          tree: leaves are arrays, typed keys or Python numbers.
        Raises:
          ValueError: the folder holds a checkpoint of this step or a later one.
          TypeError: a leaf is none of the above; it names the leaf.
        """
        if step < 0:
            raise ValueError(f"step={step}: a checkpoint is numbered from 0.")
        self.wait()
        later = [s for s in self.steps() if s >= step and s not in self._unreadable]
        if later:
            raise ValueError(
                f"step={step}: {self.folder} already holds step {later[-1]}. Restore that and go "
                "on from it, or save into another folder."
            )
        if self._newest is None:
            self._clear_leftovers()
        self._newest = self._path(step)
        self._began, self._seconds = time.monotonic(), math.inf
        names, leaves, _ = _flatten(tree)
        about = {name: _describe(name, leaf) for name, leaf in zip(names, leaves)}
        # Orbax refuses empty arrays; their shape says all there is to them.
        arrays = {name: _pack(leaf) for name, leaf in zip(names, leaves) if np.size(leaf)}
        args = self._ocp.args
        # force: the place may be taken by a checkpoint that could not be read.
        self._orbax.save(
            self._newest,
            args.Composite(state=args.PyTreeSave(arrays), leaves=args.JsonSave(about)),
            force=True,
        )
        self._unreadable.discard(step)

    def restore(self, like: PyTree, step: int | None = None) -> tuple[int, PyTree]:
        """Reads the newest readable checkpoint, or that of `step`.

        A checkpoint that cannot be read is skipped with a warning that names it.

        Args:
          like: a tree of arrays or `jax.ShapeDtypeStruct`s with the names, shapes and dtypes
            saved. Arrays come back with the sharding of its leaves; NumPy arrays and Python
            numbers come back as such.
        Returns:
          (step, tree).
        Raises:
          FileNotFoundError: there is no checkpoint, or none that can be read.
          ValueError: the checkpoint holds another tree; it names the leaves and both shapes.
        """
        self.wait()
        names, leaves, structure = _flatten(like)
        expected = {name: _describe(name, leaf) for name, leaf in zip(names, leaves)}
        wanted = {name: _restore_args(self._ocp, leaf) for name, leaf in zip(names, leaves)}
        steps = self.steps() if step is None else [s for s in self.steps() if s == step]
        for candidate in reversed(steps):
            path = self._path(candidate)
            try:
                saved, arrays = self._read(path, expected, wanted)
            except MemoryError:
                raise
            except Exception as error:  # whatever damaged files make Orbax and TensorStore raise
                self._unreadable.add(candidate)
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                warnings.warn(f"Passing over the checkpoint {path}: {reason}", stacklevel=2)
                continue
            _check_same(saved, expected, path)
            restored = [_unpack(leaf, arrays.get(name)) for name, leaf in zip(names, leaves)]
            return candidate, jax.tree.unflatten(structure, restored)
        which = "" if step is None else f" of step {step}"
        damaged = f" ({len(steps)} cannot be read, see the warnings)" if steps else ""
        raise FileNotFoundError(f"No checkpoint{which} in {self.folder}{damaged}.")

    def wait(self) -> None:
        """Waits until the last save is on disk, then removes what is beyond `keep`.

        Raises:
          OSError: it could not be written.
        """
        with self._naming_failures():
            self._orbax.wait_until_finished()
        if self._newest is None or jax.process_index() != 0:
            return
        readable = [s for s in self.steps() if s not in self._unreadable]
        for old in readable[: -self.keep] if self.keep else []:
            shutil.rmtree(self._path(old), ignore_errors=True)

    @contextlib.contextmanager
    def _naming_failures(self) -> Iterator[None]:
        """Says of a save that failed in the background which it was, and why."""
        try:
            yield
        except Exception as error:  # of many kinds, by the layer that could not write
            full = "No space left on device"
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            raise OSError(
                f"The checkpoint {self._newest} could not be saved "
                f"({full if full in str(error) else reason}); earlier ones are whole."
            ) from error

    def close(self) -> None:
        """Waits for the last save and frees the threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def _read(self, path: pathlib.Path, expected: dict, wanted: dict) -> tuple[dict, dict]:
        """Returns the checkpoint's list of leaves, and its arrays if the list is as expected."""
        _verify(path)
        args = self._ocp.args
        saved = self._orbax.restore(path, args.Composite(leaves=args.JsonRestore())).leaves
        present = {name: wanted[name] for name in wanted if 0 not in expected[name][0]}
        if saved != expected or not present:
            return saved, {}
        whole = args.PyTreeRestore(item=present, restore_args=present)
        return saved, self._orbax.restore(path, args.Composite(state=whole)).state

    def _path(self, step: int) -> pathlib.Path:
        return self.folder / f"step_{step:08d}"

    def _seal(self) -> None:
        """Adds the checksums, in Orbax's thread, before the checkpoint gets its name."""
        if self._newest is None or jax.process_index() != 0:
            return
        for folder in self.folder.glob(self._newest.name + ".*tmp*"):
            # The parts only: Orbax still changes its own notes beside them.
            files = [file for file in sorted(folder.glob("*/**/*")) if file.is_file()]
            checksums = {str(file.relative_to(folder)): _checksum(file) for file in files}
            (folder / _CHECKSUMS).write_text(json.dumps(checksums))
        self._seconds = time.monotonic() - self._began

    def _clear_leftovers(self) -> None:
        """Removes what a killed writer left half written."""
        if jax.process_index() == 0 and self.folder.is_dir():
            for path in self.folder.glob("step_*tmp*"):
                shutil.rmtree(path, ignore_errors=True)


def _checksum(file: pathlib.Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def _verify(path: pathlib.Path) -> None:
    """Raises OSError if a file is missing or differs from what was written."""
    for name, checksum in json.loads((path / _CHECKSUMS).read_text()).items():
        if not (path / name).is_file():
            raise OSError(f"{name} is missing.")
        if _checksum(path / name) != checksum:
            raise OSError(f"{name} differs from what was written.")


def _flatten(tree: PyTree) -> tuple[list[str], list[Any], Any]:
    """Returns (the dotted name of each leaf, leaves, structure)."""
    with_paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in with_paths]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"Two leaves have the same dotted name {twice[0]!r}: rename a dict key.")
    return names, [leaf for _, leaf in with_paths], structure


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(name: str, leaf: Any) -> list:
    """Returns [shape, dtype] as stored in the checkpoint's own list of leaves."""
    if isinstance(leaf, bool | int | float):
        leaf = np.asarray(leaf)
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype") or leaf.dtype == object:
        raise TypeError(
            f"The leaf {name!r} is a {type(leaf).__name__}: a checkpoint holds arrays, typed keys "
            "and Python numbers."
        )
    return [list(leaf.shape), str(leaf.dtype)]


def _pack(leaf: Any) -> Any:
    if _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    # One copy will do: Orbax would compile a program to slice up the copies of each shape.
    whole = leaf.is_fully_replicated and leaf.is_fully_addressable
    return leaf.addressable_data(0) if whole else leaf


def _restore_args(ocp: Any, leaf: Any) -> Any:
    """Returns how Orbax should restore a leaf like this one."""
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    sharding.shard_shape(leaf.shape)  # a sharding that does not divide the array raises here
    dtype = None if _is_key(leaf) else leaf.dtype
    return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding, dtype=dtype)


def _unpack(leaf: Any, array: Any) -> Any:
    """Returns the restored array as what `leaf` is: key, array, NumPy array or Python number."""
    if array is None:  # empty, so never written
        return leaf if not isinstance(leaf, jax.ShapeDtypeStruct) else _empty(leaf)
    if _is_key(leaf):
        return jax.random.wrap_key_data(array, impl=_key_impl(leaf.dtype))
    if isinstance(leaf, bool | int | float):
        return type(leaf)(array)
    return array


def _empty(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if _is_key(leaf):
        return jax.random.split(jax.random.key(0, impl=_key_impl(leaf.dtype)), leaf.shape)
    return jnp.empty(leaf.shape, leaf.dtype, device=leaf.sharding)


def _key_impl(dtype: Any) -> str:
    implementations = ("threefry2x32", "rbg", "unsafe_rbg")
    return next(name for name in implementations if jax.random.key(0, impl=name).dtype == dtype)


def _check_same(saved: dict, expected: dict, path: pathlib.Path) -> None:
    """Raises ValueError naming up to ten leaves in which the two differ."""

    def show(about: list | None) -> str:
        return "nothing" if about is None else f"{about[1]}{about[0]}"

    different = [
        f"  {name}: saved {show(saved.get(name))}, asked for {show(expected.get(name))}"
        for name in sorted({**saved, **expected})
        if saved.get(name) != expected.get(name)
    ]
    if different:
        more = [f"  and {len(different) - 10} more"] if len(different) > 10 else []
        lines = "\n".join(different[:10] + more)
        raise ValueError(
            f"The checkpoint {path} holds another tree than the one asked for:\n{lines}\n"
            "Give the configuration it was saved with, or another folder."
        )
