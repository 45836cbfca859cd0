"""The promise of a private run: noise from a budget, or rounds; what rounds and examples cost."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from jaxfm.federated.accounting.correlated import Strategy, banded_strategy, buffered_strategy
from jaxfm.federated.accounting.epsilon import Accountant, Sampling, epsilon_of

_LARGEST_NOISE = 2.0**20


class Privacy(NamedTuple):
    """The promise of a private run; `plan_privacy` makes one.

    Attributes:
      noise_multiplier: z, the noise's standard deviation over the clipping norm.
      delta: of the promise.
      epsilon: that is never exceeded; infinite: there is no limit.
      rounds: that the budget allows; None: any number.
      sampling: how cohorts are drawn.
      accountant: "pld" or "rdp".
      strategy: how noise is correlated over rounds in which clients take turns; None: it is not.
    """

    noise_multiplier: float
    delta: float
    epsilon: float
    rounds: int | None
    sampling: Sampling
    accountant: Accountant = "pld"
    strategy: Strategy | None = None

    def spent(self, rounds: int) -> float:
        """The epsilon of this many rounds."""
        if self.strategy is not None:  # one Gaussian mechanism
            if not rounds:
                return 0.0
            noise = self.noise_multiplier / self.strategy.sensitivity(rounds)
            return epsilon_of(noise, 1, self.delta, Sampling(1, 1), accountant=self.accountant)
        return epsilon_of(
            self.noise_multiplier, rounds, self.delta, self.sampling, accountant=self.accountant
        )

    def ends(self, rounds: int) -> str:
        """A sentence if one more round would exceed the budget; else empty."""
        if self.rounds is None or rounds < self.rounds:
            return ""
        return (
            f"Stopped after round {rounds}: one more would exceed the privacy budget, an epsilon "
            f"of {self.epsilon:g} at a delta of {self.delta:g}."
        )

    def report(self, rounds: int) -> dict[str, Any]:
        """The promise and what this many rounds have cost of it, as JSON has them."""
        spent = self.spent(rounds)
        return {
            "epsilon": spent if math.isfinite(spent) else None,
            "budget": self.epsilon if math.isfinite(self.epsilon) else None,
            "delta": self.delta,
            "rounds": rounds,
            "noise_multiplier": self.noise_multiplier,
            "accountant": self.accountant,
            "neighbours": "one client's upload is there, or is zeros",
        } | self.sampling._asdict()


@functools.lru_cache(maxsize=16)
def plan_privacy(
    sampling: Sampling,
    *,
    delta: float,
    epsilon: float = math.inf,
    noise_multiplier: float = 0.0,
    rounds: int,
    accountant: Accountant = "pld",
) -> Privacy:
    """The promise of a run: the noise that its budget asks for, or the rounds that it allows.

    Args:
      sampling: how cohorts are drawn.
      delta: probability with which epsilon may not hold; below 1 / num_clients.
      epsilon: the budget; infinite: none.
      noise_multiplier: z; 0: the least with which `rounds` rounds cost `epsilon` at most.
      rounds: of the whole run.
      accountant: "pld" (the tighter one) or "rdp".
    Raises:
      ValueError: a value out of range, neither a budget nor noise, or a budget that not even one
        round keeps to.
      ImportError: dp-accounting is missing.
    """
    _check(sampling, epsilon, delta, noise_multiplier, rounds)
    cost = functools.partial(epsilon_of, delta=delta, sampling=sampling, accountant=accountant)
    if not noise_multiplier:
        noise = _least_noise(lambda z: cost(z, rounds), epsilon)
        return Privacy(noise, delta, epsilon, rounds, sampling, accountant)
    allowed: int | None = None
    if math.isfinite(epsilon):
        allowed = _most_rounds(lambda count: cost(noise_multiplier, count), epsilon, rounds)
        if not allowed:
            raise ValueError(
                f"noise_multiplier={noise_multiplier}: one round alone costs an epsilon of "
                f"{cost(noise_multiplier, 1):.3g}, above the budget of {epsilon}; give more noise, "
                "or leave it out to have it calculated."
            )
    return Privacy(noise_multiplier, delta, epsilon, allowed, sampling, accountant)


@functools.lru_cache(maxsize=16)
def plan_correlated(
    sampling: Sampling,
    *,
    delta: float,
    epsilon: float,
    rounds: int,
    bands: int = 0,
    buffers: int = 0,
    accountant: Accountant = "pld",
) -> Privacy:
    """The promise of a run whose clients take turns, with noise that is correlated over rounds.

    Args:
      sampling: "in_turn".
      delta, epsilon, accountant: as of `plan_privacy`; the noise is calculated.
      rounds: of the whole run, all of which the budget allows.
      bands: as of `banded_strategy`.
      buffers: as of `buffered_strategy`; 0: bands.
    Raises:
      ValueError: as of `plan_privacy` and of the strategies; another kind of sampling.
    """
    _check(sampling, epsilon, delta, 0.0, rounds)
    if sampling.kind != "in_turn":
        raise ValueError(
            f"kind={sampling.kind!r}: noise that is correlated over rounds is for clients that "
            "take turns; give Sampling(..., kind='in_turn')."
        )
    if buffers:
        strategy = buffered_strategy(rounds, sampling.separation, buffers)
    else:
        strategy = banded_strategy(rounds, sampling.separation, bands)
    known = Sampling(1, 1)
    noise = _least_noise(lambda z: epsilon_of(z, 1, delta, known, accountant=accountant), epsilon)
    noise *= strategy.sensitivity(rounds)
    return Privacy(noise, delta, epsilon, rounds, sampling, accountant, strategy)


def example_epsilons(
    counts: np.ndarray,
    steps: np.ndarray,
    *,
    batch_size: int,
    noise_multiplier: float,
    delta: float,
    accountant: Accountant = "rdp",
) -> np.ndarray:
    """What DP-SGD on clients has cost the examples of each: f64[C], at delta.

    Args:
      counts: i[C], rows of each client.
      steps: i[C], its local steps in the whole run.
      batch_size, noise_multiplier: of `Local` and its `private`.
      delta, accountant: as in `epsilon_of`.
    """

    @functools.cache
    def cost(count: int, steps: int) -> float:
        if not count or not steps:
            return 0.0
        sampling = Sampling(count, min(batch_size, count), "poisson")
        return epsilon_of(noise_multiplier, steps, delta, sampling, accountant=accountant)

    return np.array([cost(int(n), int(k)) for n, k in zip(counts, steps, strict=True)])


def epsilon_line(privacy: Privacy | None, server: Any) -> dict[str, float]:
    """The epsilon of a private algorithm's state for the log; nothing where it has none."""
    if privacy is None:
        return {}
    return {"private/epsilon": privacy.spent(int(server.released))}


def check_same_noise(privacy: Privacy | None, server: Any) -> None:
    """Raises ValueError where a private run that goes on had other noise in its rounds so far."""
    if privacy is None:
        return
    before = float(server.noise_multiplier)
    if not math.isclose(before, privacy.noise_multiplier, rel_tol=1e-5):
        raise ValueError(
            f"The {int(server.released)} rounds so far had a noise multiplier of {before:.4g}, and "
            f"this run asks for {privacy.noise_multiplier:.4g}; give as many rounds as before, or "
            "another folder."
        )


def _least_noise(cost: Any, epsilon: float) -> float:
    """The least z, to a thousandth, with cost(z) <= epsilon."""
    high = 1.0
    while cost(high) > epsilon:
        high *= 2
        if high > _LARGEST_NOISE:
            raise ValueError(f"epsilon={epsilon}: no noise up to {high:.0f} keeps to it.")
    low = high / 2
    while cost(low) <= epsilon and low > 1 / _LARGEST_NOISE:
        low, high = low / 2, low
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if cost(middle) <= epsilon else (middle, high)
    return high


def _most_rounds(cost: Any, epsilon: float, wanted: int) -> int:
    """The largest number of rounds up to `wanted` whose cost is epsilon at most."""
    if cost(wanted) <= epsilon:
        return wanted
    low, high = 0, wanted  # the one is allowed, and the other is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= epsilon else (low, middle)
    return low


def _check(
    sampling: Sampling, epsilon: float, delta: float, noise_multiplier: float, rounds: int
) -> None:
    if not epsilon > 0:
        raise ValueError(f"epsilon={epsilon} must be a number above 0; infinity is no budget.")
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta} must be a probability above 0 and below 1.")
    if delta > 1 / sampling.num_clients:
        raise ValueError(
            f"delta={delta} would allow to publish one of {sampling.num_clients} clients as it "
            f"is; give less than {1 / sampling.num_clients:.2g}."
        )
    if not 0 <= noise_multiplier < math.inf:
        raise ValueError(
            f"noise_multiplier={noise_multiplier} must be a number above 0, or 0 to have it "
            "calculated."
        )
    if not noise_multiplier and not math.isfinite(epsilon):
        raise ValueError("A private run needs a budget: give epsilon, or noise_multiplier.")
    if not 1 <= sampling.cohort_size <= sampling.num_clients:
        raise ValueError(
            f"cohort_size={sampling.cohort_size} must be from 1 to the number of clients, "
            f"{sampling.num_clients}."
        )
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1.")
