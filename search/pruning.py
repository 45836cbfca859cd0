"""Prune any function in five lines: trace, rank, project onto the budget, cut.

>>> import jax, jax.numpy as jnp
>>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 2))}
>>> f = lambda params, x: jax.nn.relu(x @ params["up"]) @ params["down"]
>>> small = prune(f, params, jnp.ones((3, 4)), macs_ratio=0.5)
>>> small.params["up"].shape, jax.jit(small.apply)(small.params, jnp.ones((3, 4))).shape
((4, 4), (3, 2))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.model import Array, Key, PyTree
from jaxfm.search.least_squares import repair
from jaxfm.search.ranking import check_scores, importance, keep, masks, ranks
from jaxfm.search.strategies.loop import Result, run
from jaxfm.search.strategies.project import Budget, budgets
from jaxfm.search.strategies.strategy import Problem, Strategy, problem
from jaxfm.search.trace.cost import Costs, costs, counts_of
from jaxfm.search.trace.groups import Kept, Network, Scores, network
from jaxfm.search.trace.interpret import check, cut, full, masked, sliced
from jaxfm.search.trace.unit_weights import UnitNorm

MakeStrategy = Callable[[Problem], Strategy]
Score = Callable[[Callable, PyTree], Array]


class Pruned(NamedTuple):
    """A smaller model.

    Attributes:
      params: those of the kept units, in the structure of the dense ones.
      apply: `(params, *inputs) -> output`, to be jitted, differentiated, exported, served.
      kept: a mask for each group, in the order of `network.groups`.
      network: the network of the dense model.
      result: what the search found, where there was one.
    """

    params: PyTree
    apply: Callable[..., PyTree]
    kept: Kept
    network: Network
    result: Result | None = None

    def table(self) -> dict[str, tuple[float, float]]:
        """Returns (dense, pruned) of each cost; the numbers are exact."""
        own, dense = costs(self.network), self.network.sizes.astype(np.int64)
        now = counts_of(self.network, self.kept)
        names = Costs._fields[:-1]
        return {n: (float(getattr(own, n)(dense)), float(getattr(own, n)(now))) for n in names}

    def ratios(self) -> dict[str, float]:
        """Returns the share that each group keeps, by the name of the group."""
        counts = counts_of(self.network, self.kept)
        return {g.name: float(k / g.size) for g, k in zip(self.network.groups, counts, strict=True)}


def prune(
    function: Callable | Network,
    params: PyTree,
    *inputs: PyTree,
    macs_ratio: float | None = None,
    budget: Mapping[str, float] | Budget | Sequence[Budget] = (),
    importance: str | UnitNorm | Scores = "l2",
    channel_multiple: int = 1,
    ignore: Sequence[str] = (),
    strategy: MakeStrategy | None = None,
    score: Score | None = None,
    evaluations: int = 256,
    key: Key | None = None,
    repaired: bool = False,
) -> Pruned:
    """Cuts a model down to a budget.

    Args:
      function: `(params, *inputs) -> output`, any traceable function, or a Network of it.
      params: its dense parameters.
      *inputs: one batch of examples: data where `repaired` or "activation" read them; otherwise
        shapes will do.
      macs_ratio: share of the multiply-adds that remains; the same as budget={"macs": ...}.
      budget: limits by name ("macs", "parameters", "parameter_bytes", "activation_bytes": a share
        up to 1, or absolute), or your own Budgets (such as a latency). All of them hold.
      importance: what decides which units of a group stay: "l1", "l2", "scale", "l2_scale",
        "activation", a function of the weights of units, or your own scores ("taylor" needs a loss:
        see `jaxfm.search.importance`).
      channel_multiple: groups keep multiples of it, or all units.
      ignore: patterns over the paths of parameters, or of their axes ("path:0"), that stay whole.
        Name the rows of a table that one-hot rows are multiplied with: they are units like others.
      strategy: `(problem) -> Strategy`, such as `lambda p: nsga2(p.sizes)`; None cuts all groups
        by the same ratio.
      score: for a strategy, `(run, params) -> f32[]`, higher is better, jittable; `run(params,
        *inputs)` is a masked candidate.
      evaluations: number of candidates that the strategy may try.
      key: key of the search; None means `jax.random.key(0)`.
      repaired: whether the remaining weights are repaired by least squares on `inputs`
        (`jaxfm.search.repair`).
    Raises:
      ValueError: no budget, one that cannot be met, two for multiply-adds, a macs_ratio that is not
        a share, an unknown name, a strategy without a score or one that is not a function, a score
        that is not a scalar, importance of other shapes than the groups, shapes where data are
        read, or something to ignore that is missing or in a network that was already read.
    """
    _check(function, inputs, importance, ignore, strategy, score, repaired)
    own = (
        function
        if isinstance(function, Network)
        else network(function, params, *inputs, ignore=ignore)
    )
    limits = _limits(own, macs_ratio, budget)
    order = _order(own, params, importance, inputs)
    searched = problem(
        own.sizes, limits, _scorer(own, order, score), params, channel_multiple=channel_multiple
    )
    result = None
    if strategy is None:
        counts = np.asarray(jax.jit(searched.project)(jnp.zeros(len(own.groups))))
    else:
        chosen = strategy(searched)
        evaluations = max(1, evaluations // chosen.batch) * chosen.batch
        result = run(searched, chosen, evaluations, jax.random.key(0) if key is None else key)
        counts = result.best_counts
    kept = keep(order, counts)
    if repaired:
        params = jax.jit(lambda p, *x: repair(own, p, list(map(jnp.asarray, kept)), *x))(
            params, *inputs
        )
    return pruned(own, params, kept, result)


def _check(
    function: Any, inputs: Any, importance: Any, ignore: Any, strategy: Any, score: Any,
    repaired: bool,
) -> None:  # fmt: skip
    if strategy is not None and not callable(strategy):
        raise ValueError("`strategy` must be a function of the problem: lambda p: nsga2(p.sizes).")
    if (strategy is None) != (score is None):
        raise ValueError(
            "Give `strategy` and `score` together, or neither to cut all groups alike."
        )
    named = importance if isinstance(importance, str) else ""
    if named == "taylor":
        raise ValueError(
            "importance='taylor' needs a loss: give the scores of "
            "`jaxfm.search.importance(network, params, 'taylor', gradient=...)`."
        )
    reads = repaired or named == "activation"
    if reads and any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(inputs)):
        raise ValueError("importance='activation' and `repaired` read the inputs: give data.")
    if isinstance(function, Network) and ignore:
        raise ValueError(
            f"ignore={ignore!r} comes too late for a Network: give it to `network` instead."
        )


def pruned(network: Network, params: PyTree, kept: Kept, result: Result | None = None) -> Pruned:
    """Returns the model of the kept units.

    Raises:
      ValueError: masks that do not fit the network (`check`).
    """
    kept = check(network, kept)
    small = jax.jit(lambda p: cut(network, p, kept))(params)  # one program, not one for each take
    return Pruned(small, sliced(network, kept), kept, network, result)


def _limits(own: Network, macs_ratio: float | None, budget: Any) -> tuple[Budget, ...]:
    named = dict(budget) if isinstance(budget, Mapping) else {}
    if macs_ratio is not None:
        if "macs" in named:
            raise ValueError(
                f"macs_ratio={macs_ratio} and budget={named} both limit multiply-adds; give one."
            )
        if not 0 < macs_ratio <= 1:
            raise ValueError(f"macs_ratio={macs_ratio} must be a share above 0 and up to 1.")
        named["macs"] = float(macs_ratio)
    limits = budgets(own, **named)
    if isinstance(budget, Budget):
        budget = (budget,)
    limits = limits if isinstance(budget, Mapping) else (*limits, *budget)
    if not limits:
        raise ValueError("Give a budget: macs_ratio=0.5, or budget={'parameters': 0.3}.")
    return limits


def _order(
    own: Network, params: PyTree, kind: str | UnitNorm | Scores, inputs: Sequence[PyTree]
) -> Scores:
    if not isinstance(kind, str) and not callable(kind):
        wanted = [mask.shape for mask in full(own)]
        given = dict(kind) if isinstance(kind, Mapping) else list(map(np.shape, kind))
        if given != wanted:
            what = f"a dict of {list(given)}" if isinstance(given, dict) else f"of shapes {given}"
            raise ValueError(
                f"The scores in `importance` are {what}; give a tuple of shapes {wanted}, in the "
                "order of `network.groups`."
            )
        check_scores(own, tuple(kind))
        return ranks(tuple(map(jnp.asarray, kind)))
    data = inputs if kind == "activation" else ()
    scores = jax.jit(lambda p, x: importance(own, p, kind, inputs=x))(params, data)
    check_scores(own, scores, params)
    return ranks(scores)


def _scorer(own: Network, order: Scores, score: Score | None) -> Callable[[PyTree, Array], Array]:
    dense = masked(own)

    def evaluate(params: PyTree, counts: Array) -> Array:
        assert score is not None

        def one(counts: Array) -> Array:
            own_masks = masks(order, counts)
            value = score(lambda p, *x: dense(p, own_masks, *x), params)
            if np.shape(value):
                raise ValueError(
                    f"`score` returned shape {np.shape(value)}; it must return one number."
                )
            return jnp.asarray(value)

        return jax.vmap(one)(counts)

    return evaluate
