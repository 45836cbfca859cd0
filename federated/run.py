"""A federated run from its data to its last test: rounds, evaluation, checkpoints, records.

    data = jaxfm.data.dealing.deal_out(...)
    ready = prepare("spatl", model, data, local, num_rounds=50, options={"keep": 0.5})
    result = train(ready, data, num_rounds=50, cohort_size=8)
    result.test["global/accuracy"], result.totals["bytes_up"]

A run with a folder keeps its metrics there (JSONL and TensorBoard), saves checkpoints, and goes on
from the last one if it was stopped, to the same result. The validation split is watched, the test
split is looked at once, at the end.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxfm.data.dealing import Data, subsample
from jaxfm.federated.accounting.budget import ByteBudget
from jaxfm.federated.accounting.metrics import client_metrics
from jaxfm.federated.accounting.privacy import check_same_noise, epsilon_line
from jaxfm.federated.algorithm import Algorithm
from jaxfm.federated.asynchronous.clock import Clock
from jaxfm.federated.asynchronous.steps import compile_asynchronous
from jaxfm.federated.cohort import cohorts_of
from jaxfm.federated.measuring import (
    EVAL_BATCH,
    evaluation_key,
    final_metrics,
    trained_bucket,
    validation,
)
from jaxfm.federated.outcome import (
    Account,
    add_round,
    counted,
    left_out,
    no_account,
    numbers,
    say_test,
    totals_by_name,
    untrained_rest,
    warn,
)
from jaxfm.federated.placement import Placement, place
from jaxfm.federated.playing import Played, Script, play
from jaxfm.federated.population import Population
from jaxfm.federated.preparation import Prepared
from jaxfm.federated.rounds import Rounds, RunState, compile_rounds
from jaxfm.federated.tensor import whole
from jaxfm.model import Variables, count_parameters


class TrainedRun(NamedTuple):
    """A run after its last round.

    Attributes:
      state: of the engine.
      placement: who trained what.
      totals: of all clients: "bytes_down", "bytes_up", "flops"; how many were "selected", and of
        these "reported", were "absent" or sent an update that was "non_finite"; with machines
        "seconds" and "joules", too.
      history: a dict of figures for each round of this call, with its number as "round".
      test: the three metrics on the test sets, by name.
      buckets: by bucket, the metrics of its model on the global test set; where its clients have
        models of their own, the means of these on their own test sets.
      clients: f64[C] by metric, of each client's model on its own test set.
      failures: i64[C], updates of each client that were not finite and were left out.
      ended: a sentence where a budget ended the run before its last round; else empty.
      scored: the bucket whose model stands for the global one in `test`, the largest that anybody
        trains; None: the global model itself.
      privacy: what the rounds of a private algorithm have cost (`Privacy.report`); else None.
    """

    state: RunState
    placement: Placement
    totals: dict[str, float]
    history: list[dict[str, float]]
    test: dict[str, float]
    buckets: list[dict[str, float]]
    clients: dict[str, np.ndarray]
    failures: np.ndarray
    scored: int | None = None
    ended: str = ""
    privacy: dict[str, Any] | None = None


def train(
    algorithm: Algorithm | Prepared,
    data: Data,
    *,
    num_rounds: int,
    cohort_size: int,
    variables: Variables | None = None,
    placement: Placement | None = None,
    seed: int = 0,
    drop_rate: float = 0.0,
    byte_budget: int | None = None,
    eval_every: int = 5,
    eval_examples: int = 512,
    test_examples: int = 0,
    run_dir: str | os.PathLike[str] | None = None,
    log_to: Sequence[str] = (),
    mesh: Mesh | None = None,
    clients_at_once: int | None = None,
    clock: Clock | None = None,
) -> TrainedRun:
    """Runs all rounds, or those that an earlier process has left, and measures on the test sets.

    Args:
      algorithm: what clients and server do; or, with variables and placement, what `prepare` gives.
      data: of the clients and of the server.
      num_rounds, cohort_size, drop_rate, mesh, clients_at_once: as in `compile_rounds`.
      variables: that the run starts from; None: `algorithm.model.init`.
      placement: who trains what (`place`); None: clients without limits take turns.
      seed: of parameters and rounds.
      byte_budget: bytes of all uploads and downloads together, which no round exceeds: before one
        that may, the run ends. None: all rounds are run.
      eval_every: rounds between evaluations, and checkpoints where these cost little
        (`Checkpointer.is_due`).
      eval_examples, test_examples: validation rows looked at while training, and test rows looked
        at in the end; 0: all.
      run_dir: folder for metrics and checkpoints; None: nothing is written.
      log_to: services that get the metrics of a run with a folder, too (`jaxfm.trackers`).
      clock: the server does not wait: `num_rounds` are its steps, and `cohort_size` clients are at
        work at a time. None: rounds that wait.
    Raises:
      ValueError: settings out of range, a byte budget that is too small for the first round, a
        clock without machines, or no variables where the algorithm has no global model.
      NothingLearned: no update of a whole stretch between two evaluations was finite, the global
        model is not finite, or nobody reported in the whole run.
    """
    _check(num_rounds, eval_every)
    setup = set_up(
        algorithm, data, cohort_size=cohort_size, variables=variables, placement=placement,
        seed=seed, drop_rate=drop_rate, byte_budget=byte_budget, eval_examples=eval_examples,
        mesh=mesh, clients_at_once=clients_at_once, clock=clock, num_rounds=num_rounds,
    )  # fmt: skip
    script = Script(
        advance=lambda number, state, account: one_round(setup, number, state, account),
        watch=setup.watch,
        server=lambda state: state.server,
        ends=lambda number, state, account: budget_ends(setup, state, account),
        check=lambda number, state: check_same_noise(setup.algorithm.privacy, state.server),
    )
    played = play(
        script, setup.state, no_account(len(data.names)), length=num_rounds, eval_every=eval_every,
        names=data.names, run_dir=run_dir, log_to=log_to,
    )  # fmt: skip
    return finished(setup, played, played.state, test_examples)


class Setup(NamedTuple):
    """What stands before the first step of a run.

    Attributes:
      algorithm, data, placement, budget: of the run.
      engine: one round a call.
      state: of the engine.
      measure: of `client_metrics`.
      watch: `(state) -> figures`, of an evaluation on validation rows.
      full: parameters of the global model.
    """

    algorithm: Algorithm
    data: Data
    placement: Placement
    budget: ByteBudget | None
    engine: Rounds
    state: RunState
    measure: Callable
    watch: Callable[[RunState], dict[str, float]]
    full: int


def set_up(
    algorithm: Algorithm | Prepared,
    data: Data,
    *,
    cohort_size: int,
    variables: Variables | None = None,
    placement: Placement | None = None,
    seed: int = 0,
    drop_rate: float = 0.0,
    byte_budget: int | None = None,
    eval_examples: int = 512,
    mesh: Mesh | None = None,
    clients_at_once: int | None = None,
    clock: Clock | None = None,
    num_rounds: int = 0,
) -> Setup:
    """Compiles the rounds of a run and its evaluations; arguments as of `train`."""
    algorithm, variables, placement = _resolved(algorithm, data, variables, placement, seed)
    population = Population(data.train, placement.profiles, placement.bucket, data.local_validation)
    on: dict[str, Any] = {"public": data.public, "mesh": mesh, "clients_at_once": clients_at_once}
    if clock is None:
        engine = compile_rounds(
            algorithm, population, cohort_size=cohort_size, drop_rate=drop_rate, **on
        )
    else:
        if drop_rate or byte_budget is not None:
            raise ValueError(
                "A clock loses clients by their availability and draws no cohorts: leave out "
                "drop_rate and byte_budget."
            )
        steps = np.asarray(placement.profiles.max_steps)
        schedule = clock.plan(placement, steps, cohort_size, num_rounds, seed)
        engine = compile_asynchronous(
            algorithm, population, schedule, staleness=clock.staleness, rate=clock.rate,
            mixes_models=clock.mixes_models, history=clock.max_staleness + 1, **on,
        )  # fmt: skip
    measure = client_metrics(
        algorithm, placement.bucket, data.task, batch_size=EVAL_BATCH,
        key=evaluation_key(data.task),
    )  # fmt: skip
    watch = functools.partial(
        validation, algorithm, data=data, examples=subsample(data.validation, eval_examples),
        measure=measure, bucket_of=placement.bucket,
    )  # fmt: skip
    budget = None
    if byte_budget is not None:
        budget = ByteBudget(
            byte_budget, placement.costs, placement.bucket, np.asarray(data.train.count),
            *cohorts_of(algorithm, len(data.names), cohort_size), drop_rate,
        )  # fmt: skip
    return Setup(
        algorithm=algorithm, data=data, placement=placement, budget=budget, engine=engine,
        state=engine.init(variables, jax.random.key(seed + 1)), measure=measure,
        watch=lambda state: watch(state=state) | epsilon_line(algorithm.privacy, state.server),
        full=count_parameters(variables.params),
    )  # fmt: skip


def finished(setup: Setup, played: Played, state: RunState, test_examples: int) -> TrainedRun:
    """Measures a played run on the test sets, and says what is missing."""
    algorithm, data, placement = setup.algorithm, setup.data, setup.placement
    say_test(len(jax.tree.leaves(subsample(data.test, test_examples))[0]), len(data.names))
    test, buckets, clients = final_metrics(
        algorithm, state, data, placement.bucket, setup.measure, test_examples
    )
    result = TrainedRun(
        state=state._replace(server=whole(state.server)), placement=placement,
        totals=totals_by_name(played.account, placement), history=played.history,
        test=test, buckets=buckets, clients=clients, failures=played.account.failures,
        scored=trained_bucket(algorithm, placement.bucket), ended=played.ended,
        privacy=algorithm.privacy and algorithm.privacy.report(int(state.server.released)),
    )  # fmt: skip
    _say_what_is_missing(result, data, setup.full)
    return result


def _resolved(
    algorithm: Algorithm | Prepared,
    data: Data,
    variables: Variables | None,
    placement: Placement | None,
    seed: int,
) -> tuple[Algorithm, Variables, Placement]:
    """What a run begins with: what was given, else what `prepare` made, else the defaults."""
    if isinstance(algorithm, Prepared):
        variables = algorithm.variables if variables is None else variables
        placement = algorithm.placement if placement is None else placement
        algorithm = algorithm.algorithm
    variables = _start(algorithm, seed) if variables is None else variables
    if placement is None:
        placement = place(
            algorithm, data.train, variables, public=data.public,
            local_validation=data.local_validation,
        )  # fmt: skip
    return algorithm, variables, placement


def one_round(
    setup: Setup, number: int, state: RunState, account: Account
) -> tuple[RunState, Account, dict[str, float]]:
    """A `Script.advance`: one round of the engine, counted; with a warning where updates failed."""
    state, info = setup.engine.run(state)
    info = jax.device_get(info)
    account, line = add_round(account, setup.placement, info)
    warn(number, info, setup.data.names)
    return state, account, line


def budget_ends(setup: Setup, state: RunState, account: Account) -> str:
    """Why a budget, of bytes or of privacy, forbids the next round; empty where none does."""
    budget, privacy = setup.budget, setup.algorithm.privacy
    if privacy is not None and (sentence := privacy.ends(int(state.server.released))):
        return sentence
    if budget is None:
        return ""
    taken = account.total("bytes_down") + account.total("bytes_up")
    return budget.ends(state.key, state.round, account.served, taken)


def _say_what_is_missing(result: TrainedRun, data: Data, full: int) -> None:
    """Prints what of the model nobody trained, and which clients were left out or diverged."""
    scored, costs = result.scored, result.placement.costs
    sentences = (
        result.ended,
        untrained_rest(full if scored is None else costs[scored].parameters, full),
        left_out(result.totals, result.failures, data.names),
        _diverged(result.clients, data.names),
    )
    for sentence in filter(None, sentences):
        print(sentence)


def summary(result: TrainedRun, data: Data, full_bytes: int, mix: tuple[str, ...] = ()) -> dict:
    """A run as JSON: what its report shows (part "federate" of results.json).

    Args:
      result: of `train`.
      data: that it was trained on.
      full_bytes: of the parameters and statistics of the full model, to compare traffic with.
      mix: names of the clients' machines, dealt out in turn.
    """
    placement, totals = result.placement, result.totals
    machines = mix or ("",)
    return {
        "test": numbers(result.test),
        "tiers": [
            {"clients": int((placement.bucket == b).sum())} | cost._asdict() | numbers(metrics)
            for b, (cost, metrics) in enumerate(zip(placement.costs, result.buckets, strict=True))
        ],
        "higher_is_better": {name: data.task.higher_is_better(name) for name in result.clients},
        "totals": totals,
        "privacy": result.privacy,
        "scored": result.scored,
        "ended": result.ended,
        "left_out": left_out(totals, result.failures, data.names),
        "diverged": _diverged(result.clients, data.names),
        "full_model": {
            "bytes_down": totals["selected"] * full_bytes,
            "bytes_up": (totals["reported"] + totals["non_finite"]) * full_bytes,
        },
        "clients": [
            {
                "name": name,
                "examples": int(data.train.count[i]),
                "bucket": int(placement.bucket[i]),
                "machine": machines[i % len(machines)],
                "non_finite": int(result.failures[i]),
                "test": numbers({metric: x[i] for metric, x in result.clients.items()}),
            }
            for i, name in enumerate(data.names)
        ],
    }


def _diverged(clients: Mapping[str, np.ndarray], names: Sequence[str]) -> str:
    """A sentence on clients whose own models have no finite metric; empty where there are none."""
    lost = [np.isinf(values) for values in clients.values()]
    who = np.flatnonzero(np.any(lost, axis=0)) if lost else np.array([], int)
    if not who.size:
        return ""
    return f"The models of {counted(who, names)} diverged: their test metrics are not finite."


def _start(algorithm: Algorithm, seed: int) -> Variables:
    if algorithm.model is None:
        raise ValueError("This algorithm has no global model: give train(variables=...).")
    return algorithm.model.init(jax.random.key(seed))


def _check(num_rounds: int, eval_every: int) -> None:
    for name, value in (("num_rounds", num_rounds), ("eval_every", eval_every)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
