"""Federated averaging.

    x <- x + sum_i n_i (y_i - x) / sum_i n_i

with y_i the parameters after client i's local epochs and n_i its number of examples.
Source: McMahan et al. 2017, algorithm 1.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxfm.federated.algorithm import Algorithm, Mean, mean
from jaxfm.federated.averaging import averaging_bucket, moved
from jaxfm.federated.local import Local
from jaxfm.federated.registry import register
from jaxfm.model import Key, Model, Variables
from jaxfm.tasks import Task


class FedAvgState(NamedTuple):
    """The server keeps the model, and nothing else."""

    variables: Variables


@register
def fed_avg(model: Model, task: Task, local: Local) -> Algorithm:
    """Federated averaging of parameters and statistics.

    Partition: parameters and statistics are shared; nothing is personal.

    Args:
      model: what all clients train.
      task: its loss.
      local: optimizer, batch size and epochs on the client.
    """

    def server(state: FedAvgState, totals: Mean, public, key: Key):
        return FedAvgState(moved(state.variables, mean(totals))), {}

    return Algorithm(FedAvgState, (averaging_bucket(model, task, local),), server, model)
