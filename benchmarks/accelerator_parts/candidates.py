"""Part 6: 15,000 candidates of a network scored by one masked program, against slices one by one.

Both sides score candidates on the same images without re-estimating statistics. The masked program
is compiled once; how many candidates run side by side is measured first. The other side cuts each
candidate out and compiles it, as pruning libraries do; its time is given with compilation and, for
a slice that is compiled already, without.
"""

from __future__ import annotations

import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from search_speed import Race, masked_scores, race, sliced_score

from accelerator_parts.frame import Case, Figures, Part, Setting, digits, fastest, median_seconds
from accelerator_parts.images import cifar_rows, residual_network
from jaxfm.testing import random_variables, tiny_resnet

LARGEST_GAP = 0.05  # of accuracies on some 64 images: rounding may move one or two of them


def make_race(setting: Setting) -> Race:
    """The network, images and candidates that all ways of scoring share."""
    number, images = (96, 16) if setting.dry else (15_000, 64)
    if setting.images is None or setting.weights is None:
        model = tiny_resnet()
        x = jax.random.normal(jax.random.key(setting.seed), (images, 8, 8, 3))
        return race(model, random_variables(model), x, jnp.arange(images) % 5, number)
    model, variables, task = residual_network(setting.weights)
    rows = {name: leaf[:images] for name, leaf in cifar_rows(setting.images, "train").items()}
    x, labels, _ = task.prepare(rows, None)
    return race(model, variables, x, jnp.asarray(labels), number)


def choose_width(race: Race, widths: tuple[int, ...], setting: Setting, note) -> Figures:
    """Candidates side by side, chosen by seconds a candidate."""
    seconds: dict[int, float] = {}
    for width in widths:
        counts = race.counts[: max(width, 16)]
        run = masked_scores(race, width)
        try:
            seconds[width] = median_seconds(lambda: run(counts), 3) / len(counts)  # noqa: B023
        except jax.errors.JaxRuntimeError as error:  # too wide for the memory
            print(f"{width} candidates side by side fail: {str(error)[:200]}", flush=True)
            continue
        figures = {"ms_a_candidate": {str(w): digits(1e3 * s) for w, s in seconds.items()}}
        note(figures)
        setting.clock.check(0.0)
    return {"chosen": fastest(seconds)} | figures


def score_all(
    race: Race, width: int, chunk: int, state: pathlib.Path, setting: Setting, note
) -> Figures:
    """All candidates by the masked program; the seconds of the first chunk hold the compilation.

    Args:
      chunk: candidates of a call.
      state: the file that scores are kept in.
    """
    scores, seconds = np.zeros(0, np.float32), 0.0
    if state.exists():
        with np.load(state) as stored:
            scores, seconds = stored["scores"], float(stored["seconds"])
    run = masked_scores(race, width)
    figures = lambda: {
        "scored": len(scores),
        "seconds": digits(seconds),
        "candidates_per_s": digits(len(scores) / seconds),
    }
    while len(scores) < len(race.counts):
        began = time.perf_counter()
        rows = race.counts[len(scores) : len(scores) + chunk]
        padded = jnp.pad(rows, ((0, chunk - len(rows)), (0, 0)), mode="edge")
        new = np.asarray(run(padded))[: len(rows)]
        taken = time.perf_counter() - began
        scores, seconds = np.concatenate([scores, new]), seconds + taken
        np.savez(state, scores=scores, seconds=seconds)
        note(figures())
        setting.clock.check(0.0 if len(scores) == len(race.counts) else taken)
    return figures()


def score_slices(race: Race, number: int, expected: np.ndarray, setting: Setting) -> Figures:
    """The first candidates, cut out; their scores must be those of the masks."""
    first, again, gaps = [], [], []
    for row, masked_score in zip(np.asarray(race.counts)[:number], expected, strict=False):
        began = time.perf_counter()
        run = sliced_score(race, row)
        found = float(run())
        first.append(time.perf_counter() - began)
        again.append(median_seconds(run, 5))
        gaps.append(abs(found - float(masked_score)))
        setting.clock.check(0.0)
    if max(gaps) > LARGEST_GAP:
        raise AssertionError(f"Slices score otherwise than masks, by up to {max(gaps)}.")
    return {
        "candidates": len(first),
        "seconds_each": digits(float(np.mean(first))),
        "seconds_each_compiled_before": digits(float(np.mean(again))),
        "largest_difference_of_scores": digits(max(gaps)),
    }


def cases(setting: Setting) -> dict[str, Case]:
    made = functools.cache(lambda: make_race(setting))
    widths = (1, 8) if setting.dry else (1, 16, 64, 256)
    chunk, some = (32, 2) if setting.dry else (1024, 6)
    state = setting.folder / "part6_scores.npz"

    def side_by_side(done, note) -> Figures:
        return choose_width(made(), widths, setting, note)

    def masked(done, note) -> Figures:
        return score_all(made(), done["side_by_side"]["chosen"], chunk, state, setting, note)

    def one_by_one(done, note) -> Figures:
        with np.load(state) as stored:
            expected = stored["scores"]
        return score_slices(made(), some, expected, setting)

    return {
        "side_by_side": Case(side_by_side, 60),
        "masked": Case(masked, 30),
        "one_by_one": Case(one_by_one, 60),
    }


def ratio(figures: dict[str, Figures]) -> float | None:
    """How many times as fast candidates are scored masked as sliced one by one."""
    if "one_by_one" not in figures:
        return None
    return figures["masked"]["candidates_per_s"] * figures["one_by_one"]["seconds_each"]


PART = Part(
    "part6_candidates", cases, ratio,
    "candidates a second of one masked program over slices compiled one by one", cached=False,
)  # fmt: skip
