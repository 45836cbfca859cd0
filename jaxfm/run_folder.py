"""The folder of a run: which one it is, its config.json, and results.json part by part.

    config = in_folder(config, "federate", config.algorithm)  # a folder for these settings
    folder = open_run(config, config.run_dir)
    save_results(folder, "federate", {"test": ...})

A run goes on in the folder that holds its settings. A folder serves one process at a time, may be
moved or renamed, and holds a run only when more than its config.json is in it: a start that failed
stands in nobody's way.
"""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import IO, Any, TypeVar

import jax

from jaxfm import config as configs
from jaxfm.errors import writing

T = TypeVar("T")

RUN_DIR_HELP = (
    "folder of the run; an unfinished run in it goes on; the default is a folder in runs/ that is "
    "named after the settings"
)
_LONGER = ("rounds", "steps")  # a run may be made longer, and goes on
_MAY_CHANGE = {*_LONGER, "seeds", "compare", "export", "log_to"}
_LOCK = ".lock"
_NAMED = 6  # settings that a sentence names
_locks: dict[pathlib.Path, IO] = {}  # of this process; closing a file would free its lock


def in_folder(config: T, script: str, *words: str) -> T:
    """Returns the config with a folder: its own `run_dir`, or one in runs/ for its settings.

    Equal settings give the same folder, so that the same command goes on where it was stopped, and
    unequal ones never meet.

    Args:
      config: a frozen dataclass with a field `run_dir`.
      script: the name of the folder begins with it.
      words: that say what the run is about.
    """
    if config.run_dir:  # type: ignore[attr-defined]
        return config
    settings, usual = _settings(config), _settings(type(config)())
    name = [script, *(_as_name(word) for word in words if word)]
    if settings != usual:
        text = json.dumps(settings, sort_keys=True)
        name.append(hashlib.sha256(text.encode()).hexdigest()[:8])
    return dataclasses.replace(config, run_dir=str(pathlib.Path("runs", "-".join(name))))  # type: ignore[type-var]


def _as_name(word: str) -> str:
    """The last part of a path or of a hub's name, with nothing in it that a shell would read."""
    last = pathlib.PurePath(word).name
    return "".join(c if c.isalnum() or c in "._" else "_" for c in last)[:40]


def _settings(config: Any) -> dict[str, Any]:
    """What makes a run what it is: not where it lies, nor how long it lasts."""
    values = json.loads(json.dumps(configs.to_dict(config)))
    return {name: x for name, x in values.items() if name not in _MAY_CHANGE | {"run_dir"}}


def open_run(config: Any, run_dir: str | os.PathLike[str]) -> pathlib.Path:
    """Makes the run folder, takes it for this process, and writes its config.json.

    Args:
      config: a frozen dataclass.
      run_dir: the folder; it is made if it does not exist.
    Returns:
      The path of the folder.
    Raises:
      ValueError: the folder holds a run with other settings, whose results this one would mix with,
        or a longer one; another process works in it; its config.json is damaged.
      OSError: the folder cannot be made or written to.
    """
    folder = pathlib.Path(run_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give --run_dir the name of a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        _lock(folder)
        if _holds_run(folder):
            _check_same_run(config, folder)
        path = folder / "config.json"
        values = configs.to_dict(config)
        values.pop("run_dir", None)  # the folder may be moved
        _replace(path, json.dumps(values, indent=2, allow_nan=False) + "\n")
    return folder


def _lock(folder: pathlib.Path) -> None:
    """Takes the folder until this process ends."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return
    path = (folder / _LOCK).resolve()
    if path in _locks:
        return
    file = path.open("a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"Another process works in {folder}: wait for its end, or give another --run_dir."
        ) from None
    except OSError:  # a file system without locks
        file.close()
        return
    if not _locks:
        atexit.register(_release)
    _locks[path] = file


def _release() -> None:
    while _locks:
        _locks.popitem()[1].close()


def _holds_run(folder: pathlib.Path) -> bool:
    names = {path.name for path in folder.iterdir()} - {_LOCK, "config.part"}
    return "config.json" in names and len(names) > 1


def _check_same_run(config: Any, folder: pathlib.Path) -> None:
    old, new = load_config(folder), json.loads(json.dumps(configs.to_dict(config)))
    names = sorted((old.keys() | new.keys()) - {"run_dir"})
    changed = [name for name in names if old.get(name) != new.get(name)]
    if set(changed) - _MAY_CHANGE:
        raise ValueError(
            f"{folder} holds a run with other settings ({_some(changed)} differ); give "
            "another --run_dir, or remove it."
        )
    for name in _LONGER:
        if name in changed and new[name] < old[name]:
            raise ValueError(
                f"{folder} holds a run with {name}={old[name]}, which {name}={new[name]} would cut "
                f"short; give at least {old[name]}, or another --run_dir."
            )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + ", ..." * (len(names) > _NAMED)


def load_config(run_dir: pathlib.Path) -> dict[str, Any]:
    """Returns the settings of a run as JSON values.

    Raises:
      FileNotFoundError: the folder holds no run.
      ValueError: the file is damaged.
    """
    path = run_dir / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{run_dir} holds no run: there is no config.json in it.")
    return _load(path)


def save_results(run_dir: pathlib.Path, part: str, values: Mapping) -> None:
    """Writes one part of a run's results into its results.json, atomically. Only process 0 writes.

    JSON has no NaN and no infinities: they become null.
    """
    if jax.process_index() != 0:
        return
    known = load_results(run_dir)
    text = json.dumps(known | {part: _finite(values)}, indent=2, allow_nan=False)
    _replace(run_dir / "results.json", text + "\n")


def load_results(run_dir: pathlib.Path) -> dict:
    """Returns the parts of a run's results so far; an empty dict if there are none.

    Raises:
      ValueError: the file is damaged.
    """
    path = run_dir / "results.json"
    results = _load(path) if path.exists() else {}
    if wrong := next((name for name, part in results.items() if not isinstance(part, dict)), None):
        raise ValueError(f"{path} is damaged: its part {wrong!r} is no object; remove the run.")
    return results


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _load(path: pathlib.Path) -> dict:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(
            f"{path} is damaged ({error}): bring it back from a copy, or remove the run."
        ) from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__} where an object was expected.")
    return values


def _replace(path: pathlib.Path, text: str) -> None:
    """Writes a file so that it is never half written."""
    temporary = path.with_suffix(".part")
    with writing(path):
        temporary.write_text(text)
    temporary.replace(path)
