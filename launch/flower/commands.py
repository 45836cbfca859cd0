"""The commands of `python -m jaxfm.launch.flower`, and their command line.

A command is a module with `CONFIG`, its config class, and `main`, which takes one.
"""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Sequence

from jaxfm import config as configs
from jaxfm.plain_types import suggest

COMMANDS = {name: f"jaxfm.launch.flower.{name}" for name in ("local", "serve", "join", "keys")}


def split(argv: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """(command, its flags, what follows --) of the words after the program's name.

    Raises:
      ValueError: the command is unknown.
    """
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    own, rest = words[:cut], words[cut + 1 :]
    name = own[0] if own else ""
    if name not in COMMANDS:
        hint = f" {suggest(name, COMMANDS)}" if name else ""
        raise ValueError(
            f"Give one of the commands {', '.join(COMMANDS)}.{hint if 'Known' not in hint else ''}"
        )
    return name, own[1:], rest


def _stopped(number: int, _: object) -> None:
    """Ends this process as an error would, so that blocks end those that they have started."""
    sys.exit(128 + number)


def main() -> None:
    """Runs the command that the command line names."""
    words = sys.argv[1:]
    if not words or words[0].lstrip("-") in ("help", "h"):
        doc = importlib.import_module("jaxfm.launch.flower").__doc__ or ""
        print(f"{doc.strip()}\nA command's --help describes its flags.")
        sys.exit(0 if words else 2)
    try:
        name, own, rest = split(words)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    module = importlib.import_module(COMMANDS[name])
    sys.argv = [f"jaxfm.launch.flower {name}", *own]
    sys.modules["__main__"].__doc__ = module.__doc__
    takes = getattr(module, "TAKES_FLAGS", False)
    if rest and not takes:
        print(f"error: {name} takes no flags behind --.", file=sys.stderr)
        sys.exit(2)
    signal.signal(signal.SIGTERM, _stopped)  # what it has started ends with it
    run = (lambda config: module.main(config, rest)) if takes else module.main
    configs.run(run, module.CONFIG)
