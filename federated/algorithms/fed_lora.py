"""LoRA averaged apart: A and B each by itself, as if they were any parameters.

    A <- sum_i p_i A_i;   B <- sum_i p_i B_i

It computes what `fed_avg` does with an adapted model, and says how wrong that is: the product of
means is not the mean of products. Where clients have ranks of their own, the missing columns of A
and rows of B count as zeros.
Source: Zhang et al. 2023 (FedIT: Towards Building the Federated GPT), algorithm 1.
"""

from __future__ import annotations

from jaxfm.federated.algorithm import Algorithm
from jaxfm.federated.local import Local
from jaxfm.federated.parts.factors import Pair, Stack
from jaxfm.federated.parts.low_rank import low_rank_averaging
from jaxfm.federated.registry import register
from jaxfm.model import Key, Model
from jaxfm.tasks import Task


@register(like="fed_avg", adapted=True)
def fed_lora(model: Model, task: Task, local: Local, *, ranks: tuple[int, ...] = ()) -> Algorithm:
    """Federated averaging of A and B apart.

    Partition: all that is trained is shared; the backbone is frozen.

    Args:
      model: with a low-rank adapter.
      task, local: as in `fed_avg`.
      ranks: of clients' adapters, dealt out by their memory; (): the adapter's own.
    Raises:
      ValueError: no low-rank adapter, or a rank that it does not have.
    """
    return low_rank_averaging(model, task, local, apart, who="fed_lora", ranks=ranks)


def apart(before: Pair, stack: Stack, key: Key) -> tuple[Pair, None]:
    """The means of A and of B."""
    return stack.mean(stack.share[:, None]), None
