"""Pre-training that alternates between the server's public rows and the clients' private ones.

    run = alternate(
        ready, data, [Phase("central", 200), Phase("federated", 20), Phase("central", 100)],
        central=Central(optax.adamw(1e-3), batch_size=64), cohort_size=8,
    )
    run.targets["central"], run.trained.totals["bytes_up"]

Everything that lasts over the phases is kept: the state of the algorithm (its momentum, say), the
clients' memories, the state of the central optimizer. A run with a folder goes on where it was
stopped, in the middle of a phase, too, and ends with the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxfm.data.dealing import Data
from jaxfm.federated.accounting.privacy import check_same_noise
from jaxfm.federated.algorithm import Algorithm, with_variables
from jaxfm.federated.foundation.central import Central, TrainState, central_steps
from jaxfm.federated.foundation.phases import Phase, behind, units
from jaxfm.federated.outcome import Account, no_account
from jaxfm.federated.placement import Placement
from jaxfm.federated.playing import Line, Script, play
from jaxfm.federated.preparation import Prepared
from jaxfm.federated.rounds import RunState
from jaxfm.federated.run import Setup, TrainedRun, budget_ends, finished, one_round, set_up
from jaxfm.federated.wrappers.masters import has_halves, wide_model, widened
from jaxfm.model import Array, PyTree, Variables
from jaxfm.parallel.mesh import make_mesh, put

_CENTRAL = 2**32 - 3  # no round has this number


class FoundationState(NamedTuple):
    """All that a run of phases needs to go on.

    Attributes:
      run: of the engine; its server holds the model.
      opt_state: of the central optimizer; () in a schedule without central phases.
      step: i32[], central steps done.
      targets: f64[2], predictions that losses were taken over, in central and federated phases:
        tokens, in causal language modelling.
    """

    run: RunState
    opt_state: PyTree
    step: Array
    targets: np.ndarray


class FoundationRun(NamedTuple):
    """A schedule that was run.

    Attributes:
      trained: as of `jaxfm.federated.train`; `history` has a line for each round and each stretch
        of central steps.
      targets: predictions that losses were taken over, by kind of phase ("central", "federated"):
        the same number for two runs means that both have learned from as many tokens.
    """

    trained: TrainedRun
    targets: dict[str, float]


def alternate(
    algorithm: Algorithm | Prepared,
    data: Data,
    phases: Sequence[Phase],
    *,
    central: Central,
    cohort_size: int,
    variables: Variables | None = None,
    placement: Placement | None = None,
    seed: int = 0,
    drop_rate: float = 0.0,
    byte_budget: int | None = None,
    eval_every: int = 5,
    eval_examples: int = 512,
    test_examples: int = 0,
    central_chunk: int = 50,
    run_dir: str | os.PathLike[str] | None = None,
    log_to: Sequence[str] = (),
    mesh: Mesh | None = None,
    clients_at_once: int | None = None,
) -> FoundationRun:
    """Runs the phases in turn, or what an earlier process has left of them.

    Args:
      algorithm: of federated phases, any with a global model.
      data: central phases train on `data.public`, federated ones on `data.train`.
      phases: the schedule.
      central: how the server trains.
      variables: that the run starts from, such as those of a checkpoint; None: `model.init`.
      eval_every: rounds, or stretches of central steps, between evaluations; the end of a phase
        has one, too. Checkpoints as in `train`.
      byte_budget: as in `train`; it ends the schedule before a round.
      central_chunk: central steps of a stretch.
      cohort_size, placement, seed, drop_rate, eval_examples, test_examples, run_dir, log_to,
        mesh, clients_at_once: as in `train`.
    Raises:
      ValueError: settings out of range, central phases without public rows or on rows that lack
        what the task reads, a folder that holds a run of another schedule.
      NothingLearned: as of `train`.
    """
    steps = units(phases, central_chunk)
    mesh = make_mesh(clients=len(jax.devices())) if mesh is None else mesh
    if eval_every < 1:
        raise ValueError(f"eval_every={eval_every} must be at least 1.")
    is_central = any(unit.kind == "central" for unit in steps)
    if is_central:
        _check_public(data, central)
    setup = set_up(
        algorithm, data, cohort_size=cohort_size, variables=variables, placement=placement,
        seed=seed, drop_rate=drop_rate, byte_budget=byte_budget, eval_examples=eval_examples,
        mesh=mesh, clients_at_once=clients_at_once,
    )  # fmt: skip
    trainer = _trainer(setup, central, mesh) if is_central else None
    state = FoundationState(
        setup.state, () if trainer is None else trainer.first(setup.state.server.variables),
        put(np.int32(0), NamedSharding(mesh, PartitionSpec())), np.zeros(2),
    )  # fmt: skip

    def advance(number: int, state: FoundationState, account: Account):
        unit = steps[number - 1]
        if unit.kind == "central":
            assert trainer is not None
            state, line = trainer.train(state, unit.length)
        else:
            run, account, line = one_round(setup, number, state.run, account)
            seen = np.array([0, line["clients/targets"]])
            state = state._replace(run=run, targets=state.targets + seen)
        named = zip(("central", "federated"), state.targets.tolist(), strict=True)
        return state, account, line | {f"total/{kind}_targets": n for kind, n in named}

    def ends(number: int, state: FoundationState, account: Account) -> str:
        is_round = steps[number - 1].kind == "federated"
        return budget_ends(setup, state.run, account) if is_round else ""

    def check(number: int, state: FoundationState) -> None:
        _check_same(steps[:number], state)
        check_same_noise(setup.algorithm.privacy, state.run.server)

    last = np.cumsum([len(units([phase], central_chunk)) for phase in phases]).tolist()
    watch, server = lambda state: setup.watch(state.run), lambda state: state.run.server
    script = Script(advance=advance, watch=watch, server=server, ends=ends, check=check)
    played = play(
        script, state, no_account(len(data.names)), length=len(steps), eval_every=eval_every,
        names=data.names, run_dir=run_dir, log_to=log_to, due=lambda number: number in last,
    )  # fmt: skip
    trained = finished(setup, played, played.state.run, test_examples)
    kinds = zip(("central", "federated"), played.state.targets.tolist(), strict=True)
    return FoundationRun(trained, dict(kinds))


class _Trainer(NamedTuple):
    """Central training of a run's global model on its public rows.

    Attributes:
      first: `(variables) -> opt_state`, before the first step.
      train: `(state, length) -> (state, line)`, so many steps.
    """

    first: Callable[[Variables], PyTree]
    train: Callable[[FoundationState, int], tuple[FoundationState, Line]]


def _trainer(setup: Setup, central: Central, mesh: Mesh) -> _Trainer:
    """Small steps of a model of 16 bits are added up in 32."""
    model, everywhere = setup.algorithm.model, NamedSharding(mesh, PartitionSpec())
    if model is None:
        raise ValueError(
            "Central phases train the global model, and this algorithm has none: its clients keep "
            "models of their own."
        )
    is_narrow = has_halves(setup.state.server.variables)
    wide = widened if is_narrow else (lambda variables: variables)
    rows = {name: put(leaf, everywhere) for name, leaf in _public(setup.data)}
    program = central_steps(
        wide_model(model) if is_narrow else model, setup.data.task, central, mesh
    )

    def first(variables: Variables) -> PyTree:
        init = jax.jit(central.optimizer.init, out_shardings=everywhere)
        return init(wide(variables).params)

    def train(state: FoundationState, length: int) -> tuple[FoundationState, Line]:
        run, key = state.run, jax.random.fold_in(state.run.key, _CENTRAL)
        start = TrainState(wide(run.server.variables), state.opt_state, state.step, key)
        trained, total, targets = program(start, rows, jnp.int32(length))
        server, count = with_variables(run.server, trained.variables), float(targets)
        new = FoundationState(
            run._replace(server=server), trained.opt_state, trained.step,
            state.targets + np.array([count, 0]),
        )  # fmt: skip
        return new, {"train/loss": float(total) / count} if count else {}

    return _Trainer(first, train)


def _public(data: Data) -> list[tuple[str, Any]]:
    rows: Mapping[str, np.ndarray] = data.public or {}
    return [(name, np.asarray(leaf)) for name, leaf in rows.items()]


def _check_public(data: Data, central: Central) -> None:
    """Raises ValueError where central phases have nothing to train on."""
    if central.batch_size < 1:
        raise ValueError(f"central.batch_size={central.batch_size} must be at least 1.")
    if data.public is None:
        raise ValueError(
            "Central phases train on public rows, and the data have none: deal out a share of them "
            "(data.public=0.2)."
        )
    one = {name: leaf[:1] for name, leaf in _public(data)}
    try:
        jax.eval_shape(data.task.prepare, one, jax.random.key(0))
    except ValueError as error:
        raise ValueError(
            f"Central phases train on public rows, which have no labels: {error}"
        ) from None


def _check_same(done: Sequence[Phase], state: FoundationState) -> None:
    """Raises ValueError where a restored state is not what these units lead to."""
    expected, found = behind(done), (int(state.run.round), int(state.step))
    if expected != found:
        raise ValueError(
            f"The run has {found[0]} rounds and {found[1]} central steps behind it, where the "
            f"phases given would have {expected[0]} and {expected[1]}; give the phases that it was "
            "begun with, to which others may be added, or another folder."
        )
