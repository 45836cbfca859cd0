"""Ensembles of clients' networks, learned by one network on the server from unlabelled data.

    teacher(x) = decide(sum_i num_i(x) / sum_i den_i(x));   w <- argmin_w T² KL(teacher || f_w)

with num_i and den_i what client i's logits f_i(x) say in a `Vote`. Every vote here is a ratio of
sums, so one all-reduce makes the teacher, and no client's network is kept: the predictions are the
server's own, made of each upload as it is received. Of public data only the inputs are read; labels
are replaced by zeros before anything sees them.
Source: Lin et al. 2020 (FedDF), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxfm.data.federation import leading_size
from jaxfm.distillation import distill, kl_divergence
from jaxfm.federated.algorithm import ClientData, Exact, Mean, mean, weighted
from jaxfm.federated.averaging import moved
from jaxfm.federated.registry import Setting
from jaxfm.model import Array, Key, Model, PyTree, Variables
from jaxfm.tasks import Task

_CHUNK = 512  # public rows at a time; bounds the memory of a prediction


class Distill(NamedTuple):
    """How the server learns from an ensemble in one round.

    Attributes:
      optimizer: starts anew in every round.
      steps, batch_size: of it; batches are drawn with replacement.
      temperature: T, of teacher and student alike.
      divergence: minimised; called like `kl_divergence`.
    """

    optimizer: optax.GradientTransformation
    steps: int
    batch_size: int
    temperature: float = 1.0
    divergence: Callable[..., tuple[Array, Array]] = kl_divergence


class Vote(NamedTuple):
    """How the logits of many become those of a teacher.

    Attributes:
      ballot: `(logits f32[..., K], known) -> (num f32[..., K], den)`, one client's summands; den
        has the rank of num and broadcasts to it.
      decide: `(num / den) -> logits of the teacher`.
      known: `(ClientData) -> tree`, what a client uploads for its ballot beside the weights.
    """

    ballot: Callable[[Array, PyTree], tuple[Array, Array]]
    decide: Callable[[Array], Array] = lambda ratio: ratio
    known: Callable[[ClientData], PyTree] = lambda data: ()


def mean_vote() -> Vote:
    """The mean of logits: the normalised geometric mean of probabilities."""
    return Vote(lambda logits, known: (logits, jnp.ones((1,) * logits.ndim)))


def max_vote(sharpness: float = 8.0) -> Vote:
    """The largest log-probability of each class, as a power mean of probabilities.

        teacher = (1/s) log(mean_i p_i^s),   within log(clients) / s below the maximum

    A maximum is no sum, its power mean is; log-probabilities, since logits of different networks
    have no common zero. Those below -80 / s count as that.

    Raises:
      ValueError: sharpness is not positive.
    """
    if not sharpness > 0:
        raise ValueError(f"sharpness={sharpness} must be positive; 1 is the mean of probabilities.")

    def ballot(logits: Array, known) -> tuple[Array, Array]:
        log_p = jax.nn.log_softmax(logits)
        powers = jnp.exp(jnp.maximum(sharpness * log_p, -80.0))
        return powers, jnp.ones((1,) * logits.ndim)

    return Vote(ballot, lambda ratio: jnp.log(ratio) / sharpness)


def entropy_vote() -> Vote:
    """Logits weighted by exp(-entropy of the prediction): a softmax over clients of certainty."""

    def ballot(logits: Array, known) -> tuple[Array, Array]:
        log_p = jax.nn.log_softmax(logits)
        weight = jnp.exp((jnp.exp(log_p) * log_p).sum(-1, keepdims=True))
        return weight * logits, weight

    return Vote(ballot)


def coverage_vote(num_classes: int, label: str = "label") -> Vote:
    """Clients that saw many classes count for more, and no one's label frequencies count.

        teacher_k = Σ_i c_i (log p_i(k | x) - log π_ik) / Σ_i c_i,   c_i = exp(entropy of π_i) - 1

    with π_i the client's label frequencies, each count raised by 1/2: by Bayes' rule the bracket is
    what it would say had it seen all classes alike, and c_i how many classes it can tell from one.
    Each client discloses its class counts, 4 * num_classes bytes.

    Args:
      num_classes: K.
      label: the leaf of the clients' examples that holds their classes i32[N].
    """

    def known(data: ClientData) -> Array:
        real = (jnp.arange(data.index.shape[0]) < data.count).astype(jnp.float32)
        return jnp.zeros(num_classes).at[data.examples[label][data.index]].add(real)

    def ballot(logits: Array, counts: Array) -> tuple[Array, Array]:
        prior = (counts + 0.5) / (counts + 0.5).sum()
        share = counts / jnp.maximum(counts.sum(), 1)
        entropy = -jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1)), 0).sum()
        # Clients of one class each must still make a teacher where nobody else is.
        weight = jnp.broadcast_to(jnp.expm1(entropy) + 1e-3, (1,) * logits.ndim)
        balanced = jax.nn.log_softmax(logits) - lax.expand_dims(
            jnp.log(prior), range(logits.ndim - 1)
        )
        return weight * balanced, weight

    return Vote(ballot, known=known)


class PredictionUpload(NamedTuple):
    """What a client sends that trained a network for an ensemble.

    Attributes:
      move: as `difference` gives it.
      examples: f32[], its weight in the average.
      known: what its ballot needs besides (`Vote.known`).
    """

    move: PyTree
    examples: Exact
    known: Exact


class EnsembleSums(NamedTuple):
    """Sums over uploads, which the server makes of them.

    Attributes:
      move: of movements, weighted by examples.
      votes: of ballots on the public data; () where there is none.
    """

    move: Mean
    votes: PyTree


def fusion(model: Model, task: Task, how: Distill, vote: Vote, *, average: bool = True):
    """Returns `(receive, server)` of an algorithm with `PredictionUpload`s: average, then distil.

    Without public data the average is all.

    Args:
      model: whose variables the server's state holds.
      average: whether distillation starts from the clients' average; if not, from where it was.
    """

    def receive(state, public, upload: PredictionUpload) -> EnsembleSums:
        move = weighted(upload.examples.value, upload.move)
        if public is None:
            return EnsembleSums(move, ())
        network = moved(state.variables, upload.move)
        logits = predict(model, network, public_inputs(task, public)[0])
        num, den = vote.ballot(logits.astype(jnp.float32), upload.known.value)
        # Finite weights can still overflow: whoever does has no vote.
        sound = jnp.isfinite(num).all() & jnp.isfinite(den).all()
        return EnsembleSums(move, Mean(jnp.where(sound, num, 0), jnp.where(sound, den, 0)))

    def server(state, totals: EnsembleSums, public, key: Key):
        averaged = moved(state.variables, mean(totals.move))
        if public is None:
            return state._replace(variables=averaged), {}
        start = averaged if average else state.variables
        teacher = vote.decide(ratio(totals.votes))
        learned, losses = learn(model, start, task, public, teacher, how, key)
        voted = (totals.votes.den > 0).any()
        keep = lambda new, old: jnp.where(voted, new, old)
        variables = jax.tree.map(keep, learned, averaged)
        return state._replace(variables=variables), {"distill_loss": keep(losses.mean(), 0.0)}

    return receive, server


def ratio(votes: Mean) -> Array:
    """num / den of summed ballots; 1 where nobody voted, which every `decide` can take."""
    return jnp.where(votes.den > 0, votes.num / jnp.where(votes.den > 0, votes.den, 1), 1)


def public_inputs(task: Task, public: Mapping[str, Array] | None) -> tuple[Any, Array]:
    """(inputs, weight) of public data as the task prepares them, having seen no label.

    Raises:
      ValueError: there are no public data.
    """
    if public is None:
        raise ValueError(
            "This algorithm learns from public, unlabelled data, and there are none: give "
            "compile_rounds(public={...}) with the leaves of the clients' examples but the label, "
            "or --data.public=0.1 or --data.synthetic=200 on the command line."
        )
    blind = jnp.zeros(leading_size(public), jnp.int32)
    inputs, _, weight = task.prepare({**public, "label": blind}, None)
    return inputs, weight


def predict(model: Model, variables: Variables, inputs: Array) -> Array:
    """Logits [P, ...] of inputs [P, ...], some rows at a time."""
    apply = lambda x: model.apply(variables, x)[0]
    size = inputs.shape[0]
    if size <= _CHUNK:
        return apply(inputs)
    padded = jnp.pad(inputs, [(0, -size % _CHUNK)] + [(0, 0)] * (inputs.ndim - 1))
    logits = lax.map(apply, padded.reshape(-1, _CHUNK, *inputs.shape[1:]))
    return logits.reshape(-1, *logits.shape[2:])[:size]


def learn(
    model: Model, variables: Variables, task: Task, public, teacher: Array, how: Distill, key: Key
) -> tuple[Variables, Array]:
    """The variables after `how.steps` of distillation, and the loss of each step.

    Statistics stay those that the clients measured: public data may be of another domain.

    Args:
      teacher: logits f32[P, ..., K], a row for each public one.
    """
    inputs, weight = public_inputs(task, public)
    rows = {"inputs": inputs, "teacher": teacher, "weight": weight}

    def prepare(batch, key):
        return (batch["inputs"], batch["teacher"]), batch["teacher"], batch["weight"]

    def apply(variables: Variables, pair, **_):
        return model.apply(variables, pair[0])[0], variables.stats

    return distill(
        model._replace(apply=apply), variables, lambda pair: pair[1],
        task._replace(prepare=prepare), rows, steps=how.steps, batch_size=how.batch_size,
        optimizer=how.optimizer, key=key, temperature=how.temperature, divergence=how.divergence,
    )  # fmt: skip


def check_distill(how: Distill) -> None:
    """Raises ValueError for settings of distillation that are out of range."""
    if how.steps < 1 or how.batch_size < 1 or not how.temperature > 0:
        raise ValueError(
            "Distill needs steps and batch_size of at least 1 and a temperature above 0, got "
            f"{how.steps}, {how.batch_size}, {how.temperature}."
        )


def distill_for(
    setting: Setting,
    *,
    distill_steps: int = 20,
    distill_batch_size: int = 32,
    distill_learning_rate: float = 1e-3,
    distill_temperature: float = 1.0,
) -> Distill:
    """How the server of a run distils, with Adam.

    Args:
      distill_steps: steps of the server in a round.
      distill_batch_size: public rows of such a step.
      distill_learning_rate: of Adam, which starts anew in every round.
      distill_temperature: of teacher and student.
    """
    if not 0 < distill_learning_rate < float("inf"):
        raise ValueError(f"distill_learning_rate={distill_learning_rate} must be above 0.")
    how = Distill(
        optax.adam(distill_learning_rate), distill_steps, distill_batch_size, distill_temperature
    )
    check_distill(how)
    return how


def vote_for(
    setting: Setting, *, vote: Literal["auto", "mean", "max", "entropy", "coverage"] = "auto"
) -> Vote:
    """How the clients' predictions become those of the teacher of a run.

    Args:
      vote: mean of logits, max of log-probabilities, mean weighted by certainty (entropy), or by
        the classes that a client has seen, which it tells the server (coverage); auto: coverage
        where there are labels, else mean.
    """
    if vote == "auto":
        vote = "mean" if setting.num_classes is None else "coverage"
    if vote != "coverage":
        return {"mean": mean_vote, "max": max_vote, "entropy": entropy_vote}[vote]()
    if setting.num_classes is None:
        raise ValueError("vote=coverage counts labels, which text lacks; choose mean.")
    return coverage_vote(setting.num_classes)
