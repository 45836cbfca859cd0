"""Adversaries among the clients, for tests and benchmarks of aggregation.

    federation = marked(federation, clients)           # who they are: a leaf of the examples
    algorithm = with_attack(algorithm, sign_flip())    # around with_robust: what they upload

An attack on uploads sees those of all clients, as the strongest adversaries are assumed to, and
replaces the adversaries' own before they are aggregated:

    attack(rows f32[n, d], weights f32[n], false bool[n], key) -> rows f32[n, d]

A row is what a client says (its movement), weight 0 marks an absent one, and only rows that are
`false` are replaced. Attacks on data (`flipped_labels`, `backdoored`) change the adversaries'
examples, on which they train as everybody does; whoever is `marked` besides, with `scaling` say,
replaces the model (Bagdasaryan et al. 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm

from jaxfm.data.federation import Federation, all_rows, leading_size
from jaxfm.federated.algorithm import Algorithm, Bucket, ClientData, Exact, Profile
from jaxfm.federated.wrappers.rows import Rows, from_rows, rows_of
from jaxfm.model import Array, Key, Model, PyTree, Variables
from jaxfm.tasks import Task, evaluate

MARK = "adversary"  # the leaf of the examples that says whose rows are an adversary's, i32[N]

Attack = Callable[[Array, Array, Array, Key], Array]


class Attacked(NamedTuple):
    """An upload, and whether it is to be replaced; known to the attack and not to the server.

    Attributes:
      own: of the algorithm.
      kind: i32[], 0 for the honest, else 1 and the number of the attack.
      seed: u32[], of what it draws.
    """

    own: PyTree
    kind: Exact
    seed: Exact


def with_attack(algorithm: Algorithm, *attacks: Attack, claims: float = 1.0) -> Algorithm:
    """The algorithm with adversaries among its clients, who replace what they upload.

    Wrap it around `with_robust`. Each upload holds 8 bytes more.

    Args:
      algorithm: whose uploads are `Mean`s of one weight a client.
      *attacks: of `sign_flip`, `scaling`, `gaussian`, `inner_product`, `little_is_enough`, or
        functions like theirs. Which of several an adversary follows, `marked` says, so that one
        compiled program serves them all.
      claims: factor of the weight that adversaries claim: 100 for a hundred times the examples that
        they have.
    Raises:
      ValueError: no attack; claims is not above 0. Examples that are not `marked` and uploads that
        are no weighted means are found when the rounds are traced.
    """
    if not 0 < claims < float("inf"):
        raise ValueError(f"claims={claims} must be a factor above 0.")
    if not attacks:
        raise ValueError("Give at least one attack, such as sign_flip().")
    buckets = tuple(_attacked(bucket, attacks, claims) for bucket in algorithm.buckets)
    return algorithm._replace(buckets=buckets)


def sign_flip(scale: float = 1.0) -> Attack:
    """-scale times what the client would say."""
    return lambda rows, weights, false, key: -scale * rows


def scaling(factor: float) -> Attack:
    """`factor` times what the client would say; with the cohort's size it replaces the mean."""
    return lambda rows, weights, false, key: factor * rows


def gaussian(deviation: float) -> Attack:
    """Noise of mean zero in the place of a movement. Source: Blanchard et al. 2017, section 5."""
    return lambda rows, weights, false, key: deviation * jax.random.normal(key, rows.shape)


def inner_product(scale: float = 1.0) -> Attack:
    """-scale times the mean of the honest, so that the aggregate may point away from it.

    Source: Xie et al. 2020 (Fall of empires), section 4.
    """

    def attack(rows: Array, weights: Array, false: Array, key: Key) -> Array:
        mean, _ = _honest_moments(rows, weights, false)
        return jnp.broadcast_to(-scale * mean, rows.shape)

    return attack


def little_is_enough(z: float | None = None) -> Attack:
    """The honest mean less z honest deviations: near enough to be believed, and always one way.

    Source: Baruch et al. 2019 (A little is enough), algorithm 3.

    Args:
      z: deviations; None: the most with which enough honest clients lie farther out that the
        adversaries and they are a majority, if honest values are normal:
        Phi^-1((m - s) / (m - f)), s = floor(m / 2) + 1.
    """

    def attack(rows: Array, weights: Array, false: Array, key: Key) -> Array:
        mean, deviation = _honest_moments(rows, weights, false)
        m, f = (weights > 0).sum(), ((weights > 0) & false).sum()
        honest = jnp.maximum(m - f, 1).astype(jnp.float32)
        share = (m - (m // 2 + 1)).astype(jnp.float32) / honest
        far = norm.ppf(jnp.clip(share, 0.5, 0.999)) if z is None else jnp.float32(z)
        return jnp.broadcast_to(mean - far * deviation, rows.shape)

    return attack


class Trigger(NamedTuple):
    """What makes a backdoored model answer with a class of the adversary's choice.

    Attributes:
      stamp: `(examples, leaves [N, ...]) -> examples` that hold the trigger; NumPy in and out.
      target: the class that they are to be taken for.
    """

    stamp: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
    target: int


def patch(target: int, *, size: int = 2, value: float = 1.0, leaf: str = "image") -> Trigger:
    """A square of one value in the last rows and columns of images [N, H, W, C] or [N, H, W].

    Raises:
      ValueError: size below 1.
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1 pixel.")

    def stamp(examples: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        images = np.array(_leaf(examples, leaf))
        images[:, -size:, -size:] = value
        return {**examples, leaf: images}

    return Trigger(stamp, target)


def token(target: int, number: int, *, place: int = 1, leaf: str = "tokens") -> Trigger:
    """One token at a place of every text i[N, T], in the place of what stood there."""

    def stamp(examples: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        tokens = np.array(_leaf(examples, leaf))
        tokens[:, place] = number
        return {**examples, leaf: tokens}

    return Trigger(stamp, target)


def marked(federation: Federation, clients: Sequence[int], attack: int = 0) -> Federation:
    """The federation whose examples say, by a leaf "adversary", which are an adversary's.

    Marks that are there already stay, so several calls name adversaries of several kinds; with no
    client everybody is honest, and the compiled program the same.

    Args:
      federation: whose clients they are.
      clients: the adversaries.
      attack: which attack of `with_attack` they follow, by number.
    Raises:
      ValueError: a client that does not exist, or a row that an adversary shares with others.
    """
    own, size = _rows_of(federation, clients), leading_size(federation.examples)
    mark = np.array(federation.examples.get(MARK, np.zeros(size, np.int32)))
    mark[own] = 1 + attack
    return federation._replace(examples={**federation.examples, MARK: mark})


def flipped_labels(
    federation: Federation, clients: Sequence[int], num_classes: int, *, label: str = "label"
) -> Federation:
    """The federation whose adversaries hold class K - 1 - y where it is y.

    Source: Fang et al. 2020 (Local model poisoning attacks), section 5.1.
    """
    labels, own = np.array(_leaf(federation.examples, label)), _rows_of(federation, clients)
    labels[own] = num_classes - 1 - labels[own]
    return federation._replace(examples={**federation.examples, label: labels})


def backdoored(
    federation: Federation,
    clients: Sequence[int],
    trigger: Trigger,
    *,
    share: float = 0.5,
    seed: int = 0,
    label: str = "label",
) -> Federation:
    """The federation whose adversaries stamp a share of their rows and label them as the target.

    Source: Gu et al. 2017 (BadNets), section 4; in federated learning Bagdasaryan et al. 2020.

    Raises:
      ValueError: share is not above 0 and up to 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must be above 0 and up to 1.")
    examples, own = federation.examples, _rows_of(federation, clients)
    count = max(1, round(share * len(own)))
    chosen = np.random.default_rng(seed).choice(own, min(count, len(own)), replace=False)
    stamped = trigger.stamp({name: np.asarray(leaf)[chosen] for name, leaf in examples.items()})
    stamped[label] = np.full_like(stamped[label], trigger.target)
    changed: dict[str, Any] = {name: np.array(leaf) for name, leaf in examples.items()}
    for name, leaf in stamped.items():
        changed[name][chosen] = leaf
    return federation._replace(examples=changed)


def backdoor_success(
    model: Model,
    variables: Variables,
    task: Task,
    examples: Mapping[str, np.ndarray],
    trigger: Trigger,
    *,
    batch_size: int = 256,
    label: str = "label",
) -> float:
    """The share of stamped examples of other classes that the model takes for the target."""
    others = np.flatnonzero(np.asarray(_leaf(examples, label)) != trigger.target)
    stamped = trigger.stamp({name: np.asarray(leaf)[others] for name, leaf in examples.items()})
    stamped[label] = np.full_like(stamped[label], trigger.target)
    return evaluate(model.apply, variables, task, stamped, batch_size)["accuracy"]


def _attacked(bucket: Bucket, attacks: Sequence[Attack], claims: float) -> Bucket:
    def client(download: PyTree, memory: PyTree, data: ClientData, profile: Profile, key: Key):
        upload, memory, info = bucket.client(download, memory, data, profile, key)
        if MARK not in data.examples:
            raise ValueError(
                f"The examples have no leaf {MARK!r}: name the adversaries by marked(federation, "
                "clients)."
            )
        kind = data.examples[MARK][data.index[0]].astype(jnp.int32)
        seed = jax.random.bits(jax.random.fold_in(key, 2**32 - 1))
        return Attacked(upload, Exact(kind), Exact(seed)), memory, info

    def receive(server: PyTree, public: PyTree, upload: Attacked) -> Attacked:
        return upload._replace(own=bucket.receive(server, public, upload.own))

    def combine(server: PyTree, received: Attacked, counted: Array) -> PyTree:
        kind = jnp.where(counted, received.kind.value, 0)
        false = kind > 0
        # Absent clients were received as zeros.
        key = jax.random.key(received.seed.value.sum())
        matrices = []
        for part, (values, weights) in enumerate(rows_of(received.own, counted)):
            said = values
            for number, attack in enumerate(attacks):
                lie = attack(values, weights, false, jax.random.fold_in(key, part))
                said = jnp.where((kind == 1 + number)[:, None], lie, said)
            matrices.append(Rows(said, claims * weights))
        lies = from_rows(received.own, matrices)
        over = lambda x: false.reshape(-1, *[1] * (x.ndim - 1))
        pick = lambda lie, own: jnp.where(over(own), lie, own)
        heard = jax.tree.map(pick, lies, received.own)
        if bucket.combine is not None:
            return bucket.combine(server, heard, counted)
        return jax.tree.map(lambda x: x.sum(0), heard)

    travels = None
    if bucket.travels is not None:
        own_travels = bucket.travels
        travels = lambda upload: Attacked(own_travels(upload.own), Exact(1.0), Exact(1.0))
    return bucket._replace(client=client, receive=receive, combine=combine, travels=travels)


def _honest_moments(rows: Array, weights: Array, false: Array) -> tuple[Array, Array]:
    """Mean and standard deviation f32[1, d] of the honest rows, which count alike."""
    honest = ((weights > 0) & ~false).astype(jnp.float32)[:, None]
    count = jnp.maximum(honest.sum(), 1)
    mean = (honest * rows).sum(0, keepdims=True) / count
    variance = (honest * jnp.square(rows - mean)).sum(0, keepdims=True) / count
    return mean, jnp.sqrt(variance)


def _rows_of(federation: Federation, clients: Sequence[int]) -> np.ndarray:
    """The rows of some clients, which nobody else may own."""
    parts = all_rows(federation)
    wrong = [client for client in clients if not 0 <= client < len(parts)]
    if wrong:
        raise ValueError(f"There is no client {wrong[0]}; there are {len(parts)}, from 0 on.")
    of = lambda numbers: np.concatenate([np.zeros(0, np.int32), *(parts[i] for i in numbers)])
    own = of(sorted(set(clients)))
    shared = np.intersect1d(own, of(sorted(set(range(len(parts))) - set(clients))))
    if len(shared):
        raise ValueError(
            f"Row {shared[0]} belongs to an adversary and to an honest client; give adversaries "
            "rows of their own."
        )
    return own


def _leaf(examples: Mapping[str, Any], name: str) -> Any:
    if name not in examples:
        raise ValueError(f"The examples have no leaf {name!r}; they have {sorted(examples)}.")
    return examples[name]
