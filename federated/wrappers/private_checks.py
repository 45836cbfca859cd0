"""What can be private: the settings of `with_privacy`, and algorithms that it takes."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxfm.federated.accounting.privacy import Privacy
from jaxfm.federated.algorithm import Algorithm, Bucket, ClientData, Profile
from jaxfm.model import PyTree


class Quantile(NamedTuple):
    """Clipping at a quantile of the clients' norms, which is estimated privately.

        C <- C exp(-rate (b - target)),   b = 1/2 + (sum of (b_i - 1/2) + N(0, s^2)) / m

    with b_i = 1 where client i's norm is at most C, and s = m * noise. The sums of movements get a
    little more noise, z' = (z^-2 - (2 s)^-2)^(-1/2), so that both together cost what z costs.

    Attributes:
      target: share of clients that are not clipped.
      rate: of the geometric steps.
      noise: standard deviation of the share's noise over the cohort.
    """

    target: float = 0.5
    rate: float = 0.2
    noise: float = 0.05


REFUSED = {
    "sums": (
        "This algorithm's uploads are more than means of movements with one weight each (counts, "
        "coverage or control variates), to which a client's share has no bound; fed_avg, fed_prox, "
        "fed_adam, fed_yogi, fed_avg_m, fed_per and lg_fed_avg can be private."
    ),
    "statistics": (
        "This model's statistics of batch norm cannot be private, since noise would make variances "
        "negative; give a model with group norm or layer norm, or keep norms personal."
    ),
}


def keeps_memories(algorithm: Algorithm) -> bool:
    """Whether clients keep anything from round to round; also where that cannot be told.

    Later uploads then depend on who was drawn before, and tell it.
    """
    unknown = jnp.zeros((), jnp.float32)

    def memory(bucket: Bucket) -> PyTree:
        assert algorithm.model is not None
        variables = algorithm.model.init(jax.random.key(0))
        download = bucket.send(algorithm.init(variables), None)
        data = ClientData({}, jnp.zeros(1, jnp.int32), jnp.int32(1))
        return bucket.init_client(download, data, Profile(*[unknown] * 5), jax.random.key(0))

    plain = Bucket._field_defaults["init_client"]
    for bucket in algorithm.buckets:
        if bucket.init_client is plain:
            continue
        try:
            kept = jax.eval_shape(lambda bucket=bucket: memory(bucket))
        except Exception:  # it looks into data or public rows, which are not known yet
            return True
        if jax.tree.leaves(kept):
            return True
    return False


def check_settings(
    privacy: Privacy, clip: float, adapt: Quantile | None, noise: str, least_reports: int
) -> None:
    """Raises ValueError where settings of `with_privacy` are out of range or do not fit."""
    cohort = privacy.sampling.cohort_size
    if not 0 < clip < math.inf:
        raise ValueError(f"clip={clip} must be a norm above 0.")
    if noise not in ("server", "clients"):
        raise ValueError(f"noise={noise!r}: it is of the 'server' or of the 'clients'.")
    if least_reports and noise == "server":
        raise ValueError(f"least_reports={least_reports} is for noise of the clients.")
    if not 0 <= least_reports <= cohort:
        raise ValueError(
            f"least_reports={least_reports} must be from 1 to the cohort, {cohort}, or 0 for it."
        )
    if privacy.strategy is not None and (adapt is not None or noise == "clients"):
        raise ValueError(
            "Noise that is correlated over rounds is the server's, of one scale: leave the "
            "adaptive norm and the clients' noise out."
        )
    if adapt is None:
        return
    if noise == "clients":
        raise ValueError(
            "A clipping norm that adapts needs the server's noise on the share of clipped clients; "
            "leave noise to the server, or give a fixed norm."
        )
    if not (0 < adapt.target < 1 and adapt.rate > 0 and adapt.noise > 0):
        raise ValueError(f"{adapt}: target must be in (0, 1), and rate and noise above 0.")
    least = privacy.noise_multiplier / (2 * cohort)
    if adapt.noise <= least:
        raise ValueError(
            f"noise={adapt.noise} of the quantile alone would cost more than the noise multiplier "
            f"{privacy.noise_multiplier:.3g} allows; give more than {least:.3g}."
        )


def check_algorithm(algorithm: Algorithm, amplified: bool) -> None:
    """Raises ValueError where an algorithm cannot be private.

    Args:
      algorithm: to be wrapped.
      amplified: whether the accounting takes it that nobody learns who was drawn.
    """
    if algorithm.privacy is not None:
        raise ValueError("This algorithm is private already.")
    if any(bucket.sends_predictions for bucket in algorithm.buckets):
        raise ValueError(
            "This algorithm uploads predictions on public rows; only movements of parameters can "
            "be private."
        )
    if len(algorithm.buckets) != 1:
        raise ValueError(
            "Clients of this algorithm train unequal models, so how many move a coordinate depends "
            "on who was drawn; only algorithms with one kind of client can be private."
        )
    bucket = algorithm.buckets[0]
    if bucket.combine is not None:
        raise ValueError(
            "This aggregation is no sum (a median, say), so one client's influence on it is not "
            "bounded by clipping; privacy needs a sum."
        )
    if bucket.travels is not None:
        raise ValueError(REFUSED["sums"])
    if amplified and keeps_memories(algorithm):
        raise ValueError(
            "Clients of this algorithm keep memories that tell who was drawn before, so sampling "
            "adds nothing to their privacy: plan it with Sampling(..., secret=False)."
        )
