"""Differential privacy of clients, around any algorithm whose uploads are weighted means.

    client:  v_i = value of its mean;      sends  c_i = v_i min(1, C / |v_i|)
    server:  (sum of c_i + N(0, (z C)^2)) / m    in the place of   sum of n_i v_i / sum of n_i

with |v| the norm over all floats of an upload together, and m = g N the number of clients that a
round draws on average, which is public. Whatever a client holds, c_i is within C of the zeros that
a client without data adds: the sum has sensitivity C. Hence

  - every client counts alike: n_i is private, and a weight would scale what a client adds;
  - the divisor is m, and not how many reported, which depends on data (an update that is not
    finite is left out, and adds zeros). When some drop out, the step is shorter, not noisier;
  - noise is added though nobody reports;
  - a sum that follows from one client's sum and the number of clients cannot tell them apart: only
    uploads that are `Mean`s of one weight are taken. Statistics of batch norm, predictions, counts
    and coverage by coordinates are refused.

The server clips, too, what it receives: no client, and no rounding on the way, exceeds C. What is
private is the global model, and every download; a client's memory and its own model are its own,
and what a simulation logs of single clients (losses, counts) is for the experimenter alone. Noise
and cohorts follow from the run's key, which must stay secret. Floats of 32 bits carry the noise:
attacks on their lowest bits (Mironov 2012) are out of scope.
Sources: McMahan et al. 2018 (Learning Differentially Private Recurrent Language Models), algorithm
1 with the fixed-denominator estimator; Andrew et al. 2021 (Differentially Private Learning with
Adaptive Clipping), algorithm 1.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxfm.federated.accounting.privacy import Privacy
from jaxfm.federated.algorithm import (
    Algorithm,
    Bucket,
    ClientData,
    Exact,
    Mean,
    Profile,
    exact,
    full_width,
)
from jaxfm.federated.parts.clipping import clipped, global_norm, noised
from jaxfm.federated.wrappers.private_checks import (
    REFUSED,
    Quantile,
    check_algorithm,
    check_settings,
)
from jaxfm.model import Array, Key, PyTree

_NOISE = 2**32 - 1  # folded into the server's key; no algorithm counts so far


class PrivateState(NamedTuple):
    """The server of a private algorithm.

    Attributes:
      own: the algorithm's state.
      clip: f32[], C of the next round.
      released: i32[], rounds whose noisy sum has moved the model; past the budget there are none.
      noise_multiplier: f32[], z of these rounds.
      noise: what later noise takes back (`Privacy.strategy`), of the shapes of the parameters.
    """

    own: PyTree
    clip: Array
    released: Array
    noise_multiplier: Array
    noise: PyTree = ()

    @property
    def variables(self):
        """The global model."""
        return self.own.variables


class PrivateDownload(NamedTuple):
    """The algorithm's download, and C."""

    own: PyTree
    clip: Exact


class PrivateUpload(NamedTuple):
    """Clipped means, and b_i - 1/2 where C adapts."""

    own: PyTree
    below: Exact | tuple[()]


def with_privacy(
    algorithm: Algorithm,
    privacy: Privacy,
    *,
    clip: float = 1.0,
    adapt: Quantile | None = None,
    noise: Literal["server", "clients"] = "server",
    least_reports: int = 0,
) -> Algorithm:
    """The algorithm with client-level differential privacy.

    With noise of the "clients" each one adds N(0, (z C)^2 / k) to its upload, k = `least_reports`,
    so that a server that sees sums alone (secure aggregation) never holds one without noise. Of
    those who drop out the shares are missing: with k reports the noise is z C, with more of them it
    is more, and with fewer the round is discarded. Clients that conspire know their own shares.

    Args:
      algorithm: of one kind of client, whose uploads are `Mean`s of one weight.
      privacy: of `plan_privacy`, for the cohorts that the run draws.
      clip: C; with `adapt` that of the first round.
      adapt: how C follows the clients' norms; None: it stays.
      noise: who adds it.
      least_reports: with noise of the clients, how many must report; 0: the cohort.
    Raises:
      ValueError: settings out of range; unequal clients, predictions, memories whose later uploads
        would tell who was drawn, or, when its shapes are known, an upload that cannot be private.
    """
    sampling = privacy.sampling
    cohort = sampling.cohort_size
    check_settings(privacy, clip, adapt, noise, least_reports)
    amplified = sampling.secret and cohort < sampling.num_clients and sampling.kind != "in_turn"
    check_algorithm(algorithm, amplified)
    z = privacy.noise_multiplier
    share_noise = 0.0 if adapt is None else adapt.noise * cohort
    of_sums = z if adapt is None else 1 / math.sqrt(z**-2 - (2 * share_noise) ** -2)
    least = least_reports or cohort
    own = algorithm.buckets[0]
    inverse = None if privacy.strategy is None else privacy.strategy.inverse()
    bucket = _bucket(own, adapt is not None, of_sums / math.sqrt(least), noise)

    def init(variables) -> PrivateState:
        return PrivateState(
            own=algorithm.init(variables),
            clip=jnp.float32(clip),
            released=jnp.int32(0),
            noise_multiplier=jnp.float32(z),
            noise=() if inverse is None else inverse.init_multiply(_floats(variables.params)),
        )

    def server(state: PrivateState, totals: PrivateUpload, public, key: Key):
        noise_key, share_key = jax.random.split(jax.random.fold_in(key, _NOISE))
        sums = _public_divisor(totals.own, float(cohort))
        kept = state.noise
        if inverse is not None:
            sums, kept = _correlated(inverse, sums, of_sums * state.clip, noise_key, state)
        elif noise == "server":
            sums = _noisy(sums, of_sums * state.clip, noise_key)
        inner, figures = algorithm.server(state.own, sums, public, key)
        norm = state.clip
        if adapt is not None:
            drawn = share_noise * jax.random.normal(share_key)
            share = 0.5 + (exact(totals.below) + drawn) / cohort
            norm = norm * jnp.exp(-adapt.rate * (share - adapt.target))
        new = PrivateState(inner, norm, state.released + 1, state.noise_multiplier, kept)
        goes_on = jnp.bool_(True)
        if privacy.rounds is not None:
            goes_on &= state.released < privacy.rounds
        if noise == "clients":
            goes_on &= _reports(totals.own) > least - 0.5  # secure sums round
        new = jax.tree.map(lambda a, b: jnp.where(goes_on, a, b), new, state)
        deviation = of_sums * state.clip / cohort
        return new, figures | {"private/clip": state.clip, "private/deviation": deviation}

    return algorithm._replace(init=init, buckets=(bucket,), server=server, privacy=privacy)


def _noisy(sums: PyTree, deviation: Array, key: Key) -> PyTree:
    """The sums with Gaussian noise of this standard deviation on the numerators."""
    return _with_numerators(sums, noised(_numerators(sums), deviation, key))


def _floats(params: PyTree) -> list[Array]:
    return [full_width(x) for x in jax.tree.leaves(params)]


def _correlated(
    inverse: Any, sums: PyTree, deviation: Array, key: Key, state: PrivateState
) -> tuple[PyTree, PyTree]:
    """The sums with the round's part of the correlated noise, and what later parts need."""
    leaves, tree = jax.tree.flatten(_numerators(sums))
    if [x.shape for x in leaves] != [x.shape for x in jax.tree.leaves(state.variables.params)]:
        raise ValueError(
            "Noise that is correlated over rounds is for algorithms whose clients send the "
            "movement of all trained parameters; plan this one without it."
        )
    drawn = noised(jax.tree.map(jnp.zeros_like, leaves), deviation, key)
    with jax.numpy_rank_promotion("allow"):  # jax-privacy's, of buffers beside one value
        part, kept = inverse.multiply_next(drawn, state.noise)
    return _with_numerators(sums, jax.tree.unflatten(tree, map(jnp.add, leaves, part))), kept


def _bucket(own: Bucket, adapts: bool, share: float, noise: str) -> Bucket:
    """The bucket whose uploads are clipped.

    Args:
      adapts: whether clients say if their norm was below C.
      share: of the clients' noise, its standard deviation over C.
      noise: who adds it.
    """

    def send(state: PrivateState, public) -> PrivateDownload:
        return PrivateDownload(own.send(state.own, public), Exact(state.clip))

    def client(download: PrivateDownload, memory, data: ClientData, profile: Profile, key: Key):
        upload, memory, info = own.client(download.own, memory, data, profile, key)
        works, norm = data.count > 0, download.clip.value
        values = _alike(upload, works)
        below: Exact | tuple[()] = ()
        if adapts:
            bit = (global_norm(_numerators(values)) <= norm).astype(jnp.float32) - 0.5
            below = Exact(jnp.where(works, bit, 0))
        sent = _with_numerators(values, clipped(_numerators(values), norm))
        if noise == "clients":
            noise_key = jax.random.fold_in(key, _NOISE)
            sent = _noisy(sent, jnp.where(works, share * norm, 0), noise_key)
        else:
            sent = jax.tree.map(lambda x, like: x.astype(like.dtype), sent, values)
        return PrivateUpload(sent, below), memory, info

    def receive(state: PrivateState, public, upload: PrivateUpload) -> PrivateUpload:
        came = own.receive(state.own, public, upload.own)
        before: Any = jax.tree.structure(upload.own)
        if jax.tree.structure(came) != before:
            raise ValueError(REFUSED["sums"])
        if noise == "server":
            came = _with_numerators(came, clipped(_numerators(came), state.clip))
        return PrivateUpload(came, upload.below)

    def lift(state: PrivateState, sums: PrivateUpload) -> PrivateUpload:
        return PrivateUpload(own.lift(state.own, sums.own), sums.below)

    personal = own.personal
    return own._replace(
        send=send,
        client=client,
        init_client=lambda download, *rest: own.init_client(download.own, *rest),
        receive=receive,
        lift=lift,
        shared=lambda state: own.shared(state.own),
        personal=personal and (lambda state, memory: personal(state.own, memory)),
        privacy=noise,
    )


def _is_mean(x: Any) -> bool:
    return isinstance(x, Mean)


def _numerators(means: PyTree) -> list[PyTree]:
    return [part.num for part in jax.tree.leaves(means, is_leaf=_is_mean)]


def _with_numerators(means: PyTree, numerators: list[PyTree]) -> PyTree:
    parts, tree = jax.tree.flatten(means, is_leaf=_is_mean)
    new = [part._replace(num=num) for part, num in zip(parts, numerators, strict=True)]
    return jax.tree.unflatten(tree, new)


def _alike(upload: PyTree, works: Array) -> PyTree:
    """The upload's means with a weight of 1 for a client that works, and of 0 for another."""
    one = works.astype(jnp.float32)

    def unweighted(part: Any) -> Mean:
        if not _is_mean(part) or not jax.tree_util.all_leaves([exact(part.den)]):
            raise ValueError(REFUSED["sums"])
        is_exact = lambda x: isinstance(x, Exact)
        parts = jax.tree.leaves(part.num, is_leaf=is_exact)
        if any(is_exact(x) and jax.tree.leaves(x) for x in parts):
            raise ValueError(REFUSED["statistics"])
        weight = exact(part.den)
        floats = [jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(part.num)]
        if jnp.ndim(weight) or not all(floats):
            raise ValueError(REFUSED["sums"])
        by = jnp.where(weight > 0, weight, 1)
        value = lambda x: (full_width(x) / by.astype(full_width(x).dtype)).astype(x.dtype)
        return Mean(jax.tree.map(value, part.num), Exact(one))

    return jax.tree.map(unweighted, upload, is_leaf=_is_mean)


def _reports(sums: PyTree) -> Array:
    """f32[]: how many clients reported."""
    return exact(jax.tree.leaves(sums, is_leaf=_is_mean)[0].den)


def _public_divisor(sums: PyTree, count: float) -> PyTree:
    def put(part: Mean) -> Mean:
        den = exact(part.den)
        if not jax.tree_util.all_leaves([den]) or jnp.ndim(den):
            raise ValueError(REFUSED["sums"])
        return part._replace(den=Exact(jnp.full_like(den, count)))

    return jax.tree.map(put, sums, is_leaf=_is_mean)
