"""The folder of a run: its config.json, and results.json part by part."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxfm import config as configs

_MAY_CHANGE = {"rounds", "steps", "seeds", "compare"}  # a run that is made longer goes on


def open_run(config: Any, run_dir: str | os.PathLike[str]) -> pathlib.Path:
    """Makes the run folder, writes its config.json and returns the path of the folder.

    Args:
      config: a frozen dataclass.
      run_dir: the folder; it is made if it does not exist.
    Raises:
      ValueError: the folder holds a run of another config, whose results this one would mix with.
    """
    folder = pathlib.Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    if path.exists():
        old = json.loads(path.read_text())
        new = json.loads(json.dumps(configs.to_dict(config)))
        names = sorted(old.keys() | new.keys())
        changed = [name for name in names if old.get(name) != new.get(name)]
        if set(changed) - _MAY_CHANGE:
            raise ValueError(
                f"{folder} holds a run with other settings ({', '.join(changed)} differ); give "
                "another --run_dir, or remove it."
            )
    configs.save(config, path)
    return folder


def save_results(run_dir: pathlib.Path, part: str, values: Mapping) -> None:
    """Writes one part of a run's results into its results.json, atomically."""
    path = run_dir / "results.json"
    known = load_results(run_dir)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(known | {part: values}, indent=2) + "\n")
    temporary.replace(path)


def load_results(run_dir: pathlib.Path) -> dict:
    """Returns the parts of a run's results so far; an empty dict if there are none."""
    path = run_dir / "results.json"
    return json.loads(path.read_text()) if path.exists() else {}
