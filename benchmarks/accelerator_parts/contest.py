"""Federated algorithms on the same data, round by round in turn, until the time is up.

Every contender's state and curve are kept in a checkpoint of its own, so that a later call goes on
from the round that each has reached. How many clients train side by side on the device is measured
with the first contender and serves all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from federated_parts import work as works
from federated_parts.runs import LAST
from federated_parts.work import TASK, Work

from accelerator_parts.frame import Case, Figures, Setting, digits, fastest
from jaxfm.checkpoint import Checkpointer
from jaxfm.data.federation import Federation
from jaxfm.federated import (
    Algorithm,
    Population,
    client_costs,
    client_metrics,
    compile_rounds,
    profiles,
    round_costs,
)
from jaxfm.model import Model
from jaxfm.tasks.evaluation import evaluate

COLUMNS = ("validation", "test", "own_validation", "own_test")
SAVE_S = 20.0  # between two checkpoints of a contender


class Contender(NamedTuple):
    """An algorithm, the network that its server starts from, and who trains what.

    Attributes:
      bucket: i32[C].
      public: data of the server's own, or None.
    """

    algorithm: Algorithm
    start: Model
    bucket: np.ndarray
    public: Mapping[str, np.ndarray] | None = None

    @property
    def is_personal(self) -> bool:
        """Whether its accuracy is that of clients' own networks, for want of a global model."""
        return self.algorithm.model is None or self.algorithm.is_personal is not None


class Rows(NamedTuple):
    """Who trains on what, and what accuracies are of; see `federated_parts.work.Work`."""

    train: Federation
    choice: Federation
    own: Federation
    validation: Mapping[str, np.ndarray]
    test: Mapping[str, np.ndarray]

    @property
    def clients(self) -> int:
        return len(self.train.count)


def load(work: str, setting: Setting) -> tuple[Work, Rows]:
    """The networks and rows of a work of `federated_table`, one partition."""
    loaded = works.load(work, str(setting.images or ""))
    own = (part[0] for part in (loaded.train, loaded.choice, loaded.own))
    return loaded, Rows(*own, loaded.validation, loaded.test)


class Entry:
    """One contender at work: its compiled rounds, its state and its curve.

    Attributes:
      curve: f32[rounds done, 4], by `COLUMNS`; NaN where nothing is measured.
      seconds: of each round of this call but the first, which compiles.
    """

    def __init__(self, name: str, who: Contender, rows: Rows, width: int, setting: Setting):
        self.who, self.rows, self.setting = who, rows, setting
        self.people = Population(rows.train, profiles(rows.clients), who.bucket)
        self.engine = engine_of(who, self.people, width)
        variables = who.start.init(jax.random.key(setting.seed))
        self.state = self.engine.init(variables, jax.random.key(setting.seed + 100))
        self.priced = client_costs(who.algorithm, self.people, variables, who.public)
        self.own = client_metrics(who.algorithm, who.bucket, TASK, batch_size=64)
        self.curve, self.bytes = np.zeros((0, len(COLUMNS)), np.float32), 0.0
        self.seconds: list[float] = []
        self.compiled = False
        self.checkpoints = Checkpointer(setting.folder / name, keep=1)
        self.saved, self.saved_round = time.monotonic(), -1
        if self.checkpoints.latest_step() is not None:
            self._restore()

    def _restore(self) -> None:
        most = self.setting.num_rounds
        like = {"state": self.state, "curve": np.zeros((most, len(COLUMNS)), np.float32),
                "bytes": 0.0}  # fmt: skip
        done, tree = self.checkpoints.restore(like=like)
        self.state, self.curve, self.bytes = tree["state"], tree["curve"][:done], tree["bytes"]
        self.saved_round = done

    @property
    def done(self) -> int:
        return len(self.curve)

    def play(self) -> None:
        """One round and a look at what it gave."""
        began = time.perf_counter()
        self.state, info = jax.block_until_ready(self.engine.run(self.state, self.people))
        taken = time.perf_counter() - began
        if self.compiled:
            self.seconds.append(taken)
        self.compiled = True
        spent = round_costs(self.priced, info)
        self.bytes += float(spent["bytes_up"] + spent["bytes_down"])
        self.curve = np.concatenate([self.curve, self._look()[None]])
        if time.monotonic() - self.saved > SAVE_S:
            self.save()

    def _look(self) -> np.ndarray:
        who, state = self.who, self.state
        each = lambda rows: float(np.nanmean(self.own(state, rows)["accuracy"]))
        whole = lambda rows: float(
            evaluate(who.start.apply, state.server.variables, TASK, rows, 250)["accuracy"]
        )
        rows = self.rows
        both = (np.nan, np.nan) if who.is_personal else map(whole, (rows.validation, rows.test))
        return np.array([*both, each(rows.choice), each(rows.own)], np.float32)

    def save(self) -> None:
        """Keeps the state, unless it is kept already."""
        if self.done != self.saved_round:
            missing = self.setting.num_rounds - self.done
            curve = np.pad(self.curve, ((0, missing), (0, 0)))
            tree = {"state": self.state, "curve": curve, "bytes": self.bytes}
            self.checkpoints.save(self.done, tree)
            self.saved, self.saved_round = time.monotonic(), self.done

    def figures(self) -> Figures:
        """Means over the last rounds, and what a round takes."""
        late = self.curve[-LAST:]
        found: Figures = {"rounds": self.done}
        for column, name in enumerate(COLUMNS):
            if len(late) and not np.isnan(late[:, column]).any():
                found[name] = digits(float(late[:, column].mean()))
        if self.done:
            found["mb_a_round"] = digits(self.bytes / self.done / 1e6)
        if self.seconds:
            found["seconds_a_round"] = digits(float(np.median(self.seconds)))
        return found

    def bytes_to(self, column: str, target: float) -> float | None:
        """Bytes until this column of the curve reaches a target; None where it does not."""
        reached = np.flatnonzero(self.curve[:, COLUMNS.index(column)] >= target)
        return self.bytes / self.done * (reached[0] + 1) if len(reached) else None


def engine_of(who: Contender, people: Population, width: int):
    cohort = len(people.federation.count)
    return compile_rounds(
        who.algorithm, people, cohort_size=cohort, public=who.public, clients_at_once=width
    )


def width_case(who: Callable[[], Contender], rows: Callable[[], Rows], setting: Setting) -> Case:
    """Clients side by side: one after another, or all; by seconds of a short round.

    Every client does the same share of its steps, so that waiting for the largest one counts.
    """

    def run(done, note) -> Figures:
        contender, own = who(), rows()
        batch, epochs = (20, 1) if setting.dry else (64, 10)
        steps = epochs * -(-np.asarray(own.train.count) // batch)
        short = np.maximum(1, np.ceil(steps * (1.0 if setting.dry else 0.02))).astype(np.int32)
        people = Population(own.train, profiles(own.clients, max_steps=short), contender.bucket)
        seconds: dict[int, float] = {}
        for width in (1,) if setting.dry else (1, own.clients):
            try:
                seconds[width] = _short_round(contender, people, width, setting)
            except jax.errors.JaxRuntimeError as error:  # no memory, or no such convolution
                print(f"{width} clients side by side fail: {str(error)[:200]}", flush=True)
                continue
            note({"seconds_a_short_round": {str(w): digits(s) for w, s in seconds.items()}})
            setting.clock.check(0.0)
        return {
            "chosen": fastest(seconds),
            "seconds_a_short_round": {str(w): digits(s) for w, s in seconds.items()},
        }

    return Case(run, 120)


def _short_round(who: Contender, people: Population, width: int, setting: Setting) -> float:
    """Seconds of the faster of two rounds that follow the one that compiles."""
    engine = engine_of(who, people, width)
    variables = who.start.init(jax.random.key(setting.seed))
    state = engine.init(variables, jax.random.key(setting.seed))
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        state = jax.block_until_ready(engine.run(state)[0])
        taken.append(time.perf_counter() - began)
    return min(taken[1:])


def contest_case(
    part: str,
    contenders: Mapping[str, Callable[[], Contender]],
    rows: Callable[[], Rows],
    setting: Setting,
) -> Case:
    """Round by round in turn, as far as time allows; the first contender is the measure."""

    order = {name: place for place, name in enumerate(contenders)}

    def run(done, note) -> Figures:
        width, entries, broken = done["width"]["chosen"], {}, {}
        try:
            for name, who in contenders.items():
                entries[name] = Entry(f"{part}_{name}", who(), rows(), width, setting)
            while True:
                left = {n: e.done for n, e in entries.items() if e.done < setting.num_rounds}
                if not left.keys() - broken.keys():
                    break
                name = min(left.keys() - broken.keys(), key=lambda name: (left[name], order[name]))
                setting.clock.check(2 * max(entries[name].seconds, default=0.0))
                try:
                    entries[name].play()
                except jax.errors.JaxRuntimeError as error:  # the others go on
                    broken[name] = {"failed": str(error)[:200]}
                note(_table(entries) | broken)
            if broken:
                raise RuntimeError(f"These contenders failed: {broken}")
            return _table(entries)
        finally:
            for name, entry in entries.items():
                if name not in broken:  # whose state may be donated and gone
                    entry.save()
                entry.checkpoints.close()

    return Case(run, 120)


def _table(entries: Mapping[str, Entry]) -> Figures:
    """Every contender's figures, and bytes against those of the first at equal accuracy.

    The target is the first contender's best on validation rows, and validation rows say when
    others reach it; test rows choose nothing.
    """
    names = list(entries)
    base, found = entries[names[0]], {name: entry.figures() for name, entry in entries.items()}
    for name in names[1:]:
        column = "own_validation" if entries[name].who.is_personal else "validation"
        if not base.done or not entries[name].done:
            continue
        both = min(base.done, entries[name].done)
        target = float(np.max(base.curve[:both, COLUMNS.index(column)]))
        ours, theirs = (entry.bytes_to(column, target) for entry in (entries[name], base))
        if ours and theirs:
            found[name]["bytes_saving"] = digits(theirs / ours)
        mean = lambda entry: entry.bytes / entry.done
        found[name]["bytes_a_round_saving"] = digits(mean(base) / mean(entries[name]))
    return found
