"""Fed-SB: between two frozen factors a core of r x r numbers is trained, and nothing else travels.

    W + s A R B,   R <- sum_i p_i R_i,   and so   sum_i p_i s A R_i B = s A (sum_i p_i R_i) B

exactly. R begins at zero, so that nothing changes at first. A and B are the leading singular
vectors of a gradient of the loss with respect to the kernel (`gradient_basis`), as in the paper, or
of the kernel itself, which takes no data (LoRA-XS). They travel once, with the backbone. The server
holds B as R B, so that its model is the adapted one.
Sources: Singhal et al. 2025 (Fed-SB), section 3; Ponkshe et al. 2024 (LoRA-SB), section 3; Balazy
et al. 2024 (LoRA-XS), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfm.adapters.adapter import beside, fetch
from jaxfm.federated.algorithm import Algorithm, Bucket, Mean, mean
from jaxfm.federated.averaging import averaging_client, moved
from jaxfm.federated.local import Local, local_fit, objective
from jaxfm.federated.parts.adapter_sites import (
    Site,
    absorbed,
    check_frozen,
    factors_in,
    is_factor,
    kernels_in,
    sites_of,
    with_factors,
    with_kernels,
)
from jaxfm.federated.parts.factors import Pair
from jaxfm.federated.registry import register
from jaxfm.kernels import whole
from jaxfm.model import Array, Key, Model, Variables
from jaxfm.tasks import Task, prepare_weighted
from jaxfm.trees import join_tree, split_tree

# (variables, sites) -> the matrix [layers, in, out] of each site, by its name, whose singular
# vectors are the frozen factors.
Basis = Callable[[Variables, tuple[Site, ...]], Mapping[str, Array]]


class FedSbState(NamedTuple):
    """The adapted model, its cores [layers, r, r], and B [layers, r, out], by name of the site."""

    variables: Variables
    cores: dict[str, Array]
    rows: dict[str, Array]


def of_kernels(variables: Variables, sites: tuple[Site, ...]) -> dict[str, Array]:
    """The basis of the kernels themselves."""
    kernels = kernels_in(sites, variables.frozen)
    shape = {site.name: (site.layers, *site.sides) for site in sites}
    return {name: whole(kernel).reshape(shape[name]) for name, kernel in kernels.items()}


def gradient_basis(model: Model, task: Task, examples: Mapping[str, Any], key: Key) -> Basis:
    """The basis of a gradient on rows that the server may see, the paper's first step.

    Args:
      model: with the adapter.
      task: with the loss.
      examples: a batch, its labels included.
      key: of what the task draws.
    """

    def basis(variables: Variables, sites: tuple[Site, ...]) -> dict[str, Array]:
        real = jnp.ones(len(jax.tree.leaves(dict(examples))[0]), jnp.float32)

        def loss(kernels: dict[str, Array]) -> Array:
            frozen = with_kernels(sites, variables.frozen, kernels)
            inputs, targets, weight = prepare_weighted(task, dict(examples), real, key)
            output, _ = model.apply(variables._replace(frozen=frozen), inputs)
            return task.loss(output, targets, weight)[0]

        gradient = jax.grad(loss)(kernels_in(sites, variables.frozen))
        return {s.name: gradient[s.name].reshape(s.layers, *s.sides) for s in sites}

    return basis


@register(
    like="fed_lora",
    adapted=True,
    breaks={"one_step": "A and B do not move, and R moves their product by another step."},
    basis=None,
)
def fed_sb(model: Model, task: Task, local: Local, *, basis: Basis = of_kernels) -> Algorithm:
    """Averaging of an r x r core between frozen factors.

    Partition: cores, and what is trained beside the adapter, are shared; the rest is frozen. An
    adapter that does something already goes into the kernels before the first round.

    Args:
      model: with a LoRA adapter.
      task, local: as in `fed_avg`.
      basis: whose singular vectors the frozen factors are: `of_kernels`, or `gradient_basis(...)`.
    Raises:
      ValueError: no low-rank adapter.
    """
    sites = sites_of(model, "fed_sb")
    check_frozen(model, sites, "fed_sb")
    kind = sites[0].path[-1]
    is_mine = is_factor(sites, ("a", "rows", "core"))

    def init(variables: Variables) -> FedSbState:
        factors, kernels = factors_in(sites, variables.params), kernels_in(sites, variables.frozen)
        kernels = {s.name: absorbed(s, kernels[s.name], factors[s.name]) for s in sites}
        variables = variables._replace(frozen=with_kernels(sites, variables.frozen, kernels))
        none = {site.name: site.shaped(site.zeros(site.rank)) for site in sites}
        still = variables._replace(params=with_factors(sites, variables.params, none))
        spans, cores, rows = basis(still, sites), {}, {}
        for site in sites:
            name, dtype = site.name, factors[site.name].a.dtype
            u, _, v = jnp.linalg.svd(spans[name].astype(jnp.float32), full_matrices=False)
            rows[name] = v[:, : site.rank].astype(dtype)
            cores[name] = jnp.zeros((site.layers, site.rank, site.rank), dtype)
            left = Pair(u[..., : site.rank].astype(dtype), jnp.zeros_like(rows[name]))
            factors[name] = site.shaped(left)
        params = with_factors(sites, variables.params, factors)
        return FedSbState(variables._replace(params=params), cores, rows)

    def cored(state: FedSbState) -> Variables:
        """What clients train: cores in the place of factors, which are frozen."""
        params, _ = split_tree(state.variables.params, is_factor(sites))
        a = {name: pair.a for name, pair in factors_in(sites, state.variables.params).items()}
        core = {site.path: {"core": state.cores[site.name]} for site in sites}
        fixed = {site.path: {"a": a[site.name], "rows": state.rows[site.name]} for site in sites}
        return state.variables._replace(
            params=join_tree(params, beside(core, kind)),
            frozen=join_tree(state.variables.frozen, beside(fixed, kind)),
        )

    def adapted(variables: Variables) -> Variables:
        """The model's own variables of those with cores."""
        params, _ = split_tree(variables.params, is_mine)
        frozen, _ = split_tree(variables.frozen, is_mine)
        factors = {}
        for site in sites:
            core = fetch(variables.params, site.path)["core"]
            fixed = fetch(variables.frozen, site.path)
            b = site.shaped_b(core @ fixed["rows"])
            factors[site.name] = Pair(fixed["a"], b)
        return variables._replace(params=with_factors(sites, params, factors), frozen=frozen)

    inner = model._replace(apply=lambda variables, *args, **options: model.apply(
        adapted(variables), *args, **options
    ))  # fmt: skip

    def server(state: FedSbState, totals: Mean, public, key: Key):
        after = moved(cored(state), mean(totals))
        cores = {site.name: fetch(after.params, site.path)["core"] for site in sites}
        figures = {"aggregation_error": jnp.zeros((), jnp.float32)}
        return FedSbState(adapted(after), cores, state.rows), figures

    fit = local_fit(objective(inner, task), local)
    bucket = Bucket(inner, lambda state, public: cored(state), averaging_client(fit), shared=cored)
    return Algorithm(init, (bucket,), server, model)
