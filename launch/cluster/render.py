"""Renders the job file of a cluster; see `jaxfm.launch.cluster`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jaxfm import config as configs
from jaxfm.launch import cluster
from jaxfm.launch.cluster import jobset, slurm, tpu
from jaxfm.launch.cluster.config import ClusterConfig

KINDS = {"slurm": slurm.render, "jobset": jobset.render, "tpu": tpu.render}


def render(config: ClusterConfig) -> str:
    """The job file.

    Raises:
      ValueError: there is no script to run.
    """
    if not config.command:
        raise ValueError("Give the script and its flags after --, as -- federate --data=digits.")
    return KINDS[config.kind](config)


def flags_of(argv: Sequence[str]) -> list[str]:
    """The words of a command line as flags alone: those after -- are --command=WORD.

    Raises:
      ValueError: the command is not `render` (nor `project`, which has flags of its own).
    """
    if not argv or argv[0] != "render":
        raise ValueError(
            "Give the command: render --kind=slurm -- federate --data=digits, or project."
        )
    words = list(argv[1:])
    cut = words.index("--") if "--" in words else len(words)
    return words[:cut] + [f"--command={word}" for word in words[cut + 1 :]]


def main(config: ClusterConfig) -> None:
    """Writes the job file to standard output."""
    sys.stdout.write(render(config))


def start() -> None:
    """Runs `python -m jaxfm.launch.cluster`."""
    sys.modules["__main__"].__doc__ = cluster.__doc__
    words = sys.argv[1:]
    if words[:1] == ["project"]:
        from jaxfm.launch.cluster import project  # late: it compiles, and a job file does not

        project.start(words[1:])
    if words and words[0].lstrip("-") in ("help", "h"):
        words = ["render", *words]
    try:
        sys.argv = [sys.argv[0], *flags_of(words)]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    configs.run(main, ClusterConfig)
