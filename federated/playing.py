"""A run as a sequence of steps with evaluations, a log, checkpoints and an end.

What one step is (a round, a stretch of central training) the run's script says; here is what all
runs share: they go on where they were stopped, are looked at now and then, and stop where nothing
is learned or what they may spend is spent.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxfm.checkpoint import Checkpointer
from jaxfm.federated.outcome import Account, check_progress, check_reports, say_line
from jaxfm.log import RunLog, progress
from jaxfm.model import PyTree
from jaxfm.preemption import Preempted, stop_requests

Line = dict[str, float]  # figures of the log by name


class Script(NamedTuple):
    """What a run does.

    Attributes:
      advance: `(number, state, account) -> (state, account, line)`, step `number` from 1 on.
      watch: `(state) -> line`, of an evaluation.
      server: `(state) -> server_state`, whose `variables` are the global model.
      ends: `(number, state, account) -> sentence`, why step `number`, the next one, cannot be
        taken; empty where it can.
      check: `(number, state) -> None`, of a state that was restored after `number` steps; raises
        ValueError where it is not that of this script.
    """

    advance: Callable[[int, PyTree, Account], tuple[PyTree, Account, Line]]
    watch: Callable[[PyTree], Line]
    server: Callable[[PyTree], Any]
    ends: Callable[[int, PyTree, Account], str] = lambda number, state, account: ""
    check: Callable[[int, PyTree], None] = lambda number, state: None


class Played(NamedTuple):
    """A run after its last step.

    Attributes:
      state, account: as the script left them.
      history: a line for each step of this call, with its number as "round".
      ended: why the run ended before its last step; empty where it did not.
    """

    state: PyTree
    account: Account
    history: list[Line]
    ended: str


def play(
    script: Script,
    state: PyTree,
    account: Account,
    *,
    length: int,
    eval_every: int,
    names: Sequence[str],
    run_dir: str | os.PathLike[str] | None = None,
    log_to: Sequence[str] = (),
    due: Callable[[int], bool] = lambda number: False,
) -> Played:
    """Takes all steps, or those that an earlier process has left.

    Args:
      script: what a step is.
      state, account: before the first step.
      length: steps in all.
      eval_every: steps between evaluations. There is a checkpoint, too, where the time since the
        last one allows it (`Checkpointer.is_due`), and after the last step.
      names: of the clients.
      run_dir: folder for metrics and checkpoints; None: nothing is written.
      log_to: services that get the metrics, too (`jaxfm.trackers`).
      due: `(number) -> bool`, whether a step is followed by an evaluation in any case.
    Raises:
      ValueError: the folder holds a run of more steps or of another script; the run ends before
        its first step.
      NothingLearned: as of `check_progress` and `check_reports`.
      Preempted: SIGTERM asked to stop; the state after the last step is saved.
    """
    number, done, ended = 0, 0, ""
    history: list[Line] = []
    with contextlib.ExitStack() as stack:
        checkpoints = log = None
        asked: Callable[[], bool] = lambda: False
        if run_dir is not None:
            folder = pathlib.Path(run_dir)
            checkpoints = stack.enter_context(Checkpointer(folder / "checkpoints", keep=2))
            if checkpoints.latest_step() is not None:
                done, (state, account) = checkpoints.restore(like=(state, account))
                if done > length:
                    raise ValueError(
                        f"num_rounds={length}: the run in {folder} has {done} rounds behind it; "
                        "give at least as many, or another folder."
                    )
                script.check(done, state)
                print(f"Going on after round {done}, from {checkpoints.folder}.")
            asked = stack.enter_context(stop_requests())
            log = stack.enter_context(RunLog(folder, resume_step=done or None, log_to=log_to))
        if log is not None and not done:
            log.write(0, script.watch(state))
        number, evaluated = done, account
        ends = lambda: script.ends(number + 1, state, account) if number < length else ""
        if (ended := ends()) and not done:
            raise ValueError(f"There is not enough for a single round. {ended}")
        for number in progress(range(done + 1, length + 1), "rounds"):
            if ended:
                break
            state, account, line = script.advance(number, state, account)
            ended = ends()
            looks = number % eval_every == 0 or number == length or bool(ended) or due(number)
            line |= script.watch(state) if looks else {}
            history.append({"round": float(number)} | line)
            if log is not None:
                log.write(number, line)
            stops = asked() and number < length
            if looks:
                say_line(number, length, line)
                check_progress(number, evaluated, account, script.server(state).variables, names)
                evaluated = account
            ends_here = stops or bool(ended) or number == length
            if checkpoints is not None and (ends_here or (looks and checkpoints.is_due())):
                checkpoints.save(number, (state, account))
            if stops:
                raise Preempted(number, run_dir)
    if account.total("selected"):
        check_reports(account)
    return Played(state, account, history, ended)
