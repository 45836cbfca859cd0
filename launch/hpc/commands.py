"""The commands of `python -m jaxfm.launch.hpc`, and their command line.

A command is a module with `CONFIG`, its config class, and `main`, which takes one.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from jaxfm import config as configs
from jaxfm.plain_types import suggest

COMMANDS = {
    "advise": "jaxfm.launch.hpc.advise",
    "check": "jaxfm.launch.hpc.check",
    "train": "jaxfm.launch.hpc.train",
    "evaluate": "jaxfm.launch.hpc.evaluate",
}


def command(argv: Sequence[str]) -> tuple[ModuleType, list[str]]:
    """The module of a command line and the words for its flags.

    Args:
        argv: The words after the program's name: the command, then its flags and files.
    Returns:
        The command's module, and a program's name with flags: a file becomes --path=file.
    Raises:
        ValueError: The command is unknown, or reads no files and is given one.
    """
    name = argv[0] if argv else ""
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        hint = f" {suggest(name, COMMANDS)}" if name else ""
        raise ValueError(f"Give one of the commands {known}.{hint if 'Known' not in hint else ''}")
    module = importlib.import_module(COMMANDS[name])
    takes_files = any(field.name == "path" for field in dataclasses.fields(module.CONFIG))
    flags, only_files = [], False
    for word in argv[1:]:
        if word == "--":
            only_files = True
        elif word.startswith("-") and not only_files:
            flags.append(word)
        elif takes_files:
            flags.append(f"--path={word}")
        else:
            raise ValueError(f"{name} reads no files, so {word!r} cannot be used.")
    return module, [f"jaxfm.launch.hpc {name}", *flags]


def main() -> None:
    """Runs the command that the command line names."""
    words = sys.argv[1:]
    if not words or words[0].lstrip("-") in ("help", "h"):
        print(f"{_package_doc()}\nA command's --help describes its flags.")
        sys.exit(0 if words else 2)
    try:
        module, sys.argv = command(words)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.modules["__main__"].__doc__ = module.__doc__
    configs.run(module.main, module.CONFIG)


def _package_doc() -> str:
    return (importlib.import_module("jaxfm.launch.hpc").__doc__ or "").strip()
