"""The trained model of a run as a folder, and the folder as the start of another run."""

from __future__ import annotations

import os
from typing import NamedTuple

import jax

from jaxfm import hub
from jaxfm.adapters import merge
from jaxfm.data.dealing import Data
from jaxfm.federated.algorithm import Algorithm
from jaxfm.federated.run import TrainedRun
from jaxfm.model import Model, Variables


class TrainedModel(NamedTuple):
    """What a run has trained.

    Attributes:
      model, variables: the network and its arrays, which may be a slice of the full ones.
    """

    model: Model
    variables: Variables


def trained_model(algorithm: Algorithm, result: TrainedRun) -> TrainedModel:
    """Returns the model that the run's global test figures are of.

    Raises:
      ValueError: clients have models of their own, and there is no global one.
    """
    server = result.state.server
    if algorithm.model is None:
        raise ValueError("This algorithm has no global model: clients keep models of their own.")
    if result.scored is None:
        return TrainedModel(algorithm.model, server.variables)
    bucket = algorithm.buckets[result.scored]
    return TrainedModel(bucket.model or algorithm.model, bucket.shared(server))


def save_model(
    algorithm: Algorithm, result: TrainedRun, data: Data, folder: str | os.PathLike
) -> None:
    """Writes the trained model, its tokenizer and its classes' names as `jaxfm.hub.save` does.

    An adapter is merged into the model. Of several processes the first one writes.
    `jaxfm.hub.load_for(data, folder)` starts from it.

    Raises:
      TypeError, ValueError: as of `trained_model` and `jaxfm.hub.save`.
    """
    model, variables = trained_model(algorithm, result)
    if model.adapter is not None:
        model, variables = merge(model, variables)
    if jax.process_index() == 0:
        hub.save(model, variables, folder, data.tokenizer, classes=data.classes, scale=data.scale)


def save_adapter(
    algorithm: Algorithm, result: TrainedRun, folder: str | os.PathLike, *, base: str = ""
) -> None:
    """Writes the adapter of the trained model as `jaxfm.hub.save_adapter` does.

    Args:
      algorithm, result: a run of an adapted model.
      folder: a folder.
      base: name or folder of the model under the adapter.
    Raises:
      ValueError: as of `trained_model` and `jaxfm.hub.save_adapter`.
    """
    model, variables = trained_model(algorithm, result)
    if jax.process_index() == 0:
        hub.save_adapter(model, variables, folder, base=base)
