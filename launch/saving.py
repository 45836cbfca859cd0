"""What a federated run leaves: its model, and an adapter by itself."""

from __future__ import annotations

import pathlib

from jaxfm import federated
from jaxfm.data.dealing import Data
from jaxfm.federated import Prepared, TrainedRun


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
