"""RaFL: every client gets the member of a supernet that its machine can carry.

    member of tier t = argmax score(counts)  s.t.  cost_j(counts) <= min_{i in t} limit_ij,  all j
    rounds: mutual learning with the smallest member, which alone travels (`fed_kemf`)

Clients are grouped into a few tiers, one compiled program each; a tier's limits are the smallest of
its clients', so every client is within its own. Without public data the server averages (RaFL-(a));
with public data it averages and distils (RaFL-(e)).
Source: Yu et al. 2022 (arXiv 2211.05716), where a member is the first of random ones that fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm.data.federation import Federation, merge, select_clients
from jaxfm.federated.algorithm import Algorithm
from jaxfm.federated.algorithms.fed_kemf import fed_kemf
from jaxfm.federated.local import Local
from jaxfm.federated.parts.ensemble import Distill, Vote, distill_for, max_vote, vote_for
from jaxfm.federated.registry import Setting, register
from jaxfm.model import Array, Key, Model, Variables, count_parameters
from jaxfm.search.elastic.evolve import evolve
from jaxfm.search.elastic.supernet import Supernet, supernet
from jaxfm.search.recalibration import recalibrate
from jaxfm.search.strategies.project import Budget, within
from jaxfm.subnet import axis_sizes, extract
from jaxfm.tasks import Task

# (budgets of a tier, its clients i64[n]) -> counts i32[G]
Search = Callable[[Sequence[Budget], np.ndarray], np.ndarray]


class Members(NamedTuple):
    """Which member of a supernet each client of a population trains.

    Attributes:
      counts: i32[buckets, G], the counts of each bucket's member.
      assignment: i32[C], the bucket of each client.
      variables: by bucket, the weights that its clients' member starts from.
      smallest: those of the smallest member.
    """

    counts: np.ndarray
    assignment: np.ndarray
    variables: tuple[Variables, ...]
    smallest: Variables


def plan_members(
    net: Supernet,
    model: Model,
    budgets: Sequence[Budget],
    *,
    num_tiers: int = 3,
    search: Search | None = None,
    scratch: Key | None = None,
) -> Members:
    """Plans the members of a population's clients.

    Args:
      net: a supernet of `model`.
      model: its `apply` runs all members.
      budgets: costs of a member, each with limits f32[C], one a client (or one number for all).
      num_tiers: the most different members.
      search: picks the member of a tier, as `validation_search` does; None: shrinks uniformly.
      scratch: draw weights anew with this key, the smallest member's, too; None: all inherit the
        supernet's.
    Raises:
      ValueError: limits that are no arrays of one length, a client below the smallest member, a
        member outside of its tier's budgets, num_tiers below 1.
    """
    limits = client_limits(budgets)
    _check_reachable(net, budgets, limits)
    tier = tiers(_share(net, budgets, limits), num_tiers)
    search = _shrink(net) if search is None else search
    found = []
    for number in range(tier.max() + 1):
        clients = np.flatnonzero(tier == number)
        tightest = limits[clients].min(0).tolist()
        own = [b._replace(limit=limit) for b, limit in zip(budgets, tightest, strict=True)]
        found.append(_searched(search, own, clients))
    counts, of_tier = np.unique(np.stack(found), axis=0, return_inverse=True)
    source = net.variables if scratch is None else model.init(scratch)
    return Members(
        counts=counts,
        assignment=of_tier.reshape(-1)[tier].astype(np.int32),
        variables=tuple(net.extract(source, own) for own in counts),
        smallest=net.extract(source, net.smallest),
    )


def members_for(setting: Setting) -> Members:
    """The members of a run: of as many parameters as the tier that a client's machine holds."""
    model, full = setting.model, setting.variables
    sizes = axis_sizes(full, model.axes)
    shares = [len(kept) / sizes[name] for name, kept in setting.tiers[-1].keep.items()]
    net = supernet(model, full, setting.axes, smallest=min(0.5, *shares))
    floor = float(net.parameters(jnp.asarray(net.smallest, jnp.float32)))
    parameters = np.array(
        [count_parameters(extract(full, model.axes, tier).params) for tier in setting.tiers]
    )
    limits = np.maximum(parameters[setting.tier_of()], floor)
    budget = Budget("parameters", net.parameters, limits)
    return plan_members(net, model, [budget], num_tiers=len(setting.tiers))


_SUPERNET = {"statistics": "Members belong to a supernet, which has statistics of its own."}


@register(has_tiers=True, members=members_for, distill=distill_for, vote=vote_for, breaks=_SUPERNET)
def rafl(
    model: Model,
    task: Task,
    local: Local,
    members: Members,
    distill: Distill,
    *,
    vote: Vote | None = None,
    mutual: float = 1.0,
    average: bool = True,
) -> Algorithm:
    """Mutual learning of each client's member with the smallest one, which travels.

    Partition: the smallest member is shared, the clients' members are personal.

    Args:
      model: its `apply` runs all members.
      task, local, distill, vote, mutual, average: as in `fed_kemf`.
      members: of `plan_members`; one bucket a distinct member.
    Raises:
      ValueError: what `fed_kemf` raises.
    """
    algorithm = fed_kemf(
        _member(model, members.smallest), task, local,
        [_member(model, own) for own in members.variables], distill,
        vote=vote, mutual=mutual, average=average,
    )  # fmt: skip
    return algorithm._replace(assignment=members.assignment)


@register(
    like="fed_kemf", has_tiers=True, members=members_for, distill=distill_for, breaks=_SUPERNET
)
def rafl_published(
    model: Model, task: Task, local: Local, members: Members, distill: Distill, *,
    mutual: float = 1.0,
) -> Algorithm:  # fmt: skip
    """RaFL-(e) with the fusion of the authors' program, to explain its figures.

    The teacher is the maximum, and the loss `entropy_divergence`, which makes the student unsure
    of everything: there averaging alone was five points better. `rafl` minimises KL instead.

    Args:
      model, task, local, members, distill, mutual: as in `rafl`.
    """
    how = distill._replace(divergence=entropy_divergence)
    return rafl(model, task, local, members, how, vote=max_vote(), mutual=mutual)


def entropy_divergence(
    teacher: Array, student: Array, weight: Array, temperature: float = 1.0
) -> tuple[Array, Array]:
    """T² Σ_k s_k (log s_k - t_k), with s = softmax(student / T), t = softmax(softmax(teacher) / T).

    A KL with its arguments exchanged and probabilities t where logarithms belong; t is nearly
    uniform, so this is the student's negative entropy, up to a constant.
    """
    twice = jax.nn.softmax(jax.nn.softmax(teacher.astype(jnp.float32)) / temperature)
    log_s = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    value = (jnp.exp(log_s) * (log_s - twice)).sum(-1) * temperature**2
    return jnp.sum(jnp.where(weight > 0, value * weight, 0)), jnp.sum(weight)


def validation_search(
    net: Supernet,
    model: Model,
    task: Task,
    validation: Federation,
    key: Key,
    *,
    num_rows: int = 256,
    population: int = 16,
    generations: int = 8,
) -> Search:
    """Evolution on validation rows of a tier's clients, never on rows that they train or test on.

    The score is minus the loss of the masked member, a ratio of sums over clients; statistics are
    measured anew for each candidate on the same inputs.

    Args:
      validation: the clients' validation rows, as in `Population.local_validation`.
      num_rows: at most so many of a tier's rows, drawn at random.
      population, generations: of `evolve`.
    Raises:
      ValueError: from the search: a tier whose clients have no validation rows.
    """

    def search(budgets: Sequence[Budget], clients: np.ndarray) -> np.ndarray:
        rows = merge(select_clients(validation, clients))
        size = len(next(iter(rows.values())))
        if not size:
            raise ValueError(f"Clients {clients.tolist()} have no validation rows to select by.")
        rows_key, search_key = jax.random.split(jax.random.fold_in(key, int(clients[0])))
        some = np.asarray(jax.random.permutation(rows_key, size))[:num_rows]
        inputs, targets, weight = task.prepare({n: jnp.asarray(x[some]) for n, x in rows.items()})

        train = lambda v, x: model.apply(v, x, train=True)[1]

        def score(counts: Array) -> Array:
            member = recalibrate(train, net.mask(net.variables, counts), inputs[None])
            total, count = task.loss(model.apply(member, inputs)[0], targets, weight)
            return -total / jnp.where(count > 0, count, 1)

        measure = lambda counts: lax.map(score, counts)
        return evolve(
            net, measure, budgets, search_key, population=population, generations=generations
        )

    return search


def tiers(share: np.ndarray, num_tiers: int) -> np.ndarray:
    """i32[C]: clients grouped by their share of the largest member, weakest tier first.

    All of a tier are treated as its weakest; the cuts lose least, by Σ log(share / weakest share).

    Args:
      share: f64[C], positive.
      num_tiers: at most.
    Raises:
      ValueError: num_tiers below 1.
    """
    if num_tiers < 1:
        raise ValueError(f"num_tiers must be at least 1, got {num_tiers}.")
    values, kind, count = np.unique(np.log(share), return_inverse=True, return_counts=True)
    total = np.concatenate([[0], np.cumsum(values * count)])
    number = np.concatenate([[0], np.cumsum(count)])
    n, num_tiers = len(values), min(num_tiers, len(values))
    a, b = np.arange(n)[None], np.arange(1, n + 1)[:, None]
    lost = total[b] - total[a] - values[a] * (number[b] - number[a])
    lost = np.where(a < b, lost, np.inf)
    # best[b]: the least loss of the first b values in the tiers so far, the last from cuts[-1][b].
    best, cuts = np.array([0.0] + [np.inf] * n), []
    for _ in range(num_tiers):
        table = best[:-1] + lost
        cuts.append([0, *table.argmin(1).tolist()])
        best = np.array([np.inf, *table.min(1)])
    tier, end = np.zeros(n, np.int32), n
    for last in reversed(range(num_tiers)):
        begin = cuts[last][end]
        tier[begin:end] = last
        end = begin
    return tier[kind]


def client_limits(budgets: Sequence[Budget]) -> np.ndarray:
    """f64[C, len(budgets)]: each client's limits.

    Raises:
      ValueError: no budget, or limits of different lengths.
    """
    if not budgets:
        raise ValueError("rafl needs at least one budget, with a limit for each client.")
    given = [np.asarray(b.limit, np.float64) for b in budgets]
    shapes = {limit.shape for limit in given if limit.ndim}
    if len(shapes) != 1 or any(len(shape) != 1 for shape in shapes):
        named = {b.name: limit.shape for b, limit in zip(budgets, given, strict=True)}
        raise ValueError(f"Limits have shapes {named}; give one number for each client.")
    return np.stack([np.broadcast_to(limit, shapes.copy().pop()) for limit in given], axis=1)


def _costs(budgets: Sequence[Budget], counts: np.ndarray) -> np.ndarray:
    """f64[len(budgets)] of one member."""
    return np.array([float(b.cost(jnp.asarray(counts, jnp.float32))) for b in budgets])


def _check_reachable(net: Supernet, budgets: Sequence[Budget], limits: np.ndarray) -> None:
    least = _costs(budgets, net.smallest)
    for client, own in enumerate(limits):
        for budget, limit, cost in zip(budgets, own.tolist(), least.tolist(), strict=True):
            if not limit >= cost:
                raise ValueError(
                    f"Client {client} allows {limit:.6g} {budget.name}; the smallest member costs "
                    f"{cost:.6g}. Give the supernet a smaller one or leave the client out."
                )


def _share(net: Supernet, budgets: Sequence[Budget], limits: np.ndarray) -> np.ndarray:
    """f64[C]: which part of the largest member a client's scarcest resource allows; at most 1."""
    return np.minimum((limits / _costs(budgets, net.largest)).min(1), 1.0)


def _shrink(net: Supernet) -> Search:
    return lambda budgets, clients: np.asarray(net.fit(budgets)(jnp.zeros(len(net.largest))))


def _searched(search: Search, budgets: Sequence[Budget], clients: np.ndarray) -> np.ndarray:
    counts = np.asarray(search(budgets, clients), np.int32)
    if not bool(within(budgets, jnp.asarray(counts, jnp.float32))):
        limits = {b.name: b.limit for b in budgets}
        raise ValueError(
            f"The search gave {counts.tolist()} for clients {clients.tolist()}, which costs "
            f"{_costs(budgets, counts).tolist()}; the limits are {limits}."
        )
    return counts


def _member(model: Model, variables: Variables) -> Model:
    """A member as a model of its own that starts from given weights."""
    return model._replace(init=lambda key: variables)
