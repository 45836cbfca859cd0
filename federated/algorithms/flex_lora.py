"""FlexLoRA: the mean of the full products, brought back to the adapter's rank by an SVD.

    U S V = sum_i p_i A_i B_i;   A <- c U_r;   B <- S_r V_r / c

with U_r, S_r, V_r of the r largest singular values, so that no product of rank r is closer to the
mean; those of a client of rank k are the first k. c keeps the size of A's columns from round to
round (the paper has S with one of the factors and no c). Nothing of in x out numbers is made as
long as the ranks of a cohort add up to less than in or out.
Source: Bai et al. 2024 (FlexLoRA), section 3.2 and algorithm 1.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxfm.federated.algorithm import Algorithm
from jaxfm.federated.local import Local
from jaxfm.federated.parts.factors import Pair, Stack, closest
from jaxfm.federated.parts.low_rank import low_rank_averaging
from jaxfm.federated.registry import register
from jaxfm.model import Array, Key, Model
from jaxfm.tasks import Task

OWN_BASIS = {"one_step": "The factors are those of the SVD of their product."}


@register(like="fed_lora", adapted=True, breaks=OWN_BASIS)
def flex_lora(model: Model, task: Task, local: Local, *, ranks: tuple[int, ...] = ()) -> Algorithm:
    """Re-projection of the mean product to the adapter's rank.

    Partition: as in `fed_lora`.

    Args:
      model, task, local, ranks: as in `fed_lora`.
    Raises:
      ValueError: as `fed_lora`.
    """
    return low_rank_averaging(model, task, local, projected, who="flex_lora", ranks=ranks)


def projected(before: Pair, stack: Stack, key: Key) -> tuple[Pair, None]:
    """The closest factors to the mean of the products."""
    return reduced(stack.product(stack.share[:, None]), before), None


def reduced(product: Pair, like: Pair) -> Pair:
    """A product brought to the rank of another, with columns of A as long as its on average."""
    rank = like.a.shape[1]
    size: Array = jnp.linalg.norm(like.a) * rank**-0.5
    return closest(product, rank, jnp.where(size > 0, size, 1))
