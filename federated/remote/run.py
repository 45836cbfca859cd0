"""A run with clients elsewhere, from its first round to its last test; what `train` is to a
simulation.

The server's own figures are those that it can know: clients' models of their own stay with them.
A run with a folder keeps its metrics and refusals there, saves checkpoints, and goes on from the
last one if it was stopped.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfm.data.dealing import Data, subsample
from jaxfm.data.federation import client_weights
from jaxfm.federated.accounting.metrics import global_metrics
from jaxfm.federated.accounting.privacy import check_same_noise, epsilon_line
from jaxfm.federated.client import client_data
from jaxfm.federated.measuring import EVAL_BATCH, evaluation_key, trained_bucket
from jaxfm.federated.outcome import Account, add_round, no_account, totals_by_name, warn
from jaxfm.federated.playing import Line, Script, play
from jaxfm.federated.population import Population
from jaxfm.federated.preparation import Prepared
from jaxfm.federated.remote.checking import Refused
from jaxfm.federated.remote.orders import Remote, RemoteState
from jaxfm.federated.remote.server import Exchange, Held, play_round, start

REFUSED = "refused.jsonl"


class Served(NamedTuple):
    """A run after its last round.

    Attributes:
      state: of the server.
      totals: of all clients, as of `TrainedRun`.
      history: a line of figures for each round of this call.
      test: metrics of the global model on the test set; empty where there is no global model.
      ended: why a budget of privacy ended the run before its last round; else empty.
      refused: rounds (from 1) and refusals, of this call.
      round_s: seconds by the clock of each round of this call, replies awaited.
      scored: the bucket whose model stands for the global one, as of `TrainedRun`.
    """

    state: RemoteState
    totals: dict[str, float]
    history: list[Line]
    test: dict[str, float]
    ended: str
    refused: list[tuple[int, Refused]]
    round_s: list[float]
    scored: int | None


def remote_of(prepared: Prepared, data: Data, cohort_size: int) -> Remote:
    """The run of a prepared algorithm, whose clients are limited to the rows that they have."""
    placement = prepared.placement
    people = population_of(prepared, data)
    return Remote(
        prepared.algorithm, placement.bucket, client_data(people, 0), cohort_size, data.public,
        client_weights(data.train), np.asarray(placement.profiles.max_steps),
    )  # fmt: skip


def population_of(prepared: Prepared, data: Data) -> Population:
    """Everybody who may take part."""
    placement = prepared.placement
    return Population(data.train, placement.profiles, placement.bucket, data.local_validation)


def serve(
    prepared: Prepared,
    data: Data,
    exchange: Exchange,
    *,
    num_rounds: int,
    cohort_size: int,
    seed: int = 0,
    eval_every: int = 5,
    eval_examples: int = 512,
    test_examples: int = 0,
    run_dir: str | os.PathLike[str] | None = None,
    log_to: Sequence[str] = (),
) -> Served:
    """Plays all rounds, or those that an earlier process has left, with clients elsewhere.

    Args:
      prepared, data: as in `train`; of clients' rows only their number is looked at.
      exchange: how orders reach clients.
      num_rounds, cohort_size, seed, eval_every, eval_examples, test_examples, run_dir, log_to: as
        in `train`, with the same cohorts and keys.
    """
    remote = remote_of(prepared, data, cohort_size)
    watch = functools.partial(_measured, prepared, data)
    some = subsample(data.validation, eval_examples)
    privacy = prepared.algorithm.privacy
    held: Held = {}
    refused: list[tuple[int, Refused]] = []
    round_s: list[float] = []

    def advance(number: int, state: RemoteState, account: Account) -> tuple:
        before = time.perf_counter()
        state, info, new = play_round(remote, state, exchange, held)
        jax.block_until_ready(state.run.server)
        round_s.append(time.perf_counter() - before)
        account, line = add_round(account, prepared.placement, info)
        warn(number, info, data.names)
        for one in new:
            print(f"Round {number}: client {one.client} is left out. {one.reason}")
        refused.extend((number, one) for one in new)
        _write(run_dir, number, new)
        return state, account, line | {"clients/refused": float(len(new))}

    script = Script(
        advance=advance,
        watch=lambda state: (
            watch(state, some, "validation/")
            | epsilon_line(prepared.algorithm.privacy, state.run.server)
        ),
        server=lambda state: state.server,
        ends=lambda number, state, account: (
            privacy.ends(int(state.server.released)) if privacy is not None else ""
        ),
        check=lambda number, state: check_same_noise(privacy, state.server),
    )
    played = play(
        script, start(remote, prepared.variables, jax.random.key(seed + 1)),
        no_account(len(data.names)), length=num_rounds, eval_every=eval_every, names=data.names,
        run_dir=run_dir, log_to=log_to,
    )  # fmt: skip
    return Served(
        state=played.state,
        totals=totals_by_name(played.account, prepared.placement),
        history=played.history,
        test=watch(played.state, subsample(data.test, test_examples), ""),
        ended=played.ended,
        refused=refused,
        round_s=round_s,
        scored=trained_bucket(prepared.algorithm, prepared.placement.bucket),
    )


def _measured(
    prepared: Prepared, data: Data, state: RemoteState, examples: Any, prefix: str
) -> dict[str, float]:
    """Metrics of the global model, where there is one."""
    algorithm = prepared.algorithm
    bucket = trained_bucket(algorithm, prepared.placement.bucket)
    if algorithm.model is None or (
        bucket is not None and algorithm.buckets[bucket].personal is not None
    ):
        return {}
    found = global_metrics(
        algorithm, state.run, data.task, examples, batch_size=EVAL_BATCH, bucket=bucket,
        key=evaluation_key(data.task),
    )  # fmt: skip
    return {prefix + name: value for name, value in found.items()}


def _write(run_dir: Any, number: int, refused: list[Refused]) -> None:
    """Adds refusals to a file of the run, a line each."""
    if run_dir is None or not refused:
        return
    with open(pathlib.Path(run_dir) / REFUSED, "a") as file:
        for one in refused:
            file.write(json.dumps({"round": number, **one._asdict()}) + "\n")
