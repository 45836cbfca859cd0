"""What wants an accelerator, one run after another, each within its own time.

    python benchmarks/accelerator.py --data_dir=cifar10.npz --weights_dir=FOLDER [--out=FOLDER]

The papers' federated setting with ResNet-20 and VGG-11, and the search on ResNet-56 with many
candidates and long fine-tuning (resnet56.npz in the folder of weights). A run that is cut off has
printed the rows that it finished; what each printed is in a file of its own, and the last line is
one JSON object: by run, how it ended, its seconds, and its last line where that is JSON.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys
import time

from jaxfm import config as configs
from jaxfm.config import check, option

HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run, and for how long."""

    data_dir: str = option("", "npz with train_images, train_labels, test_images, test_labels")
    weights_dir: str = option("", "folder with resnet56.npz")
    out: str = option("runs/accelerator", "folder for what the runs print")
    minutes: float = option(28.0, "for all of them, dealt out by weight")
    quick: bool = option(False, "only says what would be run")

    def __post_init__(self):
        check(self)
        if not self.minutes > 0:
            raise ValueError(f"minutes={self.minutes}: give a time above 0.")
        if not self.quick and not (self.data_dir and self.weights_dir):
            raise ValueError("Give --data_dir and --weights_dir, or --quick.")


def runs(config: Config) -> dict[str, tuple[float, list[str]]]:
    """(weight, command) by name, the most wanted first."""
    table = [
        "federated_table.py", f"--data_dir={config.data_dir}", "--num_seeds=1", "--rates=0.01",
        "--only=spatl_personal,spatl_personal_narrow,spatl,scaffold,fed_nova",
    ]  # fmt: skip
    search = [
        "search_cifar.py", f"--data_dir={config.data_dir}",
        f"--weights={config.weights_dir}/resnet56.npz", "--repaired",
    ]  # fmt: skip
    return {
        "paper_resnet20": (3, [*table, "--work=paper_resnet20", "--num_rounds=60"]),
        "search_finetuned": (3, [
            *search, "--evaluations=512", "--reward=1000", "--report=5000", "--finetune=40",
            "--num_seeds=1", "--strategies=random,gnn_rl",
        ]),
        "search_many": (2, [
            *search, "--evaluations=15000", "--reward=5000", "--report=5000", "--num_seeds=1",
            "--strategies=gnn_rl",
        ]),
        "paper_vgg11": (2, [*table, "--work=paper_vgg11", "--num_rounds=30"]),
    }  # fmt: skip


def run(command: list[str], path: pathlib.Path, seconds: float) -> dict:
    """Runs one benchmark for at most so long; its output goes to a file as it comes."""
    began = time.perf_counter()
    with path.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-u", str(HERE / command[0]), *command[1:]],
            stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            ended: int | str = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            ended = "cut off"
    lines = path.read_text().splitlines()
    found = {"ended": ended, "seconds": round(time.perf_counter() - began)}
    if lines and lines[-1].startswith("{"):
        found["result"] = json.loads(lines[-1])
    return found


def main(config: Config) -> None:
    """All runs, in the order of the list."""
    plan = runs(config)
    folder = pathlib.Path(config.out)
    left, weights = 60 * config.minutes, sum(weight for weight, _ in plan.values())
    result: dict = {"name": "accelerator", "runs": {}}
    for name, (weight, command) in plan.items():
        seconds = left * weight / weights
        print(f"{name}: {seconds:.0f} s at most: {' '.join(command)}", flush=True)
        if config.quick:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        result["runs"][name] = run(command, folder / f"{name}.log", seconds)
        # What one leaves of its time is for those that follow.
        left, weights = left - result["runs"][name]["seconds"], weights - weight
        print(json.dumps(result["runs"][name]), flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    configs.run(main, Config)
