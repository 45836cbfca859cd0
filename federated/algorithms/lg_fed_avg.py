"""LG-FedAvg: each client reads its data in its own way, and all share what decides.

FedPer's mirror image: the last layers are shared and averaged, the layers below stay at home.
The paper starts from a model that federated averaging has trained: give its variables to the run.
Source: Liang et al. 2020 (Think Locally, Act Globally), algorithm 1.
"""

from __future__ import annotations

from jaxfm.federated.algorithm import Algorithm, IsPersonal
from jaxfm.federated.algorithms.fed_per import fed_per
from jaxfm.federated.local import Local
from jaxfm.federated.partition import head, outside
from jaxfm.federated.registry import register
from jaxfm.model import Model
from jaxfm.tasks import Task


@register(
    like="fed_per",
    is_shared=lambda setting: setting.is_last,
    breaks={"statistics": "Those of the representation stay with the clients."},
)
def lg_fed_avg(
    model: Model, task: Task, local: Local, *, is_shared: IsPersonal = head
) -> Algorithm:
    """Federated averaging of the last part of the tree; the representation is personal.

    Partition: what `is_shared` names is shared, all else is a client's memory.

    Args:
      model, task, local: as in `fed_avg`.
      is_shared: of the path of a leaf, see `jaxfm.federated.partition`.
    Raises:
      ValueError: nothing is personal, or nothing is shared.
    """
    return fed_per(model, task, local, is_personal=outside(is_shared))
