"""HetLoRA: each client the rank its memory allows, and counts by the size of its product.

    A <- sum_i q_i A_i;   B <- sum_i q_i B_i;   q_i = ‖A_i B_i‖ / sum_j ‖A_j B_j‖

A client of rank k holds the first k columns of A and rows of B. In the paper those that it lacks
count as zeros (`padded`); by default they do not count, so that a column is a mean over those who
have it and does not move where nobody has. The norm is taken of each kernel by itself. The paper's
pruning of ranks while training is left out.
Source: Cho et al. 2024 (Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation
Models), section 3.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxfm.federated.algorithm import Algorithm
from jaxfm.federated.local import Local
from jaxfm.federated.parts.factors import Pair, Stack, length
from jaxfm.federated.parts.low_rank import low_rank_averaging
from jaxfm.federated.registry import register
from jaxfm.model import Key, Model
from jaxfm.tasks import Task


@register(like="fed_lora", adapted=True)
def het_lora(
    model: Model, task: Task, local: Local, *, ranks: tuple[int, ...] = (), padded: bool = False
) -> Algorithm:
    """Averaging of A and B apart over clients of unequal rank, by the norms of their products.

    Partition: as in `fed_lora`. Its aggregation error is against the mean by examples, as of all.

    Args:
      model, task, local, ranks: as in `fed_lora`.
      padded: whether columns that a client lacks count as zeros, as in the paper.
    Raises:
      ValueError: as `fed_lora`.
    """
    rule = functools.partial(by_norm, padded)
    return low_rank_averaging(model, task, local, rule, who="het_lora", ranks=ranks)


def by_norm(padded: bool, before: Pair, stack: Stack, key: Key) -> tuple[Pair, None]:
    """The means of A and of B by the norms of the clients' products."""
    norm = jnp.where(stack.share > 0, jax.vmap(length)(Pair(stack.a, stack.b)), 0)
    norm = jnp.where(norm.sum() > 0, norm, stack.share)  # nobody has moved B from zero
    share = norm / jnp.where(norm.sum() > 0, norm.sum(), 1)
    if padded:
        return stack.mean(share[:, None]), None
    means = stack.mean(stack.share_of_held(share))
    nobody = (share[:, None] * stack.held).sum(0) == 0
    a = jnp.where(nobody[None], before.a, means.a)
    return Pair(a, jnp.where(nobody[:, None], before.b, means.b)), None
