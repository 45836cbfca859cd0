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
replaces the client in the cohort is why fixed sizes cost more than Poisson sampling. Where clients
take turns ("in_turn"), one is in every N / m rounds of cohorts of m, and only these count. Rounds
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

Kind = Literal["fixed", "poisson", "in_turn"]
Accountant = Literal["pld", "rdp"]

# The probability that a Poisson cohort has more clients than places; it is added to delta.
_OVERFLOW = 1e-16
_ORDERS = (1.5, 2.0, 2.5, *range(3, 65), 96, 128, 256, 512, 1024)  # of Renyi divergences


class Sampling(NamedTuple):
    """How a run draws its cohorts.

    Attributes:
      num_clients: all that there are.
      cohort_size: clients drawn a round; with "poisson" on average.
      kind: "fixed": so many without replacement; "poisson": each by itself with the same
        probability; "in_turn": all clients one after another, in an order that stays. The rounds
        of a private algorithm draw as it says.
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
    def separation(self) -> int:
        """Rounds from one turn of a client to its next, at least, where they take turns."""
        return self.num_clients // self.cohort_size

    @property
    def places(self) -> int:
        """Clients for whom a round has places; a Poisson cohort exceeds them with 1e-16."""
        if self.kind != "poisson" or self.cohort_size == self.num_clients:
            return self.cohort_size
        from scipy.stats import binom

        return int(min(self.num_clients, binom.isf(_OVERFLOW, self.num_clients, self.rate) + 1))


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
    if sampling.kind == "in_turn":
        rounds = math.ceil(rounds / sampling.separation)
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


def _is_everybody(sampling: Sampling) -> bool:
    if sampling.kind == "in_turn":
        return True
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


def _dp_accounting() -> Any:
    try:
        import dp_accounting
    except ImportError as error:
        raise ImportError(
            "Privacy accounting needs dp-accounting: install jaxfm[privacy]."
        ) from error
    return dp_accounting
