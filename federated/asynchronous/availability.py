"""When clients can be reached: windows of time, from a pattern or from a file."""

from __future__ import annotations

import csv
import math
import os
from typing import NamedTuple

import numpy as np

DAY_S = 86_400.0


class Availability(NamedTuple):
    """Windows in which clients can be reached; a client has any number of them.

    Attributes:
      client: i64[W], whose window it is.
      begin, end: f64[W], seconds; `begin` lies in [0, period), and `end` at most a period later.
      num_clients: C.
      period: seconds after which all windows come again; inf: they never do.
    """

    client: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    num_clients: int
    period: float = math.inf

    def until(self, now: float) -> np.ndarray:
        """f64[C]: until when each client that can be reached now stays; -inf for others."""
        ends = np.full(self.num_clients, -math.inf)
        for lap in self._laps(now):
            inside = (self.begin + lap <= now) & (now < self.end + lap)
            np.maximum.at(ends, self.client[inside], self.end[inside] + lap)
        return ends

    def next_begin(self, now: float) -> float:
        """When the next window begins after `now`; inf if none does."""
        begins = self.begin + self._laps(now)[0]
        later = begins[begins > now]
        if later.size:
            return float(later.min())
        return float(begins.min() + self.period) if begins.size else math.inf

    def _laps(self, now: float) -> tuple[float, ...]:
        """The beginnings of this period and of the last one, whose windows may reach into it."""
        if math.isinf(self.period):
            return (0.0,)
        lap = math.floor(now / self.period) * self.period
        return lap, lap - self.period


def always(num_clients: int) -> Availability:
    """Everybody can be reached at all times."""
    return Availability(
        np.arange(num_clients), np.zeros(num_clients), np.full(num_clients, math.inf), num_clients
    )


def diurnal(num_clients: int, *, hours: float, seed: int = 0) -> Availability:
    """Each client can be reached for some hours of every day, from a time of day of its own.

    Args:
      num_clients: C.
      hours: of a day, in (0, 24].
      seed: of the times of day, which are uniform.
    Raises:
      ValueError: hours out of range.
    """
    if not 0 < hours <= 24:
        raise ValueError(f"hours={hours} must be in (0, 24], hours of a day.")
    begin = np.random.default_rng(seed).uniform(0, DAY_S, num_clients)
    return Availability(np.arange(num_clients), begin, begin + hours * 3600, num_clients, DAY_S)


def read(path: str | os.PathLike[str], num_clients: int, period: float = math.inf) -> Availability:
    """Reads windows from a CSV file with the columns client, begin, end, in seconds.

    Args:
      path: the file; clients are numbers from 0.
      num_clients: C; clients without a window are never reached.
      period: seconds after which all windows come again.
    Raises:
      FileNotFoundError: no such file.
      ValueError: a column is missing, or a line is no window; it names the line.
    """
    rows = []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = {"client", "begin", "end"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(
                f"{path} lacks the column {min(missing)!r}; it needs client,begin,end."
            )
        for number, row in enumerate(reader, 2):
            try:
                client, begin, end = int(row["client"]), float(row["begin"]), float(row["end"])
            except (TypeError, ValueError):
                raise ValueError(f"Line {number} of {path} is not three numbers.") from None
            fits = 0 <= begin < min(period, end) and end - begin <= period
            if not (fits and 0 <= client < num_clients):
                raise ValueError(
                    f"Line {number} of {path}: a window of client {client} from {begin:g} to "
                    f"{end:g} s; clients are 0..{num_clients - 1}, and a window begins within "
                    f"[0, {period:g}) and lasts at most as long."
                )
            rows.append((client, begin, end))
    if not rows:
        raise ValueError(f"{path} has no window, so nobody can ever be reached.")
    clients, begins, ends = map(np.array, zip(*rows, strict=True))
    return Availability(clients, begins, ends, num_clients, period)
