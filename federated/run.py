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

import contextlib
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxfm.checkpoint import Checkpointer
from jaxfm.data.dealing import Data, subsample
from jaxfm.federated.accounting.metrics import client_metrics, global_metrics, three_metrics
from jaxfm.federated.algorithm import Algorithm
from jaxfm.federated.outcome import (
    Account,
    add_round,
    check_progress,
    check_reports,
    counted,
    left_out,
    no_account,
    numbers,
    say_line,
    totals_by_name,
    untrained_rest,
    warn,
)
from jaxfm.federated.placement import Placement, place
from jaxfm.federated.population import Population
from jaxfm.federated.preparation import Prepared
from jaxfm.federated.rounds import Rounds, RunState, compile_rounds
from jaxfm.log import RunLog, progress
from jaxfm.model import Variables, count_parameters

_EVAL_BATCH = 32


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
      scored: the bucket whose model stands for the global one in `test`, the largest that anybody
        trains; None: the global model itself.
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
    eval_every: int = 5,
    eval_examples: int = 512,
    test_examples: int = 0,
    run_dir: str | os.PathLike[str] | None = None,
    mesh: Mesh | None = None,
    clients_at_once: int | None = None,
) -> TrainedRun:
    """Runs all rounds, or those that an earlier process has left, and measures on the test sets.

    Args:
      algorithm: what clients and server do; or, with variables and placement, what `prepare` gives.
      data: of the clients and of the server.
      num_rounds, cohort_size, drop_rate, mesh, clients_at_once: as in `compile_rounds`.
      variables: that the run starts from; None: `algorithm.model.init`.
      placement: who trains what (`place`); None: clients without limits take turns.
      seed: of parameters and rounds.
      eval_every: rounds between evaluations and checkpoints.
      eval_examples, test_examples: validation rows looked at while training, and test rows looked
        at in the end; 0: all.
      run_dir: folder for metrics and checkpoints; None: nothing is written.
    Raises:
      ValueError: settings out of range, or no variables where the algorithm has no global model.
      NothingLearned: no update of a whole stretch between two evaluations was finite, the global
        model is not finite, or nobody reported in the whole run.
    """
    _check(num_rounds, eval_every)
    algorithm, variables, placement = _resolved(algorithm, data, variables, placement, seed)
    population = Population(data.train, placement.profiles, placement.bucket, data.local_validation)
    engine = compile_rounds(
        algorithm, population, cohort_size=cohort_size, drop_rate=drop_rate, public=data.public,
        mesh=mesh, clients_at_once=clients_at_once,
    )  # fmt: skip
    measure = client_metrics(algorithm, placement.bucket, data.task, batch_size=_EVAL_BATCH)
    state = engine.init(variables, jax.random.key(seed + 1))
    account = no_account(len(data.train.count))
    watch = functools.partial(
        validation, algorithm, data=data, examples=subsample(data.validation, eval_examples),
        measure=measure, bucket_of=placement.bucket,
    )  # fmt: skip
    state, account, history = _play(
        engine, state, account, placement, data, num_rounds, eval_every, watch, run_dir
    )
    test, buckets, clients = final_metrics(
        algorithm, state, data, placement.bucket, measure, test_examples
    )
    result = TrainedRun(
        state=state, placement=placement, totals=totals_by_name(account, placement),
        history=history, test=test, buckets=buckets, clients=clients, failures=account.failures,
        scored=trained_bucket(algorithm, placement.bucket),
    )  # fmt: skip
    _say_what_is_missing(result, data, count_parameters(variables.params))
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


def _say_what_is_missing(result: TrainedRun, data: Data, full: int) -> None:
    """Prints what of the model nobody trained, and which clients were left out or diverged."""
    scored, costs = result.scored, result.placement.costs
    sentences = (
        untrained_rest(full if scored is None else costs[scored].parameters, full),
        left_out(result.totals, result.failures, data.names),
        _diverged(result.clients, data.names),
    )
    for sentence in filter(None, sentences):
        print(sentence)


def _play(
    engine: Rounds, state: RunState, account: Account, placement: Placement, data: Data,
    num_rounds: int, eval_every: int, watch: Callable[..., dict[str, float]],
    run_dir: str | os.PathLike[str] | None,
) -> tuple[RunState, Account, list[dict[str, float]]]:  # fmt: skip
    """The rounds that are left, with their log and checkpoints.

    Args:
      watch: `(state=...) -> figures`, of an evaluation.
    """
    done, history = 0, []
    with contextlib.ExitStack() as stack:
        checkpoints = log = None
        if run_dir is not None:
            folder = pathlib.Path(run_dir)
            checkpoints = stack.enter_context(Checkpointer(folder / "checkpoints", keep=2))
            if checkpoints.latest_step() is not None:
                done, (state, account) = checkpoints.restore(like=(state, account))
                if done > num_rounds:
                    raise ValueError(
                        f"num_rounds={num_rounds}: the run in {folder} has {done} rounds behind it;"
                        " give at least as many, or another folder."
                    )
                print(f"Going on after round {done}, from {checkpoints.folder}.")
            log = stack.enter_context(RunLog(folder, resume_step=done or None))
        if log is not None and not done:
            log.write(0, watch(state=state))
        evaluated = account
        for number in progress(range(done + 1, num_rounds + 1), "rounds"):
            state, info = engine.run(state)
            info = jax.device_get(info)
            account, line = add_round(account, placement, info)
            warn(number, info, data.names)
            is_due = number % eval_every == 0 or number == num_rounds
            line |= watch(state=state) if is_due else {}
            history.append({"round": float(number)} | line)
            if log is not None:
                log.write(number, line)
            if not is_due:
                continue
            say_line(number, num_rounds, line)
            check_progress(number, evaluated, account, state.server.variables, data.names)
            evaluated = account
            if checkpoints is not None:
                checkpoints.save(number, (state, account))
    check_reports(account)
    return state, account, history


def trained_bucket(algorithm: Algorithm, bucket_of: np.ndarray) -> int | None:
    """The bucket whose model stands for the global one; None: the global model itself.

    Where buckets hold nested slices (`Algorithm.is_nested`), what lies outside the largest one that
    has clients is never trained, and the full model would be scored as it was drawn.
    """
    return int(np.min(bucket_of)) if algorithm.is_nested else None


def validation(
    algorithm: Algorithm,
    state: RunState,
    data: Data,
    examples: Mapping,
    measure: Callable,
    bucket_of: np.ndarray,
) -> dict[str, float]:
    """Metrics of the shared models on validation rows, and of clients' own on theirs.

    Args:
      examples: validation rows of the server.
      bucket_of: i32[C], who trains what.
      measure: of `client_metrics`.
    """
    line: dict[str, float] = {}
    buckets: list[int | None] = [
        b for b, bucket in enumerate(algorithm.buckets) if bucket.personal is None
    ]
    first = trained_bucket(algorithm, bucket_of) or 0
    for b in buckets or ([None] if algorithm.model else []):
        if b is not None and b < first:
            continue  # nobody trains it
        prefix = f"validation/bucket{b}" if b and b != first else "validation"
        metrics = _on_server(algorithm, state, data, examples, b)
        line |= {f"{prefix}/{name}": value for name, value in metrics.items()}
    if data.local_validation is not None:
        own = three_metrics(measure(state, data.local_validation), {}, data.task.higher_is_better)
        line |= {name: value for name, value in own.items() if name.startswith("personal/")}
    return line


def final_metrics(
    algorithm: Algorithm,
    state: RunState,
    data: Data,
    bucket_of: np.ndarray,
    measure: Callable,
    test_examples: int = 0,
) -> tuple[dict[str, float], list[dict[str, float]], dict[str, np.ndarray]]:
    """The three metrics on the test sets, those of each bucket, and those of each client."""
    test = subsample(data.test, test_examples)
    own = measure(state, data.local_test)

    def of_bucket(b: int) -> dict[str, float]:
        if algorithm.buckets[b].personal is None:
            return _on_server(algorithm, state, data, test, b)
        return {name: _mean(values[bucket_of == b]) for name, values in own.items()}

    buckets = [of_bucket(b) for b in range(len(algorithm.buckets))]
    first = trained_bucket(algorithm, bucket_of)
    overall = _on_server(algorithm, state, data, test, first) if algorithm.model else {}
    return three_metrics(own, overall, data.task.higher_is_better), buckets, own


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
        "scored": result.scored,
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


def _on_server(
    algorithm: Algorithm, state: RunState, data: Data, examples: Mapping, bucket: int | None
) -> dict[str, float]:
    return global_metrics(
        algorithm, state, data.task, examples, batch_size=_EVAL_BATCH, bucket=bucket
    )


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


def _mean(values: np.ndarray) -> float:
    some = values[~np.isnan(values)]
    return float(some.mean()) if some.size else float("nan")
