"""FedPer: the body of the network is shared, its head stays at home.

    (u, v_i) <- local epochs from (x, v_i);   x <- x + sum_i n_i (u_i - x) / sum_i n_i

with x the shared part and v_i the personal part of client i, trained together.
Source: Arivazhagan et al. 2019 (Federated Learning with Personalization Layers), algorithm 1.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxfm.federated.algorithm import (
    Algorithm,
    Bucket,
    ClientData,
    Known,
    Mean,
    Profile,
    mean,
    scaled,
)
from jaxfm.federated.algorithms.fed_avg import FedAvgState, difference, moved
from jaxfm.federated.local import Local, local_fit, objective
from jaxfm.federated.partition import (
    IsPersonal,
    check_partition,
    head,
    join_variables,
    split_variables,
)
from jaxfm.model import Key, Model, Variables
from jaxfm.tasks import Task


class PartialDownload(NamedTuple):
    """The shared part, and the personal part as all clients have it before their first round."""

    shared: Variables
    first: Known


def fed_per(model: Model, task: Task, local: Local, *, is_personal: IsPersonal = head) -> Algorithm:
    """Federated averaging of a part of the tree.

    Partition: `is_personal` says which parameters and statistics are a client's memory; all others
    are shared. Every client starts from the personal part of the variables that the run starts
    from; the global model keeps that part, so look at the personal metrics.

    Args:
      is_personal: of the path of a leaf, see `jaxfm.federated.partition`.
    Raises:
      ValueError: nothing is personal, or nothing is shared.
    """
    check_partition(model, is_personal)
    fit = local_fit(objective(model, task), local)

    def send(server: FedAvgState, public) -> PartialDownload:
        shared, first = split_variables(server.variables, is_personal)
        return PartialDownload(shared, Known(first))

    def init_client(download: PartialDownload, data, profile, key) -> Variables:
        return download.first.value

    def client(
        download: PartialDownload, own: Variables, data: ClientData, profile: Profile, key: Key
    ):
        start = join_variables(download.shared, own)
        trained, info = fit(start, data, profile.max_steps, key)
        shared, own = split_variables(trained, is_personal)
        examples = info["examples"]
        upload = Mean(scaled(examples, difference(shared, download.shared)), examples)
        return upload, own, info

    def server(state: FedAvgState, totals: Mean, public, key: Key):
        shared, first = split_variables(state.variables, is_personal)
        return FedAvgState(join_variables(moved(shared, mean(totals)), first)), {}

    def personal(server: FedAvgState, own: Variables) -> Variables:
        return join_variables(split_variables(server.variables, is_personal)[0], own)

    bucket = Bucket(model, send, client, init_client, personal=personal)
    return Algorithm(FedAvgState, (bucket,), server, model)
