"""Global magnitude pruning: one threshold on the importance of channels, over all groups.

    k_g(t) = #{c : s_gc > t},   t* = the lowest threshold whose counts meet the budget

The importances are given (L1, L2, Taylor, batch-norm scale, activation variance). Those of
different groups can be compared only on one scale; `per_group` divides each group's by their mean,
as DepGraph (arXiv 2301.12900, section 3.3) does.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.model import Array
from jaxfm.search.strategies.strategy import Problem, Strategy, to_logits
from jaxfm.search.strategies.uniform import fixed


def magnitude(problem: Problem, importance: Sequence[Array], *, per_group: bool = True) -> Strategy:
    """Returns a strategy of one candidate, which the importances of all units determine.

    Args:
      problem: what is searched.
      importance: f32[size] of each group; higher matters more.
      per_group: divide the importances of each group by their mean.
    Raises:
      ValueError: the importances do not have the sizes of the problem's groups.
    """
    values = [np.asarray(s, np.float64) for s in importance]
    if [len(s) for s in values] != list(problem.sizes):
        raise ValueError(
            f"importance has {[len(s) for s in values]} entries a group; the groups have "
            f"{list(problem.sizes)} channels."
        )
    if per_group:
        values = [s / max(s.mean(), 1e-30) for s in values]
    thresholds = np.concatenate([[-np.inf], np.unique(np.concatenate(values))])
    kept = np.stack([[(s > t).sum() for s in values] for t in thresholds])
    kept = np.maximum(kept, 1)
    feasible = np.asarray(jax.vmap(problem.fits)(jnp.asarray(kept, jnp.float32)))
    # One channel in every group may still be too much where the projection, which rounds up to
    # `channel_multiple`, gives more; the highest threshold is then the nearest wish.
    chosen = int(np.argmax(feasible)) if feasible.any() else len(thresholds) - 1
    return fixed(to_logits(jnp.asarray(kept[chosen] / problem.sizes, jnp.float32)))
