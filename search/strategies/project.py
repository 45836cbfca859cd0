"""Budgets by construction: any real vector is turned into channel counts that meet every budget.

    k_g(τ) = round_m(C_g · sigmoid(logit_g + τ)),   τ* = the largest shift that fits

All costs grow with every count and every count grows with τ, so τ* is found by bisection. Counts
change in steps of m channels, and several groups may step at once, so room is left below the
budget. It is then filled one step at a time, the group that is furthest below its wish first, until
no group can grow. Hence every candidate is feasible and maximal: one more step of any group would
exceed a budget.

Compare AGMC (arXiv 2011.12641, section 3), which corrects the actions once, linearly, without a
check, and AMC (arXiv 1802.03494, algorithm 1), which caps each layer by what the others could still
give back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm.model import Array
from jaxfm.search.trace.cost import Costs, Expression, costs
from jaxfm.search.trace.groups import Network

_WIDEST = 60.0  # sigmoid(±60) is 0 or 1 to the last bit of float32, for logits within ±40
_HALVINGS = 40
# Costs are float32 sums in another order than the one that set the limit; a candidate that lies
# exactly on its budget must not fail by the last bit.
_SLACK = 1e-6


class Budget(NamedTuple):
    """An upper bound on a cost.

    Attributes:
      name: what messages call it.
      cost: `(counts f32[G]) -> f32[]`, an array expression that does not fall as any count grows.
      limit: upper bound, in the units of `cost`.
    """

    name: str
    cost: Callable[[Array], Array]
    limit: float


def budgets(network: Network, **limits: float | int) -> tuple[Budget, ...]:
    """Returns budgets by name: `macs`, `parameters`, `parameter_bytes`, `activation_bytes`.

    A float up to 1 is a share of what the dense network costs; an integer or a larger number is an
    absolute limit. For a latency see `jaxfm.search.fit_latency`.

    Raises:
      ValueError: an unknown name or a limit that is not positive.
    """
    own, dense = costs(network), network.sizes.astype(np.int64)
    out = []
    for name, limit in limits.items():
        if name not in Costs._fields[:-1]:
            raise ValueError(f"There is no cost {name!r}; choose from {Costs._fields[:-1]}.")
        if not limit > 0:
            raise ValueError(f"{name}={limit} must be positive: give a share or an absolute limit.")
        cost: Expression = getattr(own, name)
        share = np.asarray(limit).dtype.kind not in "iub" and limit <= 1
        out.append(Budget(name, cost, float(limit) * (float(cost(dense)) if share else 1)))
    return tuple(out)


def within(budgets: Sequence[Budget], counts: Array) -> Array:
    """Returns bool[], whether counts f32[G] meet all budgets."""
    return jnp.all(jnp.stack([b.cost(counts) <= b.limit * (1 + _SLACK) for b in budgets]))


def projection(
    sizes: np.ndarray,
    budgets: Sequence[Budget],
    *,
    channel_multiple: int = 1,
    smallest: float = 0.0,
    fill: bool = True,
) -> Callable[[Array], Array]:
    """Returns `project(logits f32[G]) -> counts i32[G]`, jittable and vmappable.

    Args:
      sizes: i32[G], channels of each group.
      budgets: every candidate meets all of them.
      channel_multiple: counts are multiples of it, or the whole group where that is not a multiple.
        A group always keeps one step.
      smallest: the share of each group that is always kept, in [0, 1).
      fill: whether the budget is used up. False only shrinks: ratios that already meet the budgets
        stay what they are, for searches over the whole Pareto front.
    Raises:
      ValueError: a size, `channel_multiple` or `smallest` is out of range, or a budget lies below
        what the smallest network costs (the message says how much that is).
    """
    sizes = np.asarray(sizes, np.int32)
    if sizes.ndim != 1 or not len(sizes) or sizes.min() < 1:
        raise ValueError(f"sizes={sizes.tolist()} must hold one positive count for each group.")
    if channel_multiple < 1 or not 0 <= smallest < 1:
        raise ValueError(
            f"channel_multiple={channel_multiple} must be at least 1 and smallest={smallest} in "
            "[0, 1)."
        )
    most = -(-sizes // channel_multiple)
    least = np.maximum(1, np.ceil(smallest * sizes / channel_multiple)).astype(np.int32)
    least = np.minimum(least, most)
    _check_reachable(budgets, np.minimum(least * channel_multiple, sizes))
    grid = _Grid(sizes, channel_multiple, least, most, tuple(budgets))

    def project(logits: Array) -> Array:
        logits = jnp.clip(logits.astype(jnp.float32), -40.0, 40.0)
        steps, shift = _bisect(grid, logits, jnp.float32(_WIDEST if fill else 0.0))
        return grid.to_counts(_grow(grid, logits, shift, steps) if fill else steps)

    return project


class _Grid(NamedTuple):
    """The counts that groups may have, numbered by steps i32[G].

    Attributes:
      sizes: i32[G], channels of each group.
      multiple: channels of a step; the last step of a group may be shorter.
      least, most: i32[G], the fewest and the most steps of each group.
      budgets: what candidates must meet.
    """

    sizes: np.ndarray
    multiple: int
    least: np.ndarray
    most: np.ndarray
    budgets: tuple[Budget, ...]

    def to_counts(self, steps: Array) -> Array:
        return jnp.minimum(steps * self.multiple, self.sizes)

    def fits(self, steps: Array) -> Array:
        return within(self.budgets, self.to_counts(steps).astype(jnp.float32))

    def wish(self, logits: Array, shift: Array) -> Array:
        sizes = jnp.asarray(self.sizes, jnp.float32)
        return sizes / self.multiple * jax.nn.sigmoid(logits + shift)

    def rounded(self, logits: Array, shift: Array) -> Array:
        steps = jnp.round(self.wish(logits, shift)).astype(jnp.int32)
        # What is checked must be what is returned: computed twice, in two fusions, a sigmoid may
        # round to two different counts.
        return lax.optimization_barrier(jnp.clip(steps, self.least, self.most))


def _bisect(grid: _Grid, logits: Array, top: Array) -> tuple[Array, Array]:
    """Returns the steps of the largest feasible shift up to `top`, and that shift from above."""

    def halve(_: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        low, high, steps = carry
        middle = 0.5 * (low + high)
        tried = grid.rounded(logits, middle)
        good = grid.fits(tried)
        return (
            jnp.where(good, middle, low),
            jnp.where(good, high, middle),
            jnp.where(good, tried, steps),
        )

    start = (jnp.float32(-_WIDEST), top, jnp.asarray(grid.least, jnp.int32))
    _, high, steps = lax.fori_loop(0, _HALVINGS, halve, start)
    whole = grid.rounded(logits, top)
    all_fits = grid.fits(whole)
    return jnp.where(all_fits, whole, steps), jnp.where(all_fits, top, high)


def _grow(grid: _Grid, logits: Array, shift: Array, steps: Array) -> Array:
    """Returns steps after adding one at a time, where it is wanted most, until none fits."""
    target = grid.wish(logits, shift)

    def growable(steps: Array) -> Array:
        one_more = steps[None] + jnp.eye(len(grid.sizes), dtype=jnp.int32)
        return jax.vmap(grid.fits)(one_more) & (steps < grid.most)

    def body(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        steps, can = carry
        lack = jnp.where(can, target - steps.astype(jnp.float32), -jnp.inf)
        steps = steps.at[jnp.argmax(lack)].add(1)
        return steps, growable(steps)

    return lax.while_loop(lambda c: jnp.any(c[1]), body, (steps, growable(steps)))[0]


def _check_reachable(budgets: Sequence[Budget], fewest: np.ndarray) -> None:
    if not budgets:
        raise ValueError("Give at least one budget.")
    for budget in budgets:
        reachable = float(budget.cost(jnp.asarray(fewest, jnp.float32)))
        if reachable > budget.limit * (1 + _SLACK):
            raise ValueError(
                f"The budget of {budget.limit:.6g} {budget.name} cannot be met: with "
                f"{fewest.tolist()} channels, the fewest allowed, the network still costs "
                f"{reachable:.6g}. Raise the budget, or lower `channel_multiple` or `smallest`."
            )
