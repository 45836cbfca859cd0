"""raFLoRA: like FlexLoRA, with each column of A and row of B averaged over those who have it.

    U S V = sum_k (sum over i with r_i >= k: n_i a_ik b_ik) / (sum over i with r_i >= k: n_i)

Where a client of low rank counts as zeros for the columns that it lacks, these shrink by its share
in every round, until the product has no more than the lowest rank: the rank collapses. With equal
ranks it is FlexLoRA.
Source: Wu et al. 2026 (Preventing Rank Collapse in Federated Low-Rank Adaptation with Client
Heterogeneity), section 5.
"""

from __future__ import annotations

from jaxfm.federated.algorithm import Algorithm
from jaxfm.federated.algorithms.flex_lora import OWN_BASIS, reduced
from jaxfm.federated.local import Local
from jaxfm.federated.parts.factors import Pair, Stack
from jaxfm.federated.parts.low_rank import low_rank_averaging
from jaxfm.federated.registry import register
from jaxfm.model import Key, Model
from jaxfm.tasks import Task


@register(like="flex_lora", adapted=True, breaks=OWN_BASIS)
def ra_flora(model: Model, task: Task, local: Local, *, ranks: tuple[int, ...] = ()) -> Algorithm:
    """Re-projection of the product, averaged rank by rank.

    Partition: as in `fed_lora`.

    Args:
      model, task, local, ranks: as in `fed_lora`.
    Raises:
      ValueError: as `fed_lora`.
    """
    return low_rank_averaging(model, task, local, by_rank, who="ra_flora", ranks=ranks)


def by_rank(before: Pair, stack: Stack, key: Key) -> tuple[Pair, None]:
    """The closest factors to the product, each of whose columns is a mean of those who have it."""
    return reduced(stack.product(stack.share_of_held(stack.share)), before), None
