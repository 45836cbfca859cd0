"""The wrappers of a run, from its config, in the order in which they stand around the algorithm."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

from jaxfm.config import check, check_whole, option
from jaxfm.federated.accounting.privacy import Sampling, plan_privacy
from jaxfm.federated.algorithm import Algorithm
from jaxfm.federated.wrappers.compression import named_compression
from jaxfm.federated.wrappers.private import Quantile, keeps_memories, with_privacy
from jaxfm.federated.wrappers.quorum import with_quorum
from jaxfm.federated.wrappers.robust import BY_FRACTION, RuleName, named_robust
from jaxfm.federated.wrappers.robust_rules import check_fraction
from jaxfm.federated.wrappers.secure import with_secure_sums

_LIMIT, _THRESHOLD = 2.0**14, 2


@dataclasses.dataclass(frozen=True)
class PrivateConfig:
    """Differential privacy of clients, around algorithms that average movements."""

    epsilon: float = option(
        0.0, "budget of the whole run, which is never exceeded; 0: no privacy, or none set"
    )
    delta: float = option(1e-5, "probability with which epsilon may not hold")
    noise_multiplier: float = option(
        0.0, "deviation of the noise over the clipping norm; 0: as the budget asks for"
    )
    clip: float = option(1.0, "largest norm of a client's movement; with a quantile, the first one")
    quantile: float = option(
        0.0, "share of clients that are not clipped, which the norm then follows; 0: it stays"
    )
    sampling: Literal["poisson", "fixed"] = option(
        "poisson",
        "how a cohort is drawn: each client by itself, cohort_size on average, or cohort_size of "
        "them, which costs more",
    )
    noise: Literal["server", "clients"] = option(
        "server", "who adds it: the server once, or each client a share (for --secure)"
    )
    least_reports: int = option(
        0, "noise=clients: reports that hold enough noise, and without which a round is lost; "
        "0: cohort_size"
    )  # fmt: skip
    accountant: Literal["pld", "rdp"] = option(
        "pld", "how rounds add up: loss distributions, or Renyi divergences, which say more"
    )

    def __post_init__(self):
        check(self)
        check_whole(
            self,
            {"epsilon": 0, "noise_multiplier": 0, "quantile": 0, "least_reports": 0},
            "private.",
        )
        if self.quantile >= 1:
            raise ValueError(f"private.quantile={self.quantile}: give a share below 1.")
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        if given and not self.on:
            raise ValueError(
                f"private.{given[0]}={getattr(self, given[0])} changes nothing without "
                "--private.epsilon or --private.noise_multiplier."
            )

    @property
    def on(self) -> bool:
        """Whether the run is private."""
        return self.epsilon > 0 or self.noise_multiplier > 0

    def limit(self, algorithm: Algorithm) -> float:
        """The largest magnitude that an upload of the private algorithm has, but for 1e-15."""
        assert algorithm.privacy is not None
        clip = 16 * self.clip if self.quantile else self.clip
        if self.noise == "server":
            return max(1.0, clip)
        least = self.least_reports or algorithm.privacy.sampling.cohort_size
        share = algorithm.privacy.noise_multiplier * clip / math.sqrt(least)
        return max(1.0, clip + 8 * share)

    def around(self, algorithm: Algorithm, config: Any, num_clients: int) -> Algorithm:
        """The private algorithm of a run."""
        secret = not keeps_memories(algorithm)
        kind: Literal["poisson", "fixed"] = self.sampling if secret else "fixed"
        if self.noise == "clients":
            kind = "fixed"  # so many shares of noise
        privacy = plan_privacy(
            Sampling(num_clients, config.cohort_size, kind, secret),
            delta=self.delta, epsilon=self.epsilon or math.inf,
            noise_multiplier=self.noise_multiplier, rounds=config.rounds,
            accountant=self.accountant,
        )  # fmt: skip
        return with_privacy(
            algorithm, privacy, clip=self.clip, noise=self.noise,
            adapt=Quantile(self.quantile) if self.quantile else None,
            least_reports=self.least_reports,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SecureConfig:
    """Secure sums: the server reads the sum of the uploads, and none of them."""

    on: bool = option(False, "sum uploads as words modulo 2^32, to which clients can add masks")
    limit: float = option(
        _LIMIT,
        "largest magnitude of what one client adds to a sum, such as examples times movement; "
        "what is larger is clipped, and a smaller limit makes finer steps",
    )
    threshold: int = option(
        _THRESHOLD, "fewest clients whose sum is read; a round of fewer is lost"
    )

    def __post_init__(self):
        check(self)
        check_whole(self, {"threshold": 1}, "secure.")
        if not self.on and (self.limit, self.threshold) != (_LIMIT, _THRESHOLD):
            raise ValueError("secure.limit and secure.threshold change nothing without --secure.")


_FRACTION = 0.3


@dataclasses.dataclass(frozen=True)
class RobustConfig:
    """How uploads of which some are false become one."""

    rule: RuleName = option(
        "none",
        "in the place of the mean, for algorithms whose uploads are means, with one kind of client",
    )
    fraction: float = option(
        _FRACTION, "share of adversaries that trimmed_mean, krum and multi_krum hold, below 0.5"
    )
    bound: float = option(0.0, "largest norm of a movement, for norm_bound; 0: their median")

    def __post_init__(self):
        check(self)
        check_fraction(self.fraction, "robust.")
        if not 0 <= self.bound < float("inf"):
            raise ValueError(f"robust.bound={self.bound}: give a norm above 0, or 0.")
        for name, default, rules in (
            ("fraction", _FRACTION, BY_FRACTION),
            ("bound", 0.0, ("norm_bound",)),
        ):
            if getattr(self, name) != default and self.rule not in rules:
                raise ValueError(
                    f"robust.{name}={getattr(self, name)} changes nothing with "
                    f"robust={self.rule}: it is for {', '.join(rules)}."
                )


def wrapped(config: Any, num_clients: int) -> Callable[[Algorithm], Algorithm]:
    """Returns what puts a run's wrappers around its algorithm, the innermost first.

    Args:
      config: of the run.
      num_clients: all that there are.
    """
    private, secure = config.private, config.secure
    if secure.on and config.upload != "full":
        raise ValueError(
            f"upload={config.upload} cannot be combined with --secure: compressed uploads cannot "
            "be added up before they are restored; leave out --upload."
        )
    robust = config.robust
    if robust.rule in BY_FRACTION[1:] and config.cohort_size < 3:
        raise ValueError(f"robust={robust.rule} needs cohort_size of at least 3.")

    # Uploads that are clipped need no wider range; a narrow one has finer steps.
    default_limit = private.on and secure.limit == _LIMIT

    def wrap(algorithm: Algorithm) -> Algorithm:
        algorithm = named_robust(
            algorithm, rule=robust.rule, fraction=robust.fraction, bound=robust.bound
        )
        if private.on:  # innermost: what is encoded, rounded or added up later is clipped
            algorithm = private.around(algorithm, config, num_clients)
        if secure.on:  # around clipping, noise and other aggregations; downloads are not hidden
            algorithm = with_secure_sums(
                algorithm,
                algorithm.privacy.sampling.places if algorithm.privacy else config.cohort_size,
                limit=private.limit(algorithm) if default_limit else secure.limit,
                threshold=secure.threshold,
            )
        algorithm = named_compression(
            algorithm, upload=config.upload, download=config.download, top_share=config.top_k
        )
        return with_quorum(algorithm, config.quorum) if config.quorum else algorithm

    return wrap
