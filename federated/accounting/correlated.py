"""Noise that is correlated over rounds, for clients that take turns (DP-FTRL, BandMF, BLT).

    noise of round t = (C^-1 w)_t,   w_t ~ N(0, (z K)^2) independent,   K the clipping norm

C is lower triangular and Toeplitz, so that the sum of all noise so far, which the model has
taken in, is smaller than that of independent noise: later rounds take back what earlier ones
added. All rounds together are one Gaussian mechanism, of the movements x_t behind C x: a client
that takes part every b rounds at most moves C x by K s, with s the norm of the sum of every b-th
column of C. Of k rounds it is that of the leading k rows and columns.
Sources: Kairouz et al. 2021 (Practical and Private (Deep) Learning without Sampling or Shuffling);
Choquette-Choo et al. 2023 (arXiv 2306.08153; banded matrices); McMahan et al. 2024 (arXiv
2405.13763, theorem 2: s); McMahan et al. 2024 (arXiv 2408.08868; BLT). The matrices and their
sensitivities are those of jax-privacy.
"""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from typing import Any, NamedTuple

import jax
import numpy as np


class Strategy(NamedTuple):
    """How noise is correlated.

    Attributes:
      coefficients: of C, its first column; they fall and are not negative. One alone is independent
        noise.
      separation: b, rounds from one turn of a client to its next.
      rounds: for which it was made.
      sequences: of a BLT, (decay, first value) of each geometric sequence whose sum, behind the 1,
        the coefficients are; empty for bands.
    """

    coefficients: tuple[float, ...]
    separation: int
    rounds: int
    sequences: tuple[tuple[float, float], ...] = ()

    def sensitivity(self, rounds: int) -> float:
        """s of so many rounds."""
        return _sensitivity(self, rounds)

    def inverse(self) -> Any:
        """C^-1 as a streaming matrix: `init_multiply(tree)` and `multiply_next(tree, state)`."""
        if self.sequences:
            decays, scales = zip(*self.sequences)
            made = _blt().BufferedToeplitz.build(decays, scales, dtype=np.float32)
            return made.inverse_as_streaming_matrix()
        toeplitz = _toeplitz()
        return toeplitz.inverse_as_streaming_matrix(np.asarray(self.coefficients, np.float32))

    def error(self) -> float:
        """The mean square of the noise in the model over all rounds, for s z K = 1.

        With sums of independent noise it is `separation` times smaller than that of one turn each.
        """
        n = self.rounds
        matrix = np.zeros((n, n))
        for i, value in enumerate(self.coefficients[:n]):
            matrix += value * np.eye(n, k=-i)
        sums = np.linalg.solve(matrix.T, np.tril(np.ones((n, n))).T).T  # A C^-1
        return float(np.mean(np.sum(sums**2, 1))) * self.sensitivity(n) ** 2


def banded_strategy(rounds: int, separation: int, bands: int = 0) -> Strategy:
    """The banded Toeplitz matrix of least mean squared error for these rounds.

    Args:
      rounds: of the whole run.
      separation: b, as of `Strategy`.
      bands: of C; the server keeps bands - 1 copies of the model. 0: as many as the separation,
        but 8 at most.
    Raises:
      ValueError: bands above the separation (a client would meet its own noise) or the rounds.
      ImportError: jax-privacy is missing.
    """
    bands = bands or max(1, min(separation, rounds, 8))
    if not 1 <= bands <= min(separation, rounds):
        raise ValueError(
            f"bands={bands} must be from 1 to the rounds between two turns of a client, "
            f"{separation}, and to the {rounds} rounds."
        )
    if bands == 1:
        return Strategy((1.0,), separation, rounds)
    toeplitz = _toeplitz()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = np.asarray(toeplitz.optimize_banded_toeplitz(rounds, bands), float)
    falling = np.minimum.accumulate(np.maximum(found, 0))  # but for rounding it is so
    return Strategy(tuple((falling / falling[0]).tolist()), separation, rounds)


def buffered_strategy(rounds: int, separation: int, buffers: int = 1) -> Strategy:
    """The buffered linear Toeplitz matrix of least mean squared error for these rounds.

    It is found by an optimizer, in about half a minute. Unlike bands, its noise is taken back over
    all later rounds, however long a turn is.

    Args:
      rounds: of the whole run, 2 or more.
      separation: b, as of `Strategy`.
      buffers: geometric sequences; the server keeps as many copies of the model.
    Raises:
      ValueError: buffers from 1 to 8, or rounds, out of range.
      ImportError: jax-privacy is missing.
    """
    if not 1 <= buffers <= 8 or rounds < 2:
        raise ValueError(f"buffers={buffers} must be from 1 to 8, and rounds={rounds} 2 or more.")
    blt = _blt()
    standard = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
    with standard[0], standard[1], jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of 64 bits, from threads that do not have them
        loss = blt.LossFn.build_min_sep(
            n=rounds, error="mean", min_sep=separation,
            max_participations=math.ceil(rounds / separation),
        )  # fmt: skip
        try:
            with jax.default_device(jax.local_devices(backend="cpu")[0]):
                found, _ = blt.optimize_loss(loss, num_buffers=buffers)
        except RuntimeError as error:
            raise ValueError(_not_found(rounds, buffers)) from error
        decays, scales = np.asarray(found.buf_decay), np.asarray(found.output_scale)
    decays, scales = decays.astype(np.float32).astype(float), scales.astype(np.float32)
    powers = decays[:, None] ** np.arange(rounds - 1)
    column = np.r_[1.0, scales.astype(float) @ powers]
    if not (np.diff(column) <= 0).all() or column[-1] < 0:
        raise ValueError(_not_found(rounds, buffers))
    pairs = zip(decays.tolist(), scales.tolist(), strict=True)
    return Strategy(tuple(column.tolist()), separation, rounds, tuple(pairs))


def _not_found(rounds: int, buffers: int) -> str:
    return (
        f"No falling matrix of {buffers} buffers was found for {rounds} rounds; give fewer "
        "buffers, or bands."
    )


@functools.lru_cache(maxsize=256)
def _sensitivity(strategy: Strategy, rounds: int) -> float:
    if rounds < 1:
        return 0.0
    turns = math.ceil(rounds / strategy.separation)
    if len(strategy.coefficients) == 1:
        return math.sqrt(turns) * strategy.coefficients[0]
    toeplitz = _toeplitz()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        squared = toeplitz.minsep_sensitivity_squared(
            np.asarray(strategy.coefficients[:rounds], np.float32),
            min_sep=strategy.separation, max_participations=turns, n=rounds,
        )  # fmt: skip
    return math.sqrt(float(squared)) * (1 + 1e-6)  # of 32 bits


def _toeplitz() -> Any:
    return _module("toeplitz")


def _blt() -> Any:
    return _module("buffered_toeplitz")


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"jax_privacy.matrix_factorization.{name}")
    except ImportError as error:
        raise ImportError("Correlated noise needs jax-privacy: install jaxfm[privacy].") from error
