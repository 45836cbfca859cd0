"""Where the low-rank adapters of a model stand, and their factors and kernels by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfm.adapters import pairs
from jaxfm.adapters.adapter import beside, fetch
from jaxfm.federated.algorithm import full_width
from jaxfm.federated.parts.factors import Pair
from jaxfm.kernels import Kernel, LowRank, product
from jaxfm.model import Array, Model, PyTree
from jaxfm.trees import Path, join_tree, split_tree


class Site(NamedTuple):
    """Where a low-rank adapter stands.

    Attributes:
      path: of its dict, ("layers", "attention", "q", "lora").
      scale: s.
      a, b: shapes of the factors, [*layers, *inputs, rank] and [*layers, rank, *outputs].
      is_stacked: whether there is an axis of layers.
    """

    path: Path
    scale: float
    a: tuple[int, ...]
    b: tuple[int, ...]
    is_stacked: bool

    @property
    def name(self) -> str:
        return ".".join(self.path[:-1])

    @property
    def rank(self) -> int:
        return self.a[-1]

    @property
    def layers(self) -> int:
        return self.a[0] if self.is_stacked else 1

    @property
    def sides(self) -> tuple[int, int]:
        """Inputs and outputs of one layer's kernel."""
        inputs, outputs = (
            math.prod(shape) // self.rank // self.layers for shape in (self.a, self.b)
        )
        return inputs, outputs

    @property
    def side(self) -> int:
        """The largest rank of its kernel."""
        return min(self.sides)

    def zeros(self, rank: int) -> Pair:
        """Factors of a rank as `matrices`, all zero."""
        inputs, outputs = self.sides
        return Pair(jnp.zeros((self.layers, inputs, rank)), jnp.zeros((self.layers, rank, outputs)))

    def matrices(self, pair: Pair) -> Pair:
        """Factors of any rank as [layers, in, rank] and [layers, rank, out]."""
        rank = pair.a.shape[-1]
        return Pair(pair.a.reshape(self.layers, -1, rank), pair.b.reshape(self.layers, rank, -1))

    def shaped(self, pair: Pair) -> Pair:
        """The inverse of `matrices`."""
        return Pair(pair.a.reshape(*self.a[:-1], pair.a.shape[-1]), self.shaped_b(pair.b))

    def shaped_b(self, b: Array) -> Array:
        """B of `matrices` in its own shape."""
        first = int(self.is_stacked)
        return b.reshape(*self.b[:first], b.shape[1], *self.b[first + 1 :])


def sites_of(model: Model, who: str) -> tuple[Site, ...]:
    """Returns where the low-rank adapter of a model stands.

    Args:
      who: the algorithm that asks.
    Raises:
      ValueError: the model has no adapter, or one that is not low-rank.
    """
    config: Any = None if model.adapter is None else model.adapter.config
    if getattr(config, "kind", "") not in ("lora", "dora"):
        raise ValueError(
            f"{who} aggregates low-rank adapters; put one around the model, such as "
            "`lora(model, rank=8)`, or on the command line --adapter=lora."
        )
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    whole = join_tree(shapes.params, shapes.frozen)
    sites = []
    for path, (a, b) in pairs(whole).items():
        kernel = fetch(whole, (*path[:-1], "kernel"))
        is_stacked = a.ndim + b.ndim - len(kernel.shape) == 3
        sites.append(Site(path, config.scale(a.shape[-1]), a.shape, b.shape, is_stacked))
    return tuple(sites)


def check_frozen(model: Model, sites: Sequence[Site], who: str, *, folds: bool = False) -> None:
    """Checks that kernels of sites are frozen, and of those that are added to that they are arrays.

    Args:
      who: the algorithm that asks.
      folds: whether it adds to them.
    Raises:
      ValueError: one is not.
    """
    frozen = jax.eval_shape(model.init, jax.random.key(0)).frozen
    for site in sites:
        try:
            kernel = fetch(frozen, (*site.path[:-1], "kernel"))
        except KeyError:
            raise ValueError(
                f"{who} needs the kernel of {site.name} frozen; leave it out of `trained`."
            ) from None
        if folds and isinstance(kernel, Kernel):
            raise ValueError(
                f"{who} adds to the kernel of {site.name}, which is a {type(kernel).__name__} and "
                "no array; use fed_ex_lora with remainder=RANK."
            )


def is_factor(sites: Sequence[Site], names: Sequence[str] = "ab") -> Callable[[Path], bool]:
    """Returns which leaves are factors of the sites: A, B or both."""
    dicts = {site.path for site in sites}
    return lambda path: path[:-1] in dicts and path[-1] in names


def factors_in(sites: Sequence[Site], tree: PyTree) -> dict[str, Pair]:
    """Returns the factors of each site by its name."""
    found = {site.name: fetch(tree, site.path) for site in sites}
    return {name: Pair(own["a"], own["b"]) for name, own in found.items()}


def with_factors(sites: Sequence[Site], tree: PyTree, factors: dict[str, Pair]) -> PyTree:
    """Returns the tree with these factors in the place of its own, if it has any."""
    own = {site.path: factors[site.name]._asdict() for site in sites}
    rest, _ = split_tree(tree, is_factor(sites))
    return join_tree(rest, beside(own, sites[0].path[-1]))


def kernels_in(sites: Sequence[Site], tree: PyTree) -> dict[str, Any]:
    """Returns the kernel of each site by its name."""
    return {site.name: fetch(tree, site.path[:-1])["kernel"] for site in sites}


def without_kernels(sites: Sequence[Site], tree: PyTree) -> PyTree:
    """Returns the tree without the kernels of the sites."""
    kernels = {(*site.path[:-1], "kernel") for site in sites}
    return split_tree(tree, lambda path: path in kernels)[0]


def with_kernels(sites: Sequence[Site], tree: PyTree, kernels: dict[str, Any]) -> PyTree:
    """Returns the tree with these kernels in the place of its own, if it has any."""
    own = {site.path: kernels[site.name] for site in sites}
    return join_tree(without_kernels(sites, tree), beside(own, "kernel"))


def absorbed(site: Site, kernel: Array | Kernel, pair: Pair) -> Array | Kernel:
    """Returns the kernel with an adapter's product in it, or beside it if it is no array."""
    if isinstance(kernel, Kernel):
        return LowRank(kernel, pair.a, pair.b, scale=site.scale)
    added = site.scale * full_width(product(pair.a, pair.b, kernel.ndim))
    return (full_width(kernel) + added).astype(kernel.dtype)
