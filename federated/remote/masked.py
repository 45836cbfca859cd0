"""A client's side of a round whose uploads are masked: four messages in the place of one.

Needs the package `jaxfm.federated.secure` (and `cryptography`), of which an app carries a copy as
of `standalone`. What the client keeps between the messages of a round lies in masks.json, which
only its owner can read, and which goes when the round is over.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxfm.federated.remote.standalone import (
    Config,
    Refusal,
    Site,
    Wire,
    about_of,
    pack,
    trained,
)  # fmt: skip
from jaxfm.federated.secure import client as clients
from jaxfm.federated.secure.messages import Delivery, Introduction, Survivors
from jaxfm.federated.secure.texts import from_text, to_text

WORDS = "words"  # the name of the masked upload


def answer_stage(
    config: Config, wires: Mapping[str, Any], site: Site
) -> tuple[Config, dict[str, Wire]]:
    """Answers an order of one of the stages of `jaxfm.federated.secure.client.STAGES`.

    Raises:
      Refusal: a stage that is none, or out of turn; what the protocol refuses.
    """
    stages = {"advertise": _advertise, "share": _share, "upload": _upload, "unmask": _unmask}
    stage = config["stage"]
    if stage not in stages:
        raise Refusal(f"stage={str(stage)[:40]!r}: an order is of {', '.join(stages)}.")
    try:
        return stages[stage](config, wires, site)
    except ValueError as error:
        raise error if isinstance(error, Refusal) else Refusal(str(error)) from None


def _advertise(config: Config, wires: Mapping, site: Site) -> tuple[Config, dict[str, Wire]]:
    state, keys = clients.advertise(int(config["client"]))
    return _said(config, site, state, keys)


def _share(config: Config, wires: Mapping, site: Site) -> tuple[Config, dict[str, Wire]]:
    introduction = from_text(Introduction, config["message"])
    state, shares = clients.share(_state(config, site), introduction)
    return _said(config, site, state, shares)


def _upload(config: Config, wires: Mapping, site: Site) -> tuple[Config, dict[str, Wire]]:
    """Trains, and masks the words of the upload."""
    state, delivery = _state(config, site), from_text(Delivery, config["message"])
    upload, info, fault = trained(config, wires, site)
    if fault:
        _path(site).unlink()
        return about_of(config) | {"fault": fault, "message": ""}, pack(info)
    words = np.concatenate([np.ravel(x) for x in upload.values()])
    state, masked = clients.upload(state, delivery, words)
    _save(site, config, state)
    said = about_of(config) | {"fault": "", "message": ""}
    return said, pack({WORDS: masked.words} | info)


def _unmask(config: Config, wires: Mapping, site: Site) -> tuple[Config, dict[str, Wire]]:
    survivors = from_text(Survivors, config["message"])
    _, revealed = clients.unmask(_state(config, site), survivors)
    _path(site).unlink()  # nothing is revealed twice
    return about_of(config) | {"fault": "", "message": to_text(revealed)}, {}


def _said(config: Config, site: Site, state: Any, message: Any) -> tuple[Config, dict[str, Wire]]:
    _save(site, config, state)
    return about_of(config) | {"fault": "", "message": to_text(message)}, {}


def _path(site: Site) -> pathlib.Path:
    return site.folder / "masks.json"


def _save(site: Site, config: Config, state: Any) -> None:
    """Writes the round and the state, for the client's eyes only."""
    part = site.folder / "masks.json.part"
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(f"{int(config['round'])}\n{to_text(state)}")
    os.replace(part, _path(site))


def _state(config: Config, site: Site) -> Any:
    """What the client kept of the round's last stage."""
    path = _path(site)
    number, _, text = path.read_text().partition("\n") if path.exists() else ("", "", "")
    if number != str(config["round"]):
        raise Refusal(f"Client {config['client']} has begun no masks in round {config['round']}.")
    return from_text(clients.ClientState, text)
