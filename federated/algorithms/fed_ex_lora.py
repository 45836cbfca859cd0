"""FedEx-LoRA: A and B averaged apart, and the kernel takes up what that leaves out.

    A <- sum p_i A_i;   B <- sum p_i B_i;   W <- W + s (sum p_i A_i B_i - A B)

so that the model is that of averaging the full products, exactly. The changed kernels travel in
every round, since a client may have missed any number of rounds. With `remainder` = R they do not:
what was left out so far is kept as P Q of rank R beside W, closest to what it should be, and only P
and Q travel; a round is exact as long as its rest fits in R.
Source: Singhal et al. 2024 (FedEx-LoRA), equations 9 to 12 and section 4 (the closest lower rank).
"""

from __future__ import annotations

from jaxfm.federated.algorithm import Algorithm
from jaxfm.federated.local import Local
from jaxfm.federated.parts.factors import Pair, Stack, minus, plus
from jaxfm.federated.parts.low_rank import low_rank_averaging
from jaxfm.federated.registry import register
from jaxfm.model import Key, Model
from jaxfm.tasks import Task


@register(like="fed_lora", adapted=True)
def fed_ex_lora(
    model: Model, task: Task, local: Local, *, ranks: tuple[int, ...] = (), remainder: int = 0
) -> Algorithm:
    """Averaging of A and B with an exact rest.

    Partition: as in `fed_lora`; adapted kernels change, on the server.

    Args:
      model, task, local, ranks: as in `fed_lora`.
      remainder: rank to which the rest is kept beside kernels, which then travel once; 0: kernels
        take it up and travel in every round.
    Raises:
      ValueError: as `fed_lora`; a remainder above the kernels' rank; kernels that cannot change.
    """
    return low_rank_averaging(
        model, task, local, with_rest, who="fed_ex_lora", ranks=ranks, folds=not remainder,
        remainder=remainder,
    )  # fmt: skip


def with_rest(before: Pair, stack: Stack, key: Key) -> tuple[Pair, Pair]:
    """The means of A and of B, and what their product lacks."""
    share = stack.share[:, None]
    means = stack.mean(share)
    return means, plus(stack.product(share), minus(means))
