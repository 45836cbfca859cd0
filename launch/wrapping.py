"""The wrappers of a run, from its config, in the order in which they stand around the algorithm."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxfm.config import check, check_whole, option
from jaxfm.data.dealing import Data
from jaxfm.federated.algorithm import Algorithm
from jaxfm.federated.local import UNLIMITED_STEPS
from jaxfm.federated.wrappers.compression import named_compression
from jaxfm.federated.wrappers.quorum import with_quorum
from jaxfm.federated.wrappers.robust import BY_FRACTION, RuleName, named_robust
from jaxfm.federated.wrappers.robust_rules import check_fraction
from jaxfm.federated.wrappers.secure import with_secure_sums

_LIMIT, _THRESHOLD = 0.0, 2


@dataclasses.dataclass(frozen=True)
class SecureConfig:
    """Secure sums: the server reads the sum of the uploads, and none of them."""

    on: bool = option(False, "sum uploads as words modulo 2^32, to which clients can add masks")
    limit: float = option(
        _LIMIT,
        "largest magnitude of what one client adds to a sum, such as examples times movement; "
        "what is larger is clipped, and steps grow with it; 0: it follows the uploads",
    )
    threshold: int = option(
        _THRESHOLD, "fewest clients whose sum is read; a round of fewer is lost"
    )

    def __post_init__(self):
        check(self)
        check_whole(self, {"threshold": 1, "limit": 0}, "secure.")
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


def wrapped(
    config: Any, num_clients: int, data: Data | None = None
) -> Callable[[Algorithm], Algorithm]:
    """Returns what puts a run's wrappers around its algorithm, the innermost first.

    Args:
      config: of the run.
      num_clients: all that there are.
      data: of the run, whose public rows robust=fl_trust trains on.
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

    root = _root_rows(data) if robust.rule == "fl_trust" else None

    def wrap(algorithm: Algorithm) -> Algorithm:
        algorithm = named_robust(
            algorithm,
            rule=robust.rule,
            fraction=robust.fraction,
            bound=robust.bound,
            root=root,
            root_steps=config.max_steps or UNLIMITED_STEPS,
        )
        if private.on:  # innermost: what is encoded, rounded or added up later is clipped
            algorithm = private.around(algorithm, config, num_clients)
        if secure.on:  # around clipping, noise and other aggregations; downloads are not hidden
            # Uploads that are clipped need no wider range; a narrow one has finer steps.
            limit = private.limit(algorithm) if private.on else None
            algorithm = with_secure_sums(
                algorithm,
                config.cohort_size,
                limit=secure.limit or limit,
                threshold=secure.threshold,
            )
        algorithm = named_compression(
            algorithm, upload=config.upload, download=config.download, top_share=config.top_k
        )
        return with_quorum(algorithm, config.quorum) if config.quorum else algorithm

    return wrap


def _root_rows(data: Data | None) -> Mapping[str, Any]:
    """The server's own rows, which must say all that the clients' do."""
    if data is None or data.public is None:
        raise ValueError("robust=fl_trust trains on rows of the server's own: give --data.public.")
    lacking = data.train.examples.keys() - data.public.keys()
    if lacking:
        raise ValueError(
            f"robust=fl_trust trains on public rows, which have no {sorted(lacking)[0]!r} here; it "
            "is for language models, whose rows are text alone."
        )
    return data.public
