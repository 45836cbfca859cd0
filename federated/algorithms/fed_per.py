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
    IsPersonal,
    Known,
    Mean,
    Profile,
    mean,
    weighted,
)
from jaxfm.federated.algorithms.fed_avg import FedAvgState
from jaxfm.federated.averaging import difference, moved
from jaxfm.federated.local import Local, local_fit, objective
from jaxfm.federated.partition import check_partition, head, join_variables, split_variables
from jaxfm.federated.registry import register
from jaxfm.model import Key, Model, Variables
from jaxfm.tasks import Task


class FedPerDownload(NamedTuple):
    """The shared part, and the personal part as all clients have it before their first round."""

    shared: Variables
    first: Known


@register(is_personal=lambda setting: setting.is_last)
def fed_per(model: Model, task: Task, local: Local, *, is_personal: IsPersonal = head) -> Algorithm:
    """Federated averaging of a part of the tree.

    Partition: `is_personal` says which parameters and statistics are a client's memory; all others
    are shared. Every client starts from the personal part of the variables that the run starts
    from; the global model keeps that part, so look at the personal metrics.

    Args:
      model, task, local: as in `fed_avg`.
      is_personal: of the path of a leaf, see `jaxfm.federated.partition`.
    Raises:
      ValueError: nothing is personal, or nothing is shared.
    """
    check_partition(model, is_personal)
    fit = local_fit(objective(model, task), local)

    def send(server: FedAvgState, public) -> FedPerDownload:
        shared, first = split_variables(server.variables, is_personal)
        return FedPerDownload(shared, Known(first))

    def init_client(download: FedPerDownload, data, profile, key) -> Variables:
        return download.first.value

    def client(
        download: FedPerDownload, own: Variables, data: ClientData, profile: Profile, key: Key
    ):
        start = join_variables(download.shared, own)
        trained, info = fit(start, data, profile.max_steps, key)
        shared, own = split_variables(trained, is_personal)
        return weighted(info.examples, difference(shared, download.shared)), own, info

    def server(state: FedAvgState, totals: Mean, public, key: Key):
        shared, first = split_variables(state.variables, is_personal)
        return FedAvgState(join_variables(moved(shared, mean(totals)), first)), {}

    def personal(server: FedAvgState, own: Variables) -> Variables:
        return join_variables(split_variables(server.variables, is_personal)[0], own)

    bucket = Bucket(model, send, client, init_client, personal=personal)
    return Algorithm(FedAvgState, (bucket,), server, model, is_personal)
