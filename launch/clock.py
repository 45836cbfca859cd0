"""Options of runs that do not wait for their clients (`--asynchronous`)."""

from __future__ import annotations

import dataclasses

from jaxfm.config import check, check_whole, option
from jaxfm.federated.asynchronous import Clock, diurnal, polynomial, read_availability


@dataclasses.dataclass(frozen=True)
class AsynchronousConfig:
    """Server steps by a simulated clock, without rounds that wait; --rounds counts the steps."""

    buffer: int = option(
        0,
        "updates of a step (FedBuff; 1 with --asynchronous.models is FedAsync), while cohort_size "
        "clients are at work; 0: rounds that wait",
    )
    power: float = option(0.5, "an update from s steps ago weighs (1 + s)^-power")
    rate: float = option(1.0, "weight of every update, above 0 and up to 1")
    models: bool = option(False, "clients' models count, in the place of their movements")
    oldest: int = option(16, "updates of models of more steps ago are lost; so many are kept")
    hours: float = option(24.0, "of a day in which each client can be reached")
    windows: str = option(
        "", "CSV file with columns client, begin, end: when clients can be reached, in seconds"
    )
    jitter: float = option(0.0, "deviation of the logarithm of a client's time")

    def __post_init__(self):
        check(self)
        check_whole(self, {"buffer": 0, "oldest": 0}, "asynchronous.")
        if not 0 < self.rate <= 1:
            raise ValueError(f"asynchronous.rate={self.rate}: give a number above 0 and up to 1.")
        if not 0 < self.hours <= 24:
            raise ValueError(f"asynchronous.hours={self.hours}: give hours of a day, up to 24.")
        for name in ("power", "jitter"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"asynchronous.{name}={getattr(self, name)}: give 0 or more.")
        if self.windows and self.hours != 24:
            raise ValueError("Give asynchronous.windows or asynchronous.hours, not both.")
        if not self.buffer and dataclasses.replace(self, buffer=1) != type(self)(buffer=1):
            raise ValueError(
                "Options of asynchronous steps change nothing without --asynchronous=N, the "
                "updates of a step."
            )

    def clock(self, num_clients: int, seed: int) -> Clock | None:
        """Returns the clock of a run; None where rounds wait.

        Raises:
          FileNotFoundError, ValueError: as of `read_availability`.
        """
        if not self.buffer:
            return None
        when = None if self.hours == 24 else diurnal(num_clients, hours=self.hours, seed=seed)
        if self.windows:
            when = read_availability(self.windows, num_clients)
        return Clock(
            self.buffer, polynomial(self.power), self.rate, self.models, when, self.oldest,
            self.jitter,
        )  # fmt: skip
