"""Averaging of models with low-rank adapters: all but the one function in which methods differ.

A client's factors change a kernel by s A_i B_i, and federated averaging of the kernel itself would
change it by

    M = sum_i p_i s A_i B_i,   p_i = n_i / sum n

which is not s (sum p_i A_i)(sum p_i B_i). What a server makes of the factors of a round is a
`Rule`: the factors that go on, and what the kernel takes up. Each round reports how far that is
from M,

    aggregation_error = ‖what was applied - M‖ / ‖M‖,   Frobenius, over all adapted kernels

computed of the factors, or of the kernels themselves where these change, so that the rounding of
their dtype is seen. What is trained beside the factors, a head say, is averaged as always.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.federated.algorithm import (
    Algorithm,
    Bucket,
    ClientData,
    Exact,
    Known,
    Mean,
    Profile,
    Stacked,
    anybody,
    full_width,
    mean,
    weighted,
)
from jaxfm.federated.averaging import Movement, difference, moved
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
    without_kernels,
)
from jaxfm.federated.parts.factors import Pair, Stack, closest, length, minus, plus
from jaxfm.kernels import LowRank
from jaxfm.model import Array, Key, Model, PyTree, Variables
from jaxfm.subnet import Subnet, axis_sizes, extract
from jaxfm.tasks import Task
from jaxfm.trees import split_tree

# (the factors before the round, those of its clients, key) -> (the factors after it, what the
# kernel takes up; None: nothing), for one layer.
Rule = Callable[[Pair, Stack, Key], tuple[Pair, Pair | None]]


class LowRankState(NamedTuple):
    """The model, and by name of the site in 32 bits the kernels of 16 that take something up."""

    variables: Variables
    masters: dict[str, Array]


class Download(NamedTuple):
    """What a client gets.

    Attributes:
      variables: without what is below; frozen parameters travel once.
      kernels: by name of the site what has changed of a kernel: the kernel itself, or the factors
        of a remainder beside it.
      drawn: factors that a client draws from a seed, as the server does; else none.
    """

    variables: Variables
    kernels: dict[str, Any]
    drawn: Known


class Totals(NamedTuple):
    """What is summed, and by name of the site the factors of all clients [n, layers, ...]."""

    rest: Mean
    stacks: Stacked


class _Method(NamedTuple):
    """How a method differs from plain averaging; see `low_rank_averaging`."""

    sites: tuple[Site, ...]
    dtypes: dict[str, Any]  # of kernels
    rule: Rule
    folds: bool
    remainder: int
    draw: Callable[[Pair, Key], Pair] | None


def low_rank_averaging(
    model: Model,
    task: Task,
    local: Local,
    rule: Rule,
    *,
    who: str,
    ranks: Sequence[int] = (),
    folds: bool = False,
    remainder: int = 0,
    draw: Callable[[Pair, Key], Pair] | None = None,
) -> Algorithm:
    """Returns the algorithm of a rule.

    Uploads are those of `fed_avg`, so that what compresses or clips movements works on them, too.
    The server stacks them, which is no sum: they cannot be added up in secret.

    Args:
      model: with a low-rank adapter.
      task, local: as in `fed_avg`.
      rule: what the server makes of the factors of a round.
      who: the algorithm, for messages.
      ranks: of clients' adapters, one bucket each; a client holds the first columns of A and rows
        of B. (): all of them hold the whole adapter.
      folds: whether kernels take up what the rule gives them. They then travel in every round,
        since a client may have missed any number of rounds before.
      remainder: rank to which what kernels take up is kept beside them; the factors travel in
        every round, and the kernel itself once.
      draw: `(factors, key) -> factors`, which clients draw anew in each round, and which do not
        travel; the product of those before the first round goes into the kernels.
    Raises:
      ValueError: no low-rank adapter, a rank that no site has, or kernels that cannot change.
    """
    sites = sites_of(model, who)
    check_frozen(model, sites, who, folds=folds)
    frozen = jax.eval_shape(model.init, jax.random.key(0)).frozen
    dtypes = {name: kernel.dtype for name, kernel in kernels_in(sites, frozen).items()}
    method = _Method(sites, dtypes, rule, folds, remainder, draw)
    _check(method, ranks)
    fit = local_fit(objective(model, task), local)
    cuts: list[Subnet | None] = [_cut(model, rank) for rank in sorted(ranks)[::-1]]

    def bucket(cut: Subnet | None) -> Bucket:
        def own(variables: Variables) -> Variables:
            if cut is None:
                return variables
            return variables._replace(params=extract(variables.params, model.axes.params, cut))

        def client(download: Download, memory, data: ClientData, profile: Profile, key: Key):
            start = _arrived(method, download)
            trained, info = fit(start, data, profile.max_steps, key)
            return weighted(info.examples, difference(trained, start)), memory, info

        return Bucket(
            model,
            send=lambda server, public: _sent(method, own(server.variables)),
            client=client,
            combine=lambda server, received, counted: _stacked(
                method.sites, own(server.variables).params, received
            ),
            shared=lambda server: own(server.variables),
        )

    init = lambda variables: _begun(method, variables)
    server = lambda state, totals, public, key: _applied(method, state, totals, key)
    buckets = tuple(map(bucket, cuts or [None]))
    return Algorithm(init, buckets, server, model, is_nested=len(buckets) > 1)


def _begun(method: _Method, variables: Variables) -> LowRankState:
    sites, kernels = method.sites, kernels_in(method.sites, variables.frozen)
    factors, masters = factors_in(sites, variables.params), {}
    for number, site in enumerate(sites):
        name = site.name
        if method.draw is not None:
            kernels[name] = absorbed(site, kernels[name], factors[name])
            keys = jax.random.split(jax.random.key(number), site.layers)
            factors[name] = site.shaped(jax.vmap(method.draw)(site.matrices(factors[name]), keys))
        if method.folds and kernels[name].dtype.itemsize < 4:
            masters[name] = full_width(kernels[name])
        if method.remainder and not isinstance(kernels[name], LowRank):
            rest = site.shaped(site.zeros(method.remainder))
            kernels[name] = LowRank(kernels[name], rest.a, rest.b, scale=site.scale)
    params = with_factors(sites, variables.params, factors)
    frozen = with_kernels(sites, variables.frozen, kernels)
    return LowRankState(variables._replace(params=params, frozen=frozen), masters)


def _sent(method: _Method, variables: Variables) -> Download:
    sites, kernels, drawn = method.sites, kernels_in(method.sites, variables.frozen), {}
    if method.folds:
        variables = variables._replace(frozen=without_kernels(sites, variables.frozen))
    elif method.remainder:
        inner = {name: kernel.kernel for name, kernel in kernels.items()}
        kernels = {name: Pair(kernel.a, kernel.b) for name, kernel in kernels.items()}
        variables = variables._replace(frozen=with_kernels(sites, variables.frozen, inner))
    else:
        kernels = {}
    if method.draw is not None:
        drawn = factors_in(sites, variables.params)
        params, _ = split_tree(variables.params, is_factor(sites))
        variables = variables._replace(params=params)
    return Download(variables, kernels, Known(drawn))


def _arrived(method: _Method, download: Download) -> Variables:
    sites, variables, kernels = method.sites, download.variables, download.kernels
    if method.remainder:
        inner, scale = kernels_in(sites, variables.frozen), {s.name: s.scale for s in sites}
        kernels = {
            name: LowRank(inner[name], a, b, scale=scale[name]) for name, (a, b) in kernels.items()
        }
    if method.folds:  # whoever keeps masters of 32 bits has widened what is no `Variables`
        kernels = {name: kernel.astype(method.dtypes[name]) for name, kernel in kernels.items()}
    if kernels:
        variables = variables._replace(frozen=with_kernels(sites, variables.frozen, kernels))
    if method.draw is not None:
        params = with_factors(sites, variables.params, download.drawn.value)
        variables = variables._replace(params=params)
    return variables


def _stacked(sites: Sequence[Site], start: PyTree, received: Mean) -> Totals:
    """What a bucket's clients have uploaded, side by side, in the coordinates of all buckets.

    Args:
      start: parameters that they started from.
      received: leaves [n, ...]; zeros where a client does not count.
    """
    weight = received.den.value.astype(jnp.float32)
    params, stats = received.num
    rest, _ = split_tree(params, is_factor(sites))
    before, steps, stacks = factors_in(sites, start), factors_in(sites, params), {}
    for site in sites:

        def ended(x: Array, step: Array) -> Array:
            by_client = lambda w: w.reshape(-1, *[1] * x.ndim)
            moved = full_width(x)[None] + step / by_client(jnp.where(weight > 0, weight, 1))
            return jnp.where(by_client(weight) > 0, moved, 0)

        pair = jax.vmap(site.matrices)(jax.tree.map(ended, before[site.name], steps[site.name]))
        more = site.rank - pair.a.shape[-1]
        held = (weight[:, None] > 0) & (jnp.arange(site.rank) < pair.a.shape[-1])[None]
        a = jnp.pad(pair.a, [(0, 0)] * 3 + [(0, more)])
        b = jnp.pad(pair.b, [(0, 0)] * 2 + [(0, more), (0, 0)])
        stacks[site.name] = Stack(a, b, weight, held.astype(jnp.float32))
    sums = jax.tree.map(lambda x: x.sum(0), Movement(rest, stats))
    return Totals(Mean(sums, Exact(weight.sum())), Stacked(stacks))


def _applied(method: _Method, state: LowRankState, totals: Totals, key: Key):
    sites, variables = method.sites, state.variables
    came = anybody(totals.rest.den)
    rest, _ = split_tree(variables.params, is_factor(sites))
    rest = moved(variables._replace(params=rest), mean(totals.rest))
    before = factors_in(sites, variables.params), kernels_in(sites, variables.frozen)
    factors, kernels, masters = dict(before[0]), dict(before[1]), dict(state.masters)
    square_gap = square = jnp.zeros((), jnp.float32)
    for number, site in enumerate(sites):
        name, stack = site.name, totals.stacks.value[site.name]
        total = stack.share.sum()
        stack = stack._replace(share=stack.share / jnp.where(total > 0, total, 1))
        keys = jax.random.split(jax.random.fold_in(key, number), site.layers)
        by_layer = Stack(1, 1, None, None)  # type: ignore[arg-type]
        pair = site.matrices(jax.tree.map(full_width, factors[name]))
        new, taken = jax.vmap(method.rule, in_axes=(0, by_layer, 0))(pair, stack, keys)
        change = None
        if taken is not None:
            kernels[name], masters, change = _taken_up(method, site, kernels[name], masters, taken)
        gap, size = jax.vmap(_distance, in_axes=(by_layer, 0, 0))(stack, new, change)
        square_gap += site.scale**2 * jnp.square(gap).sum()
        square += site.scale**2 * jnp.square(size).sum()
        dtype = factors[name].a.dtype
        factors[name] = jax.tree.map(lambda x, d=dtype: x.astype(d), site.shaped(new))
    after = factors, kernels, masters
    after = jax.tree.map(lambda a, b: jnp.where(came, a, b), after, (*before, state.masters))
    params = with_factors(sites, rest.params, after[0])
    frozen = with_kernels(sites, variables.frozen, after[1])
    error = jnp.where(came & (square > 0), jnp.sqrt(square_gap / square), 0)
    state = LowRankState(rest._replace(params=params, frozen=frozen), after[2])
    return state, {"aggregation_error": error}


def _taken_up(method: _Method, site: Site, kernel: Any, masters: dict, taken: Pair):
    """Returns a kernel with what it takes up, the masters, and by how much it changed over s."""
    if method.remainder:
        old = site.matrices(Pair(kernel.a, kernel.b))
        fit = lambda old, taken: closest(plus(old, taken), method.remainder)
        new = jax.vmap(fit)(old, taken)
        shaped = site.shaped(new)
        change = jax.vmap(lambda new, old: plus(new, minus(old)))(new, old)
        return dataclasses.replace(kernel, a=shaped.a, b=shaped.b), masters, change
    wide = masters.get(site.name, kernel)
    after = wide + site.scale * (taken.a @ taken.b).reshape(wide.shape)
    change = (after - wide).reshape(site.layers, taken.a.shape[1], -1) / site.scale
    if site.name in masters:
        masters = masters | {site.name: after}
    return after.astype(kernel.dtype), masters, change


def _distance(stack: Stack, new: Pair, change: Any) -> tuple[Array, Array]:
    """(‖new + change - mean‖, ‖mean‖) of one layer, without s."""
    wanted = stack.product(stack.share[:, None])
    if isinstance(change, jax.Array):
        gap = jnp.linalg.norm(wanted.a @ wanted.b - new.a @ new.b - change)
    else:
        others = [minus(new)] + ([] if change is None else [minus(change)])
        gap = length(plus(wanted, *others))
    return gap, length(wanted)


def _cut(model: Model, rank: int) -> Subnet:
    """The first `rank` columns of A and rows of B, at sites of whatever rank."""
    params = jax.eval_shape(model.init, jax.random.key(0)).params
    sizes = axis_sizes(params, model.axes.params)
    names = [name for name in sizes if name == "rank" or name.startswith("rank_")]
    return Subnet({name: np.arange(min(rank, sizes[name])) for name in names})


def _check(method: _Method, ranks: Sequence[int]) -> None:
    most = max(site.rank for site in method.sites)
    for rank in ranks:
        if not 1 <= rank <= most:
            raise ValueError(f"ranks={tuple(ranks)}: give ranks from 1 to the adapter's, {most}.")
    if len(set(ranks)) < len(ranks):
        raise ValueError(f"ranks={tuple(ranks)} has a rank twice; give each once.")
    for site in method.sites:
        if not 0 <= method.remainder <= site.side:
            raise ValueError(
                f"remainder={method.remainder}: give a rank from 0 to {site.side}, the smaller "
                f"side of the kernel of {site.name}."
            )
