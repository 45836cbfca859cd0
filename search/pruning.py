"""Prune any function in five lines: trace, rank, project onto the budget, cut.

>>> import jax, jax.numpy as jnp
>>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 2))}
>>> f = lambda params, x: jax.nn.relu(x @ params["up"]) @ params["down"]
>>> small = prune(f, params, jnp.ones((3, 4)), macs_ratio=0.5)
>>> small.params["up"].shape, jax.jit(small.apply)(small.params, jnp.ones((3, 4))).shape
((4, 4), (3, 2))
"""

from __future__ import annotations

import glob
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from safetensors.numpy import load_file, save_file

from jaxfm.model import Array, Key, PyTree
from jaxfm.search.least_squares import repair
from jaxfm.search.ranking import Scores, importance, keep, masks, ranks
from jaxfm.search.strategies.loop import Result, run
from jaxfm.search.strategies.project import Budget, budgets
from jaxfm.search.strategies.strategy import Problem, Strategy, problem
from jaxfm.search.trace.cost import Costs, costs, counts_of
from jaxfm.search.trace.groups import IGNORED, Kept, Network, network
from jaxfm.search.trace.interpret import check, cut, full, masked, sliced
from jaxfm.search.trace.plan import Leaf

MakeStrategy = Callable[[Problem], Strategy]
Score = Callable[[Callable, PyTree], Array]


class Pruned(NamedTuple):
    """A smaller model.

    Attributes:
      params: of the kept units, the structure of the dense ones.
      apply: `(params, *inputs) -> output`: jit, differentiate, export, serve it.
      kept: a group's mask, in the order of `network.groups`.
      network: of the dense model.
      result: of the search, where there was one.
    """

    params: PyTree
    apply: Callable[..., PyTree]
    kept: Kept
    network: Network
    result: Result | None = None

    def table(self) -> dict[str, tuple[float, float]]:
        """(dense, pruned) of each cost, exact."""
        own, dense = costs(self.network), self.network.sizes.astype(np.int64)
        now = counts_of(self.network, self.kept)
        names = Costs._fields[:-1]
        return {n: (float(getattr(own, n)(dense)), float(getattr(own, n)(now))) for n in names}

    def ratios(self) -> dict[str, float]:
        """The share that each group keeps, by its name."""
        counts = counts_of(self.network, self.kept)
        return {g.name: float(k / g.size) for g, k in zip(self.network.groups, counts, strict=True)}


def prune(
    function: Callable | Network,
    params: PyTree,
    *inputs: PyTree,
    macs_ratio: float | None = None,
    budget: Mapping[str, float] | Budget | Sequence[Budget] = (),
    importance: str | Scores = "l2",
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
      inputs: one batch of examples; data where `repaired` or "activation" read them, else shapes.
      macs_ratio: share of the multiply-adds that remains; the same as budget={"macs": ...}.
      budget: limits by name ("macs", "parameters", "parameter_bytes", "activation_bytes": a share
        up to 1, or absolute), or Budgets of your own (a latency). All hold.
      importance: which units of a group stay: "l1", "l2", "scale", "activation", or scores of your
        own ("taylor" needs a loss: `jaxfm.search.ranking`).
      channel_multiple: groups keep multiples of it, or all.
      ignore: patterns over the paths of parameters, or their axes ("path:0"), that stay whole. Name
        the rows of a table that one-hot rows are multiplied with: they are units like others.
      strategy: `(problem) -> Strategy`, such as `lambda p: nsga2(p.sizes)`; None cuts all groups
        alike.
      score: for a strategy: `(run, params) -> f32[]`, higher is better; `run(params, *inputs)`
        is a masked candidate; jittable.
      evaluations: candidates that the strategy may try.
      key: of the search.
      repaired: least squares on `inputs` (`jaxfm.search.least_squares`).
    Raises:
      ValueError: no budget, one that cannot be met, two for multiply-adds, a macs_ratio that is no
        share, an unknown name, a strategy without a score or one that is no function, a score that
        is no scalar, importance of other shapes than the groups, shapes where data are read,
        something to ignore that is not there or in a network that has been read.
    """
    if strategy is not None and not callable(strategy):
        raise ValueError("`strategy` is a function of the problem: lambda p: nsga2(p.sizes), say.")
    if (strategy is None) != (score is None):
        raise ValueError("Give `strategy` and `score` together, or neither: cut all groups alike.")
    if isinstance(importance, str) and importance == "taylor":
        raise ValueError(
            "importance='taylor' needs a loss: give the scores of "
            "`jaxfm.search.importance(network, params, 'taylor', gradient=...)`."
        )
    reads = repaired or (isinstance(importance, str) and importance == "activation")
    if reads and any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(inputs)):
        raise ValueError("importance='activation' and `repaired` read the inputs: give data.")
    if isinstance(function, Network) and ignore:
        raise ValueError(f"ignore={ignore!r}: the network has been read; ignore it there.")
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


def pruned(network: Network, params: PyTree, kept: Kept, result: Result | None = None) -> Pruned:
    """The Pruned of given units."""
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
            raise ValueError(f"macs_ratio={macs_ratio}: give a share, above 0 and up to 1.")
        named["macs"] = float(macs_ratio)
    limits = budgets(own, **named)
    if isinstance(budget, Budget):
        budget = (budget,)
    limits = limits if isinstance(budget, Mapping) else (*limits, *budget)
    if not limits:
        raise ValueError("Give macs_ratio=0.5, or budget={'parameters': 0.3}, say.")
    return limits


def _order(own: Network, params: PyTree, kind: str | Scores, inputs: Sequence[PyTree]) -> Scores:
    if not isinstance(kind, str):
        wanted = [mask.shape for mask in full(own)]
        given = dict(kind) if isinstance(kind, Mapping) else list(map(np.shape, kind))
        if given != wanted:
            what = f"a dict of {list(given)}" if isinstance(given, dict) else f"of shapes {given}"
            raise ValueError(
                f"importance: the scores are {what}; give a tuple of shapes {wanted}, in the order "
                "of `network.groups`."
            )
        return ranks(tuple(map(jnp.asarray, kind)))
    data = inputs if kind == "activation" else ()
    return jax.jit(lambda p, x: ranks(importance(own, p, kind, inputs=x)))(params, data)


def _scorer(own: Network, order: Scores, score: Score | None) -> Callable[[PyTree, Array], Array]:
    dense = masked(own)

    def evaluate(params: PyTree, counts: Array) -> Array:
        assert score is not None

        def one(counts: Array) -> Array:
            own_masks = masks(order, counts)
            value = score(lambda p, *x: dense(p, own_masks, *x), params)
            if np.shape(value):
                raise ValueError(f"`score` gives shape {np.shape(value)}: give one number.")
            return jnp.asarray(value)

        return jax.vmap(one)(counts)

    return evaluate


def save_pruned(folder: str | os.PathLike, model: Pruned, *inputs: PyTree) -> None:
    """Writes parameters (safetensors), a manifest of kept units, and the program (StableHLO).

    `model.stablehlo` holds the program at the shapes of `inputs` (those of the network's example by
    default), of `(what params.safetensors holds, *inputs)`; `jax.export.deserialize` runs it
    without this library and without the model's own code.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    leaves = jax.tree.leaves(model.params)
    named = zip(model.network.leaves, leaves, strict=True)
    save_file({leaf.path: _stored(x) for leaf, x in named}, folder / "params.safetensors")
    manifest = {
        "groups": {
            group.name: [np.flatnonzero(row).tolist() for row in np.atleast_2d(mask)]
            for group, mask in zip(model.network.groups, model.kept, strict=True)
        },
        "dense": {leaf.path: list(leaf.shape) for leaf in model.network.leaves},
        "ignored": [name for name, why in model.network.frozen.items() if why == IGNORED],
        "costs": model.table(),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    inputs = inputs or model.network.example
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), inputs)
    order = [leaf.path for leaf in model.network.leaves]
    treedef = model.network.treedef

    def from_file(tensors: Mapping[str, Array], *inputs: PyTree) -> PyTree:
        leaves = [_restored(x, tensors[x.path]) for x in model.network.leaves]
        return model.apply(jax.tree.unflatten(treedef, leaves), *inputs)

    held = {path: jnp.asarray(_stored(x)) for path, x in zip(order, leaves, strict=True)}
    program = export.export(jax.jit(from_file))(held, *shapes)
    (folder / "model.stablehlo").write_bytes(program.serialize())


def _stored(leaf: Any) -> np.ndarray:
    """As it is written: of random keys the words."""
    key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if key else leaf)


def _restored(leaf: Leaf, stored: Any) -> Array:
    key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.wrap_key_data(stored) if key else jnp.asarray(stored)


def load_pruned(
    folder: str | os.PathLike, function: Callable | Network, like: PyTree, *inputs: PyTree
) -> Pruned:
    """Reads what `save_pruned` wrote, to go on with it: evaluate, fine-tune, prune again.

    Args:
      function: the dense function, or its Network.
      like: dense parameters or their shapes, for the structure.
      inputs: an example, as `network` takes it.
    Raises:
      FileNotFoundError: no such folder.
      ValueError: the manifest is of another network.
    """
    folder = pathlib.Path(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    ignore = [glob.escape(name) for name in manifest["ignored"]]
    own = (
        function
        if isinstance(function, Network)
        else network(function, like, *inputs, ignore=ignore)
    )
    dense = {leaf.path: list(leaf.shape) for leaf in own.leaves}
    if dense != manifest["dense"]:
        raise ValueError(f"{folder} holds another network: its parameters are {manifest['dense']}.")
    names = [group.name for group in own.groups]
    if names != list(manifest["groups"]):
        raise ValueError(
            f"{folder} was cut along {list(manifest['groups'])}, this network has {names}; give "
            "the Network that was cut."
        )
    kept = []
    for group, rows in zip(own.groups, manifest["groups"].values(), strict=True):
        mask = np.zeros((len(rows), group.size), bool)
        for own_row, index in zip(mask, rows, strict=True):
            own_row[index] = True
        kept.append(mask if group.layers else mask[0])
    tensors = load_file(folder / "params.safetensors")
    params = jax.tree.unflatten(own.treedef, [_restored(x, tensors[x.path]) for x in own.leaves])
    return Pruned(params, sliced(own, tuple(kept)), tuple(kept), own)
