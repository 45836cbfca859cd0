"""The privacy of a run, of its clients or of their examples, from its config."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import numpy as np

from jaxfm.config import check, check_whole, option
from jaxfm.data.dealing import Data
from jaxfm.federated.accounting.epsilon import Kind, Sampling
from jaxfm.federated.accounting.privacy import example_epsilons, plan_correlated, plan_privacy
from jaxfm.federated.algorithm import Algorithm
from jaxfm.federated.cohort import cohorts_of, times_drawn
from jaxfm.federated.local import Local
from jaxfm.federated.parts.private_gradient import ExamplePrivacy
from jaxfm.federated.placement import wanted_steps
from jaxfm.federated.preparation import Prepared
from jaxfm.federated.rounds import RunState
from jaxfm.federated.wrappers.private import with_privacy
from jaxfm.federated.wrappers.private_checks import Quantile, keeps_memories


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
    sampling: Literal["poisson", "fixed", "in_turn"] = option(
        "poisson",
        "how a cohort is drawn: each client by itself, cohort_size on average; so many of them, "
        "which costs more; or in turn, with noise that later rounds take back in part (DP-FTRL)",
    )
    bands: int = option(
        0, "sampling=in_turn: rounds whose noise a round takes back, and one; 0: at most 8"
    )
    buffers: int = option(
        0, "sampling=in_turn: takes noise back over all later rounds (BLT), with as many copies of "
        "the model on the server; 0: bands"
    )  # fmt: skip
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
            {"epsilon": 0, "noise_multiplier": 0, "quantile": 0, "least_reports": 0, "bands": 0,
             "buffers": 0},
            "private.",
        )  # fmt: skip
        for name in ("bands", "buffers"):
            value = getattr(self, name)
            if value and (self.sampling != "in_turn" or self.noise_multiplier):
                raise ValueError(
                    f"private.{name}={value} is for --private.sampling=in_turn with noise that the "
                    "budget asks for."
                )
        if self.bands and self.buffers:
            raise ValueError(
                f"private.bands={self.bands} and private.buffers={self.buffers}: give one of them."
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
        kind: Kind = self.sampling
        if kind == "poisson" and (self.noise == "clients" or not secret):
            kind = "fixed"  # so many shares of noise; and who was drawn is no secret
        sampling = Sampling(num_clients, config.cohort_size, kind, secret)
        rest: dict[str, Any] = {
            "delta": self.delta, "epsilon": self.epsilon or math.inf, "rounds": config.rounds,
            "accountant": self.accountant,
        }  # fmt: skip
        if kind == "in_turn" and not self.noise_multiplier:
            privacy = plan_correlated(sampling, bands=self.bands, buffers=self.buffers, **rest)
        else:
            privacy = plan_privacy(sampling, noise_multiplier=self.noise_multiplier, **rest)
        return with_privacy(
            algorithm, privacy, clip=self.clip, noise=self.noise,
            adapt=Quantile(self.quantile) if self.quantile else None,
            least_reports=self.least_reports,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ExamplesConfig:
    """Differential privacy of a client's examples: DP-SGD in its local training."""

    noise_multiplier: float = option(
        0.0, "deviation of the noise over the clipping norm of an example's gradient; 0: no privacy"
    )
    clip: float = option(1.0, "largest norm of an example's gradient")
    chunk: int = option(8, "examples whose gradients are in memory at the same time")
    delta: float = option(1e-5, "probability with which the epsilon that is reported may not hold")

    def __post_init__(self):
        check(self)
        check_whole(self, {"noise_multiplier": 0, "chunk": 1}, "examples.")
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        if given and not self.noise_multiplier:
            raise ValueError(
                f"examples.{given[0]}={getattr(self, given[0])} changes nothing without "
                "--examples.noise_multiplier."
            )
        if not 0 < self.delta < 1:
            raise ValueError(f"examples.delta={self.delta} must be a probability above 0.")
        if not 0 < self.clip < math.inf:
            raise ValueError(f"examples.clip={self.clip}: give a norm above 0.")

    def gradients(self) -> ExamplePrivacy | None:
        """What local training takes."""
        if not self.noise_multiplier:
            return None
        return ExamplePrivacy(self.clip, self.noise_multiplier, self.chunk)

    def report(
        self, prepared: Prepared, data: Data, local: Local, state: RunState, cohort_size: int
    ) -> dict[str, float] | None:
        """What the run has cost the examples of its clients, from the rounds that each was in.

        Returns:
          Epsilon, at delta, of the client in the middle and of the largest; None: no privacy.
        """
        if not self.noise_multiplier:
            return None
        places, rate = cohorts_of(prepared.algorithm, len(data.names), cohort_size)
        rounds, key = int(state.round), state.key
        drawn = times_drawn(key, rounds, len(data.names), places, rate)
        a_round = wanted_steps(data.train, local)
        steps = np.minimum(a_round, np.asarray(prepared.placement.profiles.max_steps)) * drawn
        spent = example_epsilons(
            np.asarray(data.train.count), steps, batch_size=local.batch_size,
            noise_multiplier=self.noise_multiplier, delta=self.delta,
        )  # fmt: skip
        return {
            "median": float(np.median(spent)), "largest": float(spent.max()),
            "delta": self.delta, "noise_multiplier": self.noise_multiplier,
        }  # fmt: skip
