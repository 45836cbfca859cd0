"""One model, four ways to train it: in one place, alone, in rounds, in rounds and on public rows.

All take as many steps of as many rows: a round of K clients that make E steps of B rows is E
central steps of K B rows.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from foundation_parts.works import Deal, Rows, Work
from jaxfm.adapters import attach, lora, only, soft_prompt
from jaxfm.cost import num_bytes
from jaxfm.data.federation import federate, of_one_shape
from jaxfm.federated import (
    ClientCost,
    Local,
    Population,
    compile_rounds,
    compiled_costs,
    fed_avg,
    profiles,
    round_costs,
)
from jaxfm.federated.algorithm import with_variables
from jaxfm.federated.foundation import Central, Phase, TrainState, central_steps
from jaxfm.federated.foundation.phases import units
from jaxfm.model import Model, Variables
from jaxfm.parallel.mesh import make_mesh
from jaxfm.tasks import evaluate

ARMS = ("central", "local", "federated", "ffm")
MESH = functools.cache(lambda: make_mesh(clients=len(jax.devices())))
EVER = 64  # epochs of a client alone, more than it has time for


class Method(NamedTuple):
    """What of a model is trained: `(work) -> model`, adapted or not."""

    adapted: Callable[[Work], Model]


def _with_last(work: Work) -> tuple[str, ...]:
    return (work.last,) if work.last else ()


METHODS = {
    "full": Method(lambda work: work.model),
    "lora": Method(
        lambda work: lora(work.model, 4, targets="linear", trained=("head",) * bool(work.last))
    ),
    "prompt": Method(lambda work: soft_prompt(work.model, 8, trained=_with_last(work))),
    "head": Method(lambda work: only(work.model, "head")),
}


class Figures(NamedTuple):
    """Of one run: accuracies, bytes of all clients, of the frozen part once, and seconds."""

    accuracy: float
    gap: float
    unseen: float
    bytes_up: float
    bytes_down: float
    bytes_once: float
    seconds: float


class Programs(NamedTuple):
    """Of one method of a work.

    Attributes:
      work, model: what they train.
      deals: by seed, whose the rows are.
      people: by seed, the clients; alone: by seed and client, one of them.
      costs: of a client, by the ledger.
      start: `(variables, key) -> variables`, with a fresh adapter.
      engine, lone, central: `(rate) -> program`.
    """

    work: Work
    model: Model
    deals: list[Deal]
    people: list[Population]
    alone: list[list[Population]]
    costs: tuple[ClientCost, ...]
    start: Callable[..., Variables]
    engine: Callable[[float], Any]
    lone: Callable[[float], Any]
    central: Callable[[float], Any]


def programs(work: Work, method: Method, num_seeds: int) -> Programs:
    """What a method's runs need; each program is compiled once for each rate."""
    size, model = work.size, method.adapted(work)
    deals = [work.deal(seed) for seed in range(num_seeds)]
    own_steps = size.rounds * size.steps * size.cohort // size.clients

    def population(data: Any, steps: int) -> Population:
        count = len(data.count)
        return Population(data, profiles(count, max_steps=steps), np.zeros(count, np.int32))

    together = of_one_shape([federate(work.rows, deal.clients) for deal in deals])
    single = of_one_shape([federate(work.rows, [own]) for deal in deals for own in deal.clients])
    people = [population(data, size.steps) for data in together]
    flat = [population(data, own_steps) for data in single]
    algorithm = lambda rate, epochs: fed_avg(
        model, work.task, Local(optax.adam(rate), size.batch, epochs)
    )
    batch = size.cohort * size.batch
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return Programs(
        work, model, deals, people,
        [flat[i : i + size.clients] for i in range(0, len(flat), size.clients)],
        compiled_costs(algorithm(0.1, 1), people[0], shapes),
        jax.jit(lambda variables, key: attach(model, variables, key)),
        functools.cache(
            lambda rate: compile_rounds(algorithm(rate, 1), people[0], cohort_size=size.cohort)
        ),
        functools.cache(lambda rate: compile_rounds(algorithm(rate, EVER), flat[0], cohort_size=1)),
        functools.cache(
            lambda rate: central_steps(
                model, work.task, Central(optax.adam(rate), batch), MESH()
            )
        ),
    )  # fmt: skip


def start_of(own: Programs, seed: int) -> Variables:
    """The variables before the first step, the same in all arms; copies, since rounds donate."""
    key = jax.random.key(100 + seed)
    if own.model.adapter is None:
        return jax.tree.map(jnp.copy, own.work.variables)
    return own.start(own.work.variables, key)


def run(own: Programs, arm: str, seed: int, rates: Mapping[str, float]) -> Figures:
    """One run.

    Args:
      own: of the method.
      arm: one of `ARMS`.
      seed: of the deal, the adapter and the batches.
      rates: learning rates, "central" and "federated".
    """
    if arm == "local":
        return _alone(own, seed, rates["federated"])
    size, began = own.work.size, time.perf_counter()
    spent = np.zeros(3)
    if arm == "federated":
        state, spent = _federated(own, [Phase("federated", size.rounds)], seed, rates)
    elif arm == "ffm":
        state, spent = _federated(own, alternating(own.work), seed, rates)
    else:
        deal = own.deals[seed]
        rows = _take(own.work.rows, np.concatenate([*deal.clients, deal.public]))
        trainer = _Trainer(own, rates["central"], rows, seed)
        state, _ = trainer.go(start_of(own, seed), None, size.rounds * size.steps)
        spent[0] = num_bytes(_take(own.work.rows, np.concatenate(deal.clients)))
    jax.block_until_ready(state)
    return _scored(own, state, seed, spent, time.perf_counter() - began)


def alternating(work: Work) -> tuple[Phase, ...]:
    """Half of the work on public rows and half in rounds, each in two stretches."""
    rounds = work.size.rounds
    first, last = rounds - rounds // 2 - rounds // 4, rounds // 4
    parts = [(rounds // 4, first), (rounds // 2 - rounds // 4, last)]
    return tuple(
        phase
        for central, federated in parts
        for phase in (
            Phase("central", central * work.size.steps), Phase("federated", federated)
        )
        if phase.length
    )  # fmt: skip


class _Trainer:
    """Central steps on given rows; the optimizer's state goes on from phase to phase."""

    def __init__(self, own: Programs, rate: float, rows: Rows, seed: int):
        self.program, self.optimizer = own.central(rate), optax.adam(rate)
        self.rows, self.key = jax.device_put(dict(rows)), jax.random.key(200 + seed)

    def go(self, variables: Variables, state: Any, steps: int) -> tuple[Variables, Any]:
        """(variables, (opt_state, step)) after so many more steps."""
        if state is None:
            state = jax.jit(self.optimizer.init)(variables.params), jnp.int32(0)
        # Where rounds have their state, too: another place would be another program.
        everywhere = NamedSharding(MESH(), PartitionSpec())
        begin = jax.device_put(TrainState(variables, *state, self.key), everywhere)
        end, _, _ = self.program(begin, self.rows, jnp.int32(steps))
        return end.variables, (end.opt_state, end.step)


def _federated(
    own: Programs, phases: Any, seed: int, rates: Mapping[str, float]
) -> tuple[Variables, np.ndarray]:
    """(variables, bytes up, down and once) after a schedule."""
    engine, people = own.engine(rates["federated"]), own.people[seed]
    state = engine.init(start_of(own, seed), jax.random.key(300 + seed))
    trainer, kept = None, None
    spent, met = np.zeros(3), set()
    for kind, length in units(phases, chunk=10**6):
        if kind == "central":
            public = _take(own.work.rows, own.deals[seed].public)
            trainer = trainer or _Trainer(own, rates["central"], public, seed)
            new, kept = trainer.go(state.server.variables, kept, length)
            state = state._replace(server=with_variables(state.server, new))
            continue
        state, info = engine.run(state, people)
        cost = round_costs(own.costs, info)
        met |= set(np.asarray(info.cohort.client).ravel().tolist())
        spent += [cost["bytes_up"], cost["bytes_down"], 0.0]
    spent[2] = len(met - {-1}) * own.costs[0].bytes_once
    return state.server.variables, spent


def _alone(own: Programs, seed: int, rate: float) -> Figures:
    """Every client by itself: the means of their models' figures, on half as many rows each."""
    work, deal, seconds, found = own.work, own.deals[seed], 0.0, []
    engine, scored = own.lone(rate), own.work.size.scored // 2
    for client, people in enumerate(own.alone[seed]):
        began = time.perf_counter()
        state = engine.init(start_of(own, seed), jax.random.key(400 + 10 * seed + client))
        state, _ = jax.block_until_ready(engine.run(state, people))
        seconds += time.perf_counter() - began
        score = lambda rows, v=state.server.variables: _accuracy(own, v, rows, scored)
        first = client % 4 * scored
        test = score(_take(work.test, slice(first, first + scored)))
        train = score(_take(work.rows, deal.clients[client][:scored]))
        found.append((test, train - test, score(_take(work.rows, deal.unseen[:scored]))))
    return Figures(*np.mean(found, 0).tolist(), 0.0, 0.0, 0.0, seconds)


def _scored(
    own: Programs, variables: Variables, seed: int, spent: np.ndarray, seconds: float
) -> Figures:
    work, deal, scored = own.work, own.deals[seed], own.work.size.scored
    pick = lambda rows: np.random.default_rng(seed).permutation(rows)[:scored]
    halves = lambda rows: [_take(rows, slice(i, i + scored)) for i in (0, scored)]
    score = lambda rows: _accuracy(own, variables, rows, scored)
    test = float(np.mean([score(half) for half in halves(work.test)]))
    train = score(_take(work.rows, pick(np.concatenate(deal.clients))))
    return Figures(
        test, train - test, score(_take(work.rows, pick(deal.unseen))),
        *spent.tolist(), seconds,
    )  # fmt: skip


def validated(own: Programs, arm: str, rates: Mapping[str, float]) -> float:
    """The accuracy on validation rows of the first seed's run, which rates are chosen by."""
    size = own.work.size
    if arm == "federated":
        state, _ = _federated(own, [Phase("federated", size.rounds)], 0, rates)
    else:
        deal = own.deals[0]
        rows = _take(own.work.rows, np.concatenate([*deal.clients, deal.public]))
        trainer = _Trainer(own, rates["central"], rows, 0)
        state, _ = trainer.go(start_of(own, 0), None, size.rounds * size.steps)
    some = _take(own.work.validation, slice(size.scored))
    return _accuracy(own, state, some, size.scored)


def chosen_rates(own: Programs, rates: tuple[float, ...]) -> dict[str, float]:
    """The best rate of central steps, and of rounds, by validation rows."""
    return {
        arm: max(rates, key=lambda rate: validated(own, arm, {arm: rate}))
        for arm in ("central", "federated")
    }


def _accuracy(own: Programs, variables: Variables, rows: Rows, at_most: int) -> float:
    """Over up to `at_most` rows, in one compiled program for all sets of that size."""
    count = len(next(iter(rows.values())))
    padded = {k: np.resize(x, (at_most, *x.shape[1:])) for k, x in rows.items()}
    metrics = evaluate(
        own.model.apply, variables, own.work.task, padded, min(at_most, 40), count=count
    )
    return 100 * metrics["accuracy"]


def _take(rows: Rows, part: np.ndarray | slice) -> Rows:
    return {k: x[part] for k, x in rows.items()}
