"""Part 4: a search on ResNet-56 at half of its multiply-adds, and long training of what it finds.

The network, its rows and the way candidates are scored are those of `search_cifar.py`. Every
candidate and the dense network get the same training: SGD with momentum, cosine to zero. Rows of
the reward choose; the report rows are looked at once a candidate, at the end.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import search_cifar
from jax import lax

from accelerator_parts.frame import Case, Figures, Part, Setting, digits
from jaxfm import search
from jaxfm.checkpoint import Checkpointer
from jaxfm.federated.local import objective
from jaxfm.model import Variables
from jaxfm.tasks.evaluation import evaluate

BATCH = 128
STRATEGIES = ("random", "gnn_rl")
TUNED = ("gnn_rl", "uniform", "dense", "random")  # in the order in which they are wanted


def make_bench(setting: Setting) -> search_cifar.Bench:
    """The search's network and data, in the sizes of this part."""
    trained = setting.images is not None and setting.weights is not None
    config = search_cifar.Config(
        quick=not trained,
        data_dir=str(setting.images or ""),
        weights=str(setting.weights or ""),
        evaluations=32 if setting.dry else 512,
        reward=128 if setting.dry else 1000,
        calibration=64 if setting.dry else 128,
        report=256 if setting.dry else 5000,
        repair=64 if setting.dry else 512,
        finetune=2 if setting.dry else 40,
        repaired=True,
        importances=("l2",),
    )
    return search_cifar.Bench(search_cifar.load(config), config)


class Tuning(NamedTuple):
    """What a network's training needs to go on."""

    variables: Variables
    opt_state: Any
    epoch: Any


class Tuner:
    """One network's training, an epoch at a time.

    Attributes:
      start: `() -> Tuning`.
      epoch: `(Tuning, rows) -> Tuning`, compiled.
      accuracy: `(Tuning) -> float`, on the report rows.
    """

    def __init__(self, bench: search_cifar.Bench, kept, seed: int):
        work, config, graph = bench.work, bench.config, bench.net
        run, train = search.sliced(graph, kept), search.sliced(graph, kept, 1)
        self.apply = lambda v, x, train_=train, train=False, key=None: (
            train_(v, x) if train else (run(v, x), v.stats)
        )
        loss = objective(work.model._replace(apply=self.apply), work.task)
        gradient = jax.value_and_grad(loss, has_aux=True)
        steps = len(work.train["label"]) // BATCH
        rate = optax.cosine_decay_schedule(config.rate, config.finetune * steps)
        rule = optax.sgd(rate, momentum=0.9)
        self.steps, self.bench, self.kept = steps, bench, kept

        def start(variables: Variables) -> Tuning:
            return Tuning(variables, rule.init(variables.params), jnp.int32(0))

        def epoch(state: Tuning, rows: dict[str, jax.Array]) -> Tuning:
            order_key, step_key = jax.random.split(
                jax.random.fold_in(jax.random.key(seed), state.epoch)
            )
            order = jax.random.permutation(order_key, len(rows["label"]))

            def step(i, state: Tuning) -> Tuning:
                index = lax.dynamic_slice(order, (i * BATCH,), (BATCH,))
                batch = {name: leaf[index] for name, leaf in rows.items()}
                params = state.variables.params
                (_, (stats, _, _)), grads = gradient(
                    params, state.variables, batch, jnp.ones(BATCH), jax.random.fold_in(step_key, i)
                )
                with jax.numpy_dtype_promotion("standard"):  # optax mixes counts and floats
                    moves, opt_state = rule.update(grads, state.opt_state, params)
                variables = state.variables._replace(
                    params=optax.apply_updates(params, moves), stats=stats
                )
                return Tuning(variables, opt_state, state.epoch)

            return lax.fori_loop(0, steps, step, state)._replace(epoch=state.epoch + 1)

        self._start, self.epoch = jax.jit(start), jax.jit(epoch, donate_argnums=0)

    def start(self) -> Tuning:
        """The repaired slice, untrained."""
        bench = self.bench
        masks = tuple(jnp.asarray(mask) for mask in self.kept)
        repaired = bench.repair(bench.work.variables, masks, bench.inputs)
        return self._start(search.cut(bench.net, repaired, self.kept))

    def accuracy(self, state: Tuning) -> float:
        """On the report rows."""
        work = self.bench.work
        return float(evaluate(self.apply, state.variables, work.task, work.report, 250)["accuracy"])


def tune(name: str, tuner: Tuner, setting: Setting, note: Callable[[Figures], None]) -> Figures:
    """Trains as many epochs as there are; goes on from the newest checkpoint."""
    num_epochs = tuner.bench.config.finetune
    rows = jax.device_put(dict(tuner.bench.work.train))
    state, taken, saved = tuner.start(), [], time.monotonic()
    with Checkpointer(setting.folder / f"part4_{name}", keep=1) as checkpoints:
        if checkpoints.latest_step() is not None:
            _, state = checkpoints.restore(like=state)
        done = int(state.epoch)
        while done < num_epochs:
            began = time.perf_counter()
            state = jax.block_until_ready(tuner.epoch(state, rows))
            taken.append(time.perf_counter() - began)
            done += 1
            note({"epochs": done, "seconds_an_epoch": digits(min(taken))})
            stop = done < num_epochs and setting.clock.left() < 1.5 * min(taken)
            if stop or done == num_epochs or time.monotonic() - saved > 30:
                checkpoints.save(done, state)
                saved = time.monotonic()
            if stop:
                checkpoints.wait()
                setting.clock.check(1.5 * min(taken))
    figures = {"epochs": done, "finetuned": digits(tuner.accuracy(state))}
    return figures | ({"seconds_an_epoch": digits(min(taken))} if taken else {})


def searched(
    name: str, bench: search_cifar.Bench, problem, setting: Setting, note
) -> tuple[Figures, np.ndarray]:
    """One strategy's search, a few batches of candidates at a time; goes on where it stopped."""
    strategy = bench.strategy(name, problem)
    evaluations = max(1, bench.config.evaluations // strategy.batch) * strategy.batch
    runner = search.search(problem, strategy, evaluations)
    state, spent = runner.init(jax.random.key(setting.seed)), []
    with Checkpointer(setting.folder / f"part4_search_{name}", keep=1) as checkpoints:
        if checkpoints.latest_step() is not None:
            _, state = checkpoints.restore(like=state)
        done = int(state.step)
        while done < runner.num_steps:
            some = min(max(1, runner.num_steps // 16), runner.num_steps - done)
            began = time.perf_counter()
            state = jax.block_until_ready(runner.advance(state, some))
            spent.append((time.perf_counter() - began) / some)
            done += some
            checkpoints.save(done, state)
            note({"evaluations": done * strategy.batch})
            setting.clock.check(0.0 if done == runner.num_steps else 1.5 * some * min(spent))
    found = runner.result(state)
    figures: Figures = {"evaluations": evaluations, "reward": digits(float(found.best_score))}
    if spent:
        figures["candidates_per_s"] = digits(strategy.batch / min(spent))
    return figures, np.asarray(found.best_counts)


def cases(setting: Setting) -> dict[str, Case]:
    bench = functools.cache(lambda: make_bench(setting))
    problem = functools.cache(lambda: bench().problem(bench().config.order))

    def judged(counts: np.ndarray) -> Figures:
        """The candidate before training, on the report rows."""
        found = bench().judged(bench().config.order, counts, tuned=False)
        return {n: digits(x) for n, x in found.items()} | {"counts": np.asarray(counts).tolist()}

    def dense(done, note) -> Figures:
        work = bench().work
        found = evaluate(work.model.apply, work.variables, work.task, work.report, 250)
        return {"accuracy": digits(found["accuracy"]), "counts": bench().net.sizes.tolist()}

    def uniform(done, note) -> Figures:
        project = jax.jit(problem().project)
        return judged(np.asarray(project(jnp.zeros(len(bench().net.groups)))))

    def strategy(name: str, note) -> Figures:
        figures, counts = searched(name, bench(), problem(), setting, note)
        return figures | judged(counts)

    def tuned(name: str, done, note) -> Figures:
        order = search.ranks(bench().orders[bench().config.order])
        kept = search.keep(order, np.array(done[name]["counts"]))
        return tune(name, Tuner(bench(), kept, setting.seed), setting, note)

    table = {"dense": Case(dense, 30), "uniform": Case(uniform, 30)}
    for name in STRATEGIES[1:] if setting.dry else STRATEGIES:
        table[name] = Case(lambda done, note, n=name: strategy(n, note), 90)
    for name in ("gnn_rl", "dense") if setting.dry else TUNED:
        table[f"{name}_finetuned"] = Case(lambda done, note, n=name: tuned(n, done, note), 90)
    return table


def ratio(figures: dict[str, Figures]) -> float | None:
    """How many times as fast a fine-tuning epoch of the found network is as the dense one's."""
    seconds = [
        figures.get(f"{name}_finetuned", {}).get("seconds_an_epoch") for name in ("dense", "gnn_rl")
    ]
    return seconds[0] / seconds[1] if all(seconds) else None


PART = Part(
    "part4_search", cases, ratio,
    "seconds an epoch of training the dense network over those of the one that gnn_rl found",
)  # fmt: skip
