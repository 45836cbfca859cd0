"""What a run of private rounds costs in (epsilon, delta), and the noise that a budget asks for.

Neighbours are two populations of the same clients, one of whom uploads zeros in one of them
(zeroing out: how many there are is public). A round releases the sum of its cohort's uploads, each
of norm C at most, plus Gaussian noise of standard deviation z C. With G_d(a) the hockey-stick
divergence of order a between two Gaussians that are d standard deviations apart, a round is bounded
by

    G(a) of 1/z                                   everybody in the cohort, or cohorts that are known
    the Gaussian of 1/z, Poisson-subsampled       cohorts of "poisson" sampling
    g ((1 - b) G_{2/z}(a') + b G_{1/z}(a'))       "fixed": cohorts of g N clients, drawn without
    g G_{1/z}(a')                                 replacement; with the client and without it

with a' = 1 + (a - 1) / g and b = a / a'. The last two are advanced joint convexity, applied to the
cohort with the client and the same cohort with another one in its place, at most 2 C from it: what
replaces the client in the cohort is why fixed sizes cost more than Poisson sampling. Rounds
compose by their privacy loss distributions ("pld") or by Renyi divergences ("rdp").
Sources: Balle, Barthe and Gaboardi 2018, theorems 2 and 9; Zhu, Dong and Wang 2022, section 3
(dominating pairs compose); Doroshenko et al. 2022 (their discretisation); Mironov 2017 and Wang,
Balle and Kasiviswanathan 2019, theorem 27 (Renyi). The arithmetic is that of dp-accounting.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple

import numpy as np

Kind = Literal["fixed", "poisson"]
Accountant = Literal["pld", "rdp"]

# The probability that a Poisson cohort has more clients than places; it is added to delta.
_OVERFLOW = 1e-16
_LARGEST_NOISE = 2.0**20
_ORDERS = (1.5, 2.0, 2.5, *range(3, 65), 96, 128, 256, 512, 1024)  # of Renyi divergences


class Sampling(NamedTuple):
    """How a run draws its cohorts.

    Attributes:
      num_clients: all that there are.
      cohort_size: clients drawn a round; with "poisson" on average.
      kind: "fixed": so many without replacement; "poisson": each by itself with the same
        probability, which the rounds draw where their algorithm says so.
      secret: whether nobody learns who was drawn, so that sampling adds to privacy. Where clients
        keep memories that later uploads depend on, these tell, and it is false.
    """

    num_clients: int
    cohort_size: int
    kind: Kind = "fixed"
    secret: bool = True

    @property
    def rate(self) -> float:
        """The probability that a client is drawn in a round."""
        return self.cohort_size / self.num_clients

    @property
    def places(self) -> int:
        """Clients for whom a round has places; a Poisson cohort exceeds them with 1e-16."""
        if self.kind == "fixed" or self.cohort_size == self.num_clients:
            return self.cohort_size
        from scipy.stats import binom

        return int(min(self.num_clients, binom.isf(_OVERFLOW, self.num_clients, self.rate) + 1))


class Privacy(NamedTuple):
    """The promise of a private run; `plan_privacy` makes one.

    Attributes:
      noise_multiplier: z, the noise's standard deviation over the clipping norm.
      delta: of the promise.
      epsilon: that is never exceeded; infinite: there is no limit.
      rounds: that the budget allows; None: any number.
      sampling: how cohorts are drawn.
      accountant: "pld" or "rdp".
    """

    noise_multiplier: float
    delta: float
    epsilon: float
    rounds: int | None
    sampling: Sampling
    accountant: Accountant = "pld"

    def spent(self, rounds: int) -> float:
        """The epsilon of this many rounds."""
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


def epsilon_of(
    noise_multiplier: float,
    rounds: int,
    delta: float,
    sampling: Sampling,
    *,
    accountant: Accountant = "pld",
) -> float:
    """The epsilon, at delta, of some rounds with noise of z = `noise_multiplier`.

    Args:
      noise_multiplier: z; without noise epsilon is infinite.
      rounds: how many; none cost nothing.
      delta: in (0, 1).
      sampling: how cohorts are drawn.
      accountant: "pld" or "rdp".
    """
    if not rounds:
        return 0.0
    if not noise_multiplier:
        return math.inf
    # Cohorts that exceed their places: P(E) <= e^eps Q(E) + delta + (1 + e^eps) overflow.
    overflow = rounds * _OVERFLOW if sampling.places < sampling.num_clients else 0.0
    kept = delta * (0.999 if sampling.kind == "poisson" and overflow else 1)
    if accountant == "rdp":
        epsilon = float(_composed_renyi(noise_multiplier, rounds, sampling).get_epsilon(kept))
    else:
        loss = _loss_of_a_round(noise_multiplier, sampling).self_compose(rounds)
        epsilon = float(loss.get_epsilon_for_delta(kept))
    if kept < delta and (1 + math.exp(min(epsilon, 700))) * overflow > delta - kept:
        return math.inf
    return epsilon


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


def _is_everybody(sampling: Sampling) -> bool:
    return not sampling.secret or sampling.cohort_size == sampling.num_clients


def _composed_renyi(noise: float, rounds: int, sampling: Sampling) -> Any:
    """The Renyi accountant after some rounds."""
    dp = _dp_accounting()
    from dp_accounting.rdp import rdp_privacy_accountant

    relations = dp.NeighboringRelation
    event, relation = dp.GaussianDpEvent(noise), relations.ADD_OR_REMOVE_ONE
    if not _is_everybody(sampling) and sampling.kind == "poisson":
        event = dp.PoissonSampledDpEvent(sampling.rate, event)
    elif not _is_everybody(sampling):  # replacing a client moves the sum by 2 C
        event, relation = dp.GaussianDpEvent(noise / 2), relations.REPLACE_ONE
        event = dp.SampledWithoutReplacementDpEvent(
            sampling.num_clients, sampling.cohort_size, event
        )
    accountant = rdp_privacy_accountant.RdpAccountant(_ORDERS, relation)
    return accountant.compose(dp.SelfComposedDpEvent(event, rounds))


@functools.lru_cache(maxsize=16)
def _loss_of_a_round(noise: float, sampling: Sampling) -> Any:
    """The privacy loss distribution of one round."""
    _dp_accounting()
    from dp_accounting.pld import pld_pmf
    from dp_accounting.pld import privacy_loss_distribution as pld

    everybody = _is_everybody(sampling)
    rate = 1.0 if everybody else sampling.rate
    farthest = (1 if everybody or sampling.kind == "poisson" else 2) / noise
    reach = farthest**2 / 2 + 9 * farthest  # of the loss without sampling, but for 1e-18
    largest = reach + math.log(rate) if reach > 30 else math.log1p(rate * math.expm1(reach))
    # Any step gives an upper bound; this one is a few millionths above that of a fine one.
    step = float(np.clip(largest / 3_000, 1e-5, 1e-2))
    if everybody or sampling.kind == "poisson":
        return pld.from_gaussian_mechanism(
            noise, sampling_prob=rate, value_discretization_interval=step
        )
    high = math.ceil(largest / step)
    orders = np.arange(high + 1) * step  # log a
    removed, added = _fixed_profiles(noise, rate, orders)
    full = lambda there, back: _hull(
        np.arange(-high, high + 1) * step,
        # For a < 1 the other direction holds: D_a(P, Q) = 1 - a + a D_{1/a}(Q, P).
        np.concatenate([(-np.expm1(-orders) + np.exp(-orders) * back)[:0:-1], there]),
    )
    make = lambda deltas: pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(
        step, -high, high, deltas
    )
    return pld.PrivacyLossDistribution(make(full(removed, added)), make(full(added, removed)))


def _fixed_profiles(noise: float, rate: float, log_a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of one round's hockey-stick divergences at orders a >= 1, for "fixed" sampling.

    Returns:
      From the sums with a client to those without it, and back; never above those without sampling.
    """
    # log a', without overflow; 1 + (a - 1) / rate = (a / rate) (1 - (1 - rate) / a).
    inner = np.maximum(log_a + np.log1p((rate - 1) * np.exp(-log_a)) - math.log(rate), 0.0)
    share = np.exp(log_a - inner)  # b
    near, far = _gaussian_profile(1 / noise, inner), _gaussian_profile(2 / noise, inner)
    known = _gaussian_profile(1 / noise, log_a)
    removed = rate * ((1 - share) * far + share * near)
    return np.minimum(removed, known), np.minimum(rate * near, known)


def _gaussian_profile(distance: float, log_a: np.ndarray) -> np.ndarray:
    """The hockey-stick divergence of order a of N(distance, 1) from N(0, 1).

    Source: Balle and Wang 2018, theorem 5.
    """
    from scipy.stats import norm

    first = norm.logcdf(distance / 2 - log_a / distance)
    second = log_a + norm.logcdf(-distance / 2 - log_a / distance)
    return np.exp(first) * -np.expm1(np.minimum(second - first, 0))


def _hull(log_a: np.ndarray, deltas: np.ndarray) -> np.ndarray:
    """The largest convex function of a below `deltas`: divergences are convex in a."""
    a, kept = np.exp(log_a), [0]
    for i in range(1, len(a)):
        while len(kept) > 1:
            x, y = kept[-2], kept[-1]
            if (deltas[y] - deltas[x]) * (a[i] - a[x]) < (deltas[i] - deltas[x]) * (a[y] - a[x]):
                break
            kept.pop()
        kept.append(i)
    return np.interp(a, a[kept], deltas[kept])


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


def _dp_accounting() -> Any:
    try:
        import dp_accounting
    except ImportError as error:
        raise ImportError(
            "Privacy accounting needs dp-accounting: install jaxfm[privacy]."
        ) from error
    return dp_accounting
