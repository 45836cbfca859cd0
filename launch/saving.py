"""What a federated run leaves: its model, an adapter by itself, and a model for each tier."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np

from jaxfm import federated, hub
from jaxfm.adapters import merge
from jaxfm.data.dealing import Data
from jaxfm.federated import Prepared, TrainedRun
from jaxfm.federated.registry import find
from jaxfm.federated.remote.device import save_for_device
from jaxfm.model import Model, Variables

_CLOSE = 1e-3  # of logits that a saved model gives again, relative to their magnitude


def save(
    prepared: Prepared, result: TrainedRun, data: Data, base: str, run_dir: pathlib.Path
) -> None:
    """Writes the trained model into model/, and an adapter by itself into adapter/."""
    try:
        federated.save_model(prepared.algorithm, result, data, run_dir / "model")
        print(f"model: {run_dir / 'model'}")
    except (TypeError, ValueError) as error:
        print(f"model: not written. {error}")
    trained = prepared.algorithm.model
    if trained is not None and trained.adapter is not None:
        try:
            federated.save_adapter(prepared.algorithm, result, run_dir / "adapter", base=base)
            print(f"adapter: {run_dir / 'adapter'}")
        except ValueError as error:
            print(f"adapter: not written. {error}")


def export(
    config: Any, prepared: Prepared, result: TrainedRun, data: Data, run_dir: pathlib.Path
) -> None:
    """Writes what each tier has trained into export/: a folder that `jaxfm.hub.load` opens (of
    Hugging Face's format where the architecture has one), and in it device/, a StableHLO program.

    A model that its format cannot express is left out with the reason; so are models that clients
    keep for themselves, which the server does not have.
    """
    algorithm, server = prepared.algorithm, result.state.server
    names = bucket_names(config, prepared)
    some = {name: leaf[:1] for name, leaf in data.validation.items()}
    inputs = data.task.prepare(some, jax.random.key(0))[0]
    for b in np.unique(prepared.placement.bucket):
        folder, bucket = run_dir / "export" / names[b], algorithm.buckets[b]
        model = bucket.model or algorithm.model
        if model is None or bucket.personal is not None:
            print(f"{folder}: not written. Its clients keep models of their own.")
            continue
        network = model, jax.device_get(bucket.shared(server))
        if jax.process_index():
            continue  # of several processes the first one writes
        if model.adapter is not None:
            network = merge(*network)
        try:
            hub.save(*network, folder, data.tokenizer, classes=data.classes, scale=data.scale)
            _check_same(folder, *network, inputs)
            print(f"{names[b]}: {folder}")
        except (TypeError, ValueError) as error:
            print(f"{folder}: without a model for jaxfm.hub. {error}")
        save_for_device(folder / "device", *network, inputs)


def bucket_names(config: Any, prepared: Prepared) -> list[str]:
    """Names of the buckets: by the share of the width that a tier holds, or by number."""
    buckets, tiers = prepared.algorithm.buckets, sorted(config.tiers)[::-1]
    if find(config.algorithm).has_tiers and len(tiers) == len(buckets):
        return [f"tier-{tier:g}" for tier in tiers]
    return [f"bucket-{b}" for b in range(len(buckets))]


def _check_same(folder: pathlib.Path, model: Model, variables: Variables, inputs: Any) -> None:
    """Raises a ValueError where the folder's model gives other outputs, and removes its numbers."""
    loaded = hub.load(folder)
    expected, found = (
        np.asarray(network.apply(numbers, inputs)[0], np.float64)
        for network, numbers in ((model, variables), loaded)
    )
    if np.abs(found - expected).max() > _CLOSE * max(1.0, np.abs(expected).max()):
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        raise ValueError(
            "What its clients run has more to it than the format can say, such as the scaler of "
            "HeteroFL; device/ has the whole program."
        )
