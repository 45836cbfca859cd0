"""FLoRA: the clients' adapters are stacked, which adds their products up, and go into the kernel.

    W <- W + s [p_1 A_1, p_2 A_2, ...] [B_1; B_2; ...] = W + s sum_i p_i A_i B_i

Clients start each round with a fresh adapter, A drawn anew and B zero, so ranks may differ. In the
paper clients download the stack, whose size grows with the cohort, and add it to their kernels
themselves. Here they download the adapted kernels, since a client may have missed any number of
rounds; of the adapter they only need the round's seed. The stack would be smaller where a cohort's
ranks add up to less than in * out / (in + out).
Source: Wang et al. 2024 (FLoRA), equations 5 to 8.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxfm.federated.algorithm import Algorithm
from jaxfm.federated.local import Local
from jaxfm.federated.parts.factors import Pair, Stack
from jaxfm.federated.parts.low_rank import low_rank_averaging
from jaxfm.federated.registry import register
from jaxfm.model import Key, Model
from jaxfm.tasks import Task


@register(
    like="fed_lora",
    adapted=True,
    breaks={"one_step": "The step is in the kernel, and the adapter starts anew."},
)
def flora(model: Model, task: Task, local: Local, *, ranks: tuple[int, ...] = ()) -> Algorithm:
    """Stacking of adapters, which is exact for any ranks.

    Partition: as in `fed_lora`; adapted kernels change, on the server.

    Args:
      model, task, local, ranks: as in `fed_lora`.
    Raises:
      ValueError: as `fed_lora`; kernels that cannot change.
    """
    return low_rank_averaging(
        model, task, local, stacked, who="flora", ranks=ranks, folds=True, draw=fresh
    )


def stacked(before: Pair, stack: Stack, key: Key) -> tuple[Pair, Pair]:
    """A fresh adapter, and the mean of the products for the kernel."""
    return fresh(before, key), stack.product(stack.share[:, None])


def fresh(like: Pair, key: Key) -> Pair:
    """As `lora` begins: A uniform within 1 / sqrt(in), B zero."""
    bound = like.a.shape[0] ** -0.5
    a = jax.random.uniform(key, like.a.shape, like.a.dtype, -bound, bound)
    return Pair(a, jnp.zeros_like(like.b))
