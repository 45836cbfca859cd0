"""Low-rank adapters: LoRA and DoRA.

    LoRA:  W + (alpha / r) A B
    DoRA:  m (W + (alpha / r) A B) / ‖W + (alpha / r) A B‖

with A [inputs, r] drawn at random, B [r, outputs] zero, and m the norms of the columns of W, so
that a fresh adapter changes nothing. With `rank_stabilized` the scale is alpha / sqrt(r).
Sources: Hu et al. 2021 (LoRA), section 4.1; Liu et al. 2024 (DoRA), equation 5; Kalajdzievski 2023
(rsLoRA), theorem 3.2.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxfm.adapters.adapter import Kind, Site, adapt, fetch, leaf_paths
from jaxfm.adapters.targets import choose, dotted, is_trained_by, matches, rank_at
from jaxfm.kernels import Dora, LowRank, at_least_float32, whole
from jaxfm.model import Array, Key, Model, PyTree
from jaxfm.trees import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankConfig:
    """A low-rank adapter, as it is written beside its parameters.

    Attributes:
      kind: "lora" or "dora".
      rank: r of all targets but those of `ranks`.
      alpha: the numerator of the scale.
      targets: dotted names of the linear maps that are changed.
      ranks: r by pattern, where it differs.
      rank_stabilized: whether the scale is alpha / sqrt(r).
      dropout: of the inputs of A in training.
      trained: patterns of the model's own parameters that are trained, too.
    """

    kind: str = "lora"
    rank: int = 8
    alpha: float
    targets: tuple[str, ...]
    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    rank_stabilized: bool = False
    dropout: float = 0.0
    trained: tuple[str, ...] = ()

    def scale(self, rank: int) -> float:
        """The factor on A B."""
        return self.alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def lora(
    model: Model,
    rank: int = 8,
    *,
    targets: str | Sequence[str] = "attention",
    alpha: float | None = None,
    dropout: float = 0.0,
    rank_stabilized: bool = False,
    ranks: Mapping[str, int] | None = None,
    trained: str | Sequence[str] = (),
) -> Model:
    """Returns the model with a low-rank adapter beside some of its kernels, and all else frozen.

    Args:
      model: any; linear maps of our own families multiply by A and B in turn, others by W + A B.
      rank: r.
      targets: which kernels, see `jaxfm.adapters.choose`.
      alpha: over r it is the factor on A B; None: the rank.
      dropout: probability that an input of A is dropped in training.
      rank_stabilized: whether alpha is divided by sqrt(r).
      ranks: r by pattern, where it differs.
      trained: patterns of the model's own parameters that are trained, too, such as "head.*".
    Raises:
      ValueError: settings out of range, or patterns without a match.
    """
    return _low_rank(
        model, "lora", rank, targets, alpha, dropout, rank_stabilized, ranks or {}, trained
    )


def dora(
    model: Model,
    rank: int = 8,
    *,
    targets: str | Sequence[str] = "attention",
    alpha: float | None = None,
    dropout: float = 0.0,
    rank_stabilized: bool = False,
    ranks: Mapping[str, int] | None = None,
    trained: str | Sequence[str] = (),
) -> Model:
    """Returns the model with DoRA adapters: `lora`, and a trained norm of each column."""
    return _low_rank(
        model, "dora", rank, targets, alpha, dropout, rank_stabilized, ranks or {}, trained
    )


def pairs(params: PyTree) -> dict[Path, tuple[Array, Array]]:
    """Returns (A, B) of every low-rank adapter in a tree, by the path of its dict."""
    ends = [path[:-1] for path in leaf_paths(params) if path[-1] == "a"]
    return {path: (fetch(params, path)["a"], fetch(params, path)["b"]) for path in ends}


def _low_rank(
    model: Model, kind: str, rank: int, targets, alpha, dropout, rank_stabilized, ranks, trained
) -> Model:
    sites = choose(model, targets)
    for site in sites:
        _check_rank(site, rank_at(site, rank, ranks))
    alpha = float(rank if alpha is None else alpha)
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha={alpha}: give a finite number above 0.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: give a probability from 0 and below 1.")
    for pattern in ranks:
        if not any(matches(dotted(site.path), pattern) for site in sites):
            names = ", ".join(dotted(site.path) for site in sites)
            raise ValueError(f"ranks has {pattern!r}, which matches none of the targets {names}.")
    config = LowRankConfig(
        kind=kind, rank=rank, alpha=alpha, targets=tuple(dotted(site.path) for site in sites),
        ranks=dict(ranks), rank_stabilized=rank_stabilized, dropout=dropout,
        trained=(trained,) if isinstance(trained, str) else tuple(trained),
    )  # fmt: skip
    return adapt(model, _kind(config), sites, is_trained_by(model, config.trained), config)


def _kind(config: LowRankConfig) -> Kind:
    has_norms = config.kind == "dora"

    def rank_of(site: Site) -> int:
        return rank_at(site, config.rank, config.ranks)

    def axes(site: Site) -> dict[str, tuple]:
        layers, inputs, outputs = site.parts
        rank = rank_of(site)
        # Kernels of one rank share the axis, so that a subnet cuts all of them.
        own = "rank" if rank == config.rank else f"rank_{rank}"
        names = {"a": (*layers, *inputs, own), "b": (*layers, own, *outputs)}
        return names | ({"magnitude": (*layers, *outputs)} if has_norms else {})

    def fresh(site: Site, kernel: Any, key: Key) -> dict[str, Array]:
        layers, inputs, outputs = site.sizes
        rank, dtype = rank_of(site), at_least_float32(site.dtype)
        bound = math.prod(inputs) ** -0.5
        a = jax.random.uniform(key, (*layers, *inputs, rank), dtype, -bound, bound)
        parts = {"a": a, "b": jnp.zeros((*layers, rank, *outputs), dtype)}
        if has_norms:
            along = range(len(layers), len(layers) + len(inputs))
            square = jnp.square(whole(kernel).astype(dtype)).sum(along)
            parts["magnitude"] = jnp.sqrt(square)
        return parts

    def node(site: Site, kernel: Any, parts: Mapping[str, Array], key: Key | None):
        if key is not None:
            stacked = parts["a"].ndim + parts["b"].ndim - len(kernel.shape) == 3
            key = jax.random.split(key, parts["a"].shape[0]) if stacked else key
        low = LowRank(
            kernel, parts["a"], parts["b"], key if config.dropout else None,
            scale=config.scale(rank_of(site)), dropout=config.dropout,
        )  # fmt: skip
        return Dora(low, parts["magnitude"]) if has_norms else low

    return Kind(config.kind, axes, fresh, node)


def _check_rank(site: Site, rank: int) -> None:
    _, inputs, outputs = site.sizes
    most = min(math.prod(inputs), math.prod(outputs))
    if not 1 <= rank <= most:
        raise ValueError(
            f"rank={rank} at {dotted(site.path)}: give a rank from 1 to {most}, the smaller side "
            f"of a kernel of {math.prod(inputs)} by {math.prod(outputs)}."
        )
