"""The folder of a run: which one, for whom, and what it refuses."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest

from jaxfm.config import check, option
from jaxfm.run_folder import in_folder, load_config, load_results, open_run, save_results


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of a run."""

    run_dir: str = option("", "folder")
    rounds: int = option(4, "rounds")
    seed: int = option(0, "seed")

    def __post_init__(self):
        check(self)


def begun(folder, **settings):
    """A folder in which a run has left something."""
    config = Settings(run_dir=str(folder), **settings)
    save_results(open_run(config, folder), "test", {"accuracy": 0.5})
    return config


def test_equal_settings_share_a_folder_and_others_do_not():
    name = lambda **settings: in_folder(Settings(**settings), "train", "some/data.csv").run_dir
    assert name() == "runs/train-data.csv"
    assert name(seed=1) == name(seed=1, rounds=9) != name(seed=2) != name()
    assert name(run_dir="mine", seed=1) == "mine"
    assert set(in_folder(Settings(), "train", "a b/[c]?").run_dir) <= set("runs/train-_c")


def test_a_start_that_failed_stands_in_nobodys_way(tmp_path):
    open_run(Settings(seed=1), tmp_path)
    open_run(Settings(seed=2), tmp_path)
    (tmp_path / "config.json").write_text("")
    open_run(Settings(seed=3), tmp_path)
    assert load_config(tmp_path)["seed"] == 3


def test_a_run_is_not_mixed_with_another_or_cut_short(tmp_path):
    begun(tmp_path, rounds=4)
    open_run(Settings(rounds=6), tmp_path)
    with pytest.raises(ValueError, match=r"other settings \(seed differ\)"):
        open_run(Settings(rounds=6, seed=1), tmp_path)
    with pytest.raises(ValueError, match="rounds=6, which rounds=5 would cut short; give at least"):
        open_run(Settings(rounds=5), tmp_path)
    assert load_config(tmp_path) == {"rounds": 6, "seed": 0}


def test_a_folder_may_be_moved_and_spelt_otherwise(tmp_path):
    begun(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    other = tmp_path / "c" / ".." / "b"
    (tmp_path / "c").mkdir()
    open_run(Settings(run_dir=str(other)), other)
    assert load_results(other)["test"] == {"accuracy": 0.5}


def test_two_processes_do_not_share_a_folder(tmp_path):
    begun(tmp_path)
    code = f"""
import sys; sys.path.insert(0, {str(__file__).rpartition("/")[0]!r})
from test_run_folder import Settings, open_run
try:
    open_run(Settings(), {str(tmp_path)!r})
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"Another process works in {tmp_path}: ")


@pytest.mark.parametrize("file", ["config.json", "results.json"])
@pytest.mark.parametrize("text", ['{"a": 1', "\x00\xff", "[1]"])
def test_damage_is_named(tmp_path, file, text):
    begun(tmp_path)
    (tmp_path / file).write_bytes(text.encode("latin-1"))
    load = load_config if file == "config.json" else load_results
    with pytest.raises(ValueError, match=f"{file} (is damaged|holds a list)"):
        load(tmp_path)


def test_results_are_json_whatever_the_figures(tmp_path):
    save_results(tmp_path, "a", {"x": [float("nan"), 1.5], "y": {"z": float("-inf")}})
    refuse = lambda constant: pytest.fail(f"{constant} in JSON")
    values = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert values == {"a": {"x": [None, 1.5], "y": {"z": None}}}
