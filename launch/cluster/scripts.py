"""The scripts that run in several processes, and whether one would take its flags."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from absl import flags

from jaxfm.config import define_flags, read_command
from jaxfm.federated.registry import load_named_files
from jaxfm.plain_types import suggest
from jaxfm.processes import FLAGS

JOINING = {
    "federate": "jaxfm.launch.federate_config:FederateConfig",
    "pretrain": "jaxfm.launch.pretrain:PretrainConfig",
    "continual": "jaxfm.launch.continual:ContinualConfig",
    "generate": "jaxfm.launch.generate:GenerateConfig",
}


def check_command(words: Sequence[str]) -> None:
    """Checks a script and its flags before they wait in a queue.

    Args:
      words: the script's name in `JOINING`, and its flags.
    Raises:
      ValueError: no such script, or what the script would say of its flags.
    """
    name, *given = words or ("",)
    if name not in JOINING:
        hint = suggest(name, JOINING) if name else ""
        known = f"Scripts that run in several processes: {', '.join(JOINING)}."
        raise ValueError(
            f"command={name!r}: give one. {known if 'Known' in hint else hint or known}"
        )
    for word in given:
        if (flag := word.lstrip("-").partition("=")[0]) in list(FLAGS)[:3]:
            raise ValueError(f"--{flag} is found by each process itself; leave it out.")
    module, _, cls = JOINING[name].partition(":")
    values = flags.FlagValues()
    config = getattr(importlib.import_module(module), cls)
    define_flags(config, values)
    for flag in list(FLAGS)[3:]:
        flags.DEFINE_string(flag, None, FLAGS[flag], flag_values=values)
    try:
        read_command(config, load_named_files([name, *given]), values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from error
