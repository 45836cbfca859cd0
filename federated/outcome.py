"""What became of a run: its account, its warnings, its end where nothing is learned, its JSON."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.federated.accounting.ledger import client_work, first_downloads, round_costs
from jaxfm.federated.accounting.resources import simulated
from jaxfm.federated.client import problems
from jaxfm.federated.cohort import RoundInfo, Status
from jaxfm.federated.placement import Placement
from jaxfm.log import say_figures
from jaxfm.model import PyTree, Variables

SIMULATED = ("seconds", "joules")  # 0 without machines
TOTALS = (
    "bytes_down", "bytes_up", "flops", "selected", "reported", "non_finite", "absent", *SIMULATED,
)  # fmt: skip
_NAMED = 8  # clients that a sentence names


class NothingLearned(RuntimeError):
    """A run whose clients or whose server have nothing finite left to learn from."""


class Account(NamedTuple):
    """What a run adds up over its rounds; saved with its state.

    Attributes:
      totals: f64, of all clients, in the order of `TOTALS`.
      served: bool[C], who has been drawn, and so holds the frozen parameters.
      failures: i64[C], updates of each client that were not finite.
    """

    totals: np.ndarray
    served: np.ndarray
    failures: np.ndarray

    def total(self, name: str) -> float:
        """One of `TOTALS`."""
        return float(self.totals[TOTALS.index(name)])


def no_account(num_clients: int) -> Account:
    """The account before the first round."""
    return Account(
        totals=np.zeros(len(TOTALS)),
        served=np.zeros(num_clients, bool),
        failures=np.zeros(num_clients, np.int64),
    )


def totals_by_name(account: Account, placement: Placement) -> dict[str, float]:
    """The totals; those that are simulated only where there are machines."""
    named = dict(zip(TOTALS, account.totals.tolist(), strict=True))
    left_out = () if placement.machines is not None else SIMULATED
    return {name: value for name, value in named.items() if name not in left_out}


def add_round(
    account: Account, placement: Placement, info: RoundInfo
) -> tuple[Account, dict[str, float]]:
    """Adds one round to the account; returns it and the round's line of the log.

    The line has no training loss where no update counted: the mean over nothing is not a number.
    """
    costs, bucket = placement.costs, placement.bucket
    first, served = first_downloads(info, bucket, account.served, len(costs))
    selected, reported, failed = (
        float(x.sum()) for x in (info.selected, info.counted, info.non_finite)
    )
    spent = round_costs(costs, info, first)
    spent |= {"selected": selected, "reported": reported, "non_finite": failed}
    spent |= {"absent": selected - reported - failed} | dict.fromkeys(SIMULATED, 0.0)
    if placement.machines is not None:
        spent |= simulated(placement.machines, client_work(costs, bucket, info))
    if "seconds" in info.server:  # of a clock, which does not wait for the slowest
        spent["seconds"] = float(np.sum(info.server["seconds"]))
    failures = account.failures.copy()
    failures[info.cohort.client[info.cohort.status == Status.NON_FINITE]] += 1
    after = Account(account.totals + [spent[name] for name in TOTALS], served, failures)
    count = float(info.loss_count.sum())
    line = {"train/loss": float(info.loss_total.sum()) / count} if count > 0 else {}
    line |= {
        "clients/reported": reported,
        "clients/non_finite": failed,
        "clients/absent": spent["absent"],
        "clients/steps": float(info.spent.steps.sum()),
        "clients/targets": float(info.loss_count.sum()),
    }
    line |= {f"server/{name}": float(np.mean(x)) for name, x in info.server.items()}
    line |= {f"total/{name}": x for name, x in totals_by_name(after, placement).items()}
    return after, line


def warn(number: int, info: RoundInfo, names: Sequence[str]) -> None:
    """Says on standard error whose updates were left out, and where nobody reported."""
    who = np.asarray(info.cohort.client)[np.asarray(info.cohort.status) == Status.NON_FINITE]
    if len(who):
        one = len(who) == 1
        _say(
            f"Round {number}: {'the update' if one else 'the updates'} of {counted(who, names)} "
            f"{'was' if one else 'were'} not finite and left out."
        )
    if (clipped := np.sum(info.server.get("secure_clipped", 0))) > 0:
        _say(
            f"Round {number}: {clipped:.0f} entries of uploads were beyond the limit of secure "
            "sums and clipped; the limit follows them, or give a larger --secure.limit."
        )
    if not len(who) and not info.counted.sum():
        _say(f"Round {number}: none of the {info.selected.sum():.0f} clients drawn reported.")


def say_line(number: int, num_rounds: int, line: Mapping[str, float]) -> None:
    """Says how far a run is, where no progress bar does."""
    reported = line.get("clients/reported")
    who = "trained on public rows" if reported is None else f"{reported:.0f} clients reported"
    say_figures(f"Round {number} of {num_rounds}: {who}", line)


def say_test(rows: int, clients: int) -> None:
    """Says that rounds are over; reading the test sets can take as long as many rounds."""
    _say(f"Measuring on {rows} test rows and on those of {clients} clients.")


def check_progress(
    number: int, before: Account, now: Account, variables: Variables, names: Sequence[str]
) -> None:
    """Stops a run that goes on for nothing; for every evaluation.

    Args:
      number: rounds done.
      before, now: the account at the evaluation before and at this one.
      variables: the global model.
      names: of the clients.
    Raises:
      NothingLearned: clients sent updates since the last evaluation, and none was finite; or the
        global model is not finite.
    """
    failed = now.total("non_finite") - before.total("non_finite")
    if failed and now.total("reported") == before.total("reported"):
        who = counted(np.flatnonzero(now.failures > before.failures), names)
        raise NothingLearned(
            f"Stopped after round {number}: since the last evaluation all {failed:.0f} updates "
            f"that clients sent were not finite, those of {who}; lower the learning rate of local "
            "training, or look at these clients' rows."
        )
    model = {"params": variables.params, "stats": variables.stats}
    if not _all_finite(model):
        where = problems(0, upload=jax.device_get(model))[0].leaf
        raise NothingLearned(
            f"Stopped after round {number}: the global model is not finite, {where}; lower the "
            "learning rate of the server or of local training."
        )


def check_reports(account: Account) -> None:
    """Raises NothingLearned where no client has reported in the whole run."""
    if not account.total("reported"):
        raise NothingLearned(
            f"Nothing was learned: none of the {account.total('selected'):.0f} clients drawn "
            f"reported ({account.total('absent'):.0f} dropped out or hold no rows, "
            f"{account.total('non_finite'):.0f} sent updates that were not finite); lower the "
            "drop rate, or give more rounds."
        )


def counted(who: Sequence[int] | np.ndarray, names: Sequence[str]) -> str:
    """ "3 clients (client 0, client 4, client 7)": how many, and the first of them by name."""
    some = ", ".join(names[i] for i in who[:_NAMED]) + (", ..." if len(who) > _NAMED else "")
    return f"{len(who)} client{'s' * (len(who) != 1)} ({some})"


def left_out(totals: Mapping[str, float], failures: np.ndarray, names: Sequence[str]) -> str:
    """A sentence on the updates that did not count; empty where all did."""
    absent, failed = totals["absent"], totals["non_finite"]
    if not absent and not failed:
        return ""
    sentence = f"Of {totals['selected']:.0f} clients drawn, {absent:.0f} did not report"
    if failed:
        order = np.argsort(-failures, kind="stable")[: np.count_nonzero(failures)]
        sentence += (
            f" and {failed:.0f} sent updates that were not finite and were left out, of "
            f"{counted(order, names)}"
        )
    return sentence + "."


def untrained_rest(own: int, full: int) -> str:
    """A sentence where the largest model that clients train is a part of the global one.

    Args:
      own, full: parameters of the one and of the other.
    """
    if own >= full:
        return ""
    return (
        f"Nobody trains the full model: the largest that clients train, {own:,} of {full:,} "
        "parameters, stands for the global one."
    )


def numbers(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics as JSON has them: None for what is not finite."""
    return {name: float(x) if math.isfinite(x) else None for name, x in metrics.items()}


@jax.jit
def _all_finite(tree: PyTree) -> jax.Array:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.array([jnp.isfinite(x).all() for x in floats]).all()


def _say(sentence: str) -> None:
    if jax.process_index() == 0:
        print(sentence, file=sys.stderr, flush=True)
