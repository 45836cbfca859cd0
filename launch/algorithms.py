"""Every federated algorithm by its name, made from the parts of a run: a line each.

A new one is a line in `ALGORITHMS`; --algorithm and --compare know it from there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfm import tasks
from jaxfm.config import check, option
from jaxfm.federated.algorithm import Algorithm
from jaxfm.federated.algorithms.adp import adp
from jaxfm.federated.algorithms.fed_avg import fed_avg
from jaxfm.federated.algorithms.fed_df import fed_df
from jaxfm.federated.algorithms.fed_dp import fed_dp
from jaxfm.federated.algorithms.fed_dyn import fed_dyn
from jaxfm.federated.algorithms.fed_kemf import fed_kemf
from jaxfm.federated.algorithms.fed_md import fed_md
from jaxfm.federated.algorithms.fed_nova import fed_nova
from jaxfm.federated.algorithms.fed_opt import fed_adam, fed_avg_m, fed_yogi
from jaxfm.federated.algorithms.fed_per import fed_per
from jaxfm.federated.algorithms.fed_prox import fed_prox
from jaxfm.federated.algorithms.fed_rolex import fed_rolex
from jaxfm.federated.algorithms.hetero_fl import hetero_fl
from jaxfm.federated.algorithms.lg_fed_avg import lg_fed_avg
from jaxfm.federated.algorithms.raffm import raffm
from jaxfm.federated.algorithms.rafl import rafl
from jaxfm.federated.algorithms.scaffold import scaffold
from jaxfm.federated.algorithms.spatl import spatl
from jaxfm.federated.local import Local
from jaxfm.federated.partition import IsPersonal
from jaxfm.federated.parts.channel_selection import agent, saliency
from jaxfm.federated.parts.ensemble import (
    Distil,
    Vote,
    coverage_vote,
    entropy_vote,
    max_vote,
    mean_vote,
    predict,
    public_inputs,
)
from jaxfm.federated.wrappers.compress import compressed, quantised, top_k
from jaxfm.model import Model, Variables, count_parameters
from jaxfm.search.elastic.supernet import supernet
from jaxfm.search.strategies.gnn_rl import gnn_rl, load_policy
from jaxfm.search.strategies.policy_graph import policy_graph
from jaxfm.search.strategies.project import Budget
from jaxfm.search.subnets import model_network
from jaxfm.search.trace.groups import Network
from jaxfm.subnet import Subnet, extract

if TYPE_CHECKING:
    from jaxfm.launch.federate import FederateConfig


@dataclasses.dataclass(frozen=True)
class DistilConfig:
    """How the server learns from its clients' predictions on public data (--data.public)."""

    steps: int = option(20, "fed_df, fed_kemf, rafl: of the server's, in a round")
    batch_size: int = option(32, "public rows of such a step")
    learning_rate: float = option(1e-3, "of adam, anew in every round")
    temperature: float = option(1.0, "of teacher and student")
    vote: Literal["auto", "mean", "max", "entropy", "coverage"] = option(
        "auto",
        "how predictions become a teacher's; coverage weighs by the classes that a client has seen "
        "(and tells the server); auto: coverage where there are labels, else mean",
    )

    def __post_init__(self):
        check(self)
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"distil.{name}={getattr(self, name)}: give at least 1.")
        for name in ("learning_rate", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"distil.{name}={getattr(self, name)}: give a number above 0.")


class Parts(NamedTuple):
    """What an algorithm is made of.

    Attributes:
      variables: of the full model, as the run starts from them.
      is_last: of the path of a leaf, whether it belongs to the last layer.
      tiers: of the model, the widest first.
      axes: that tiers cut.
      tier_of: `() -> i32[C]`, the tier that each client's machine carries.
      public: unlabelled examples of the server's, or None.
      some: a few examples, for the shapes of inputs.
      num_classes: of labels, or None for text.
    """

    model: Model
    variables: Variables
    task: tasks.Task
    local: Local
    num_clients: int
    is_last: IsPersonal
    tiers: tuple[Subnet, ...]
    axes: tuple[str, ...]
    tier_of: Callable[[], np.ndarray]
    public: Mapping[str, Any] | None
    some: Mapping[str, Any]
    num_classes: int | None


class Made(NamedTuple):
    """An algorithm, and what it wants otherwise than by default.

    Attributes:
      start: variables that its run starts from; None: the full model's.
      bucket: i32[C], where it has itself chosen what each client trains.
    """

    algorithm: Algorithm
    start: Variables | None = None
    bucket: np.ndarray | None = None


def make_algorithm(config: FederateConfig, parts: Parts) -> Made:
    """The algorithm that the config names, with uploads and downloads as it wants them."""
    made = ALGORITHMS[config.algorithm](config, parts)
    if config.upload == "full" and config.download == "full":
        return made
    bits = {"8bit": 8, "4bit": 4}
    if config.upload == "top_k":
        method = top_k(config.top_k, bits=8)
    elif config.upload == "full":
        method = top_k(1.0)  # all entries, as they are: downloads alone are narrow
    else:
        method = quantised(bits[config.upload], block=256)
    down = bits.get(config.download)
    return made._replace(algorithm=compressed(made.algorithm, method, down=down))


def _distil(config: FederateConfig) -> Distil:
    how = config.distil
    return Distil(optax.adam(how.learning_rate), how.steps, how.batch_size, how.temperature)


def _vote(config: FederateConfig, p: Parts) -> Vote:
    name = config.distil.vote
    if name == "auto":
        name = "mean" if p.num_classes is None else "coverage"
    if name == "coverage":
        if p.num_classes is None:
            raise ValueError("distil.vote=coverage counts labels, which text lacks; choose mean.")
        return coverage_vote(p.num_classes)
    return {"mean": mean_vote, "max": max_vote, "entropy": entropy_vote}[name]()


def _networks(p: Parts) -> list[Model]:
    """The tiers as architectures of their own, each drawn anew by its own key."""

    def network(tier: Subnet) -> Model:
        return p.model._replace(init=lambda key: extract(p.model.init(key), p.model.axes, tier))

    return [network(tier) for tier in p.tiers]


def _fed_md(config: FederateConfig, p: Parts) -> Made:
    says = lambda variables: predict(p.model, variables, public_inputs(p.task, p.public)[0])
    logits = jax.eval_shape(says, p.variables).shape
    digest = p.local._replace(epochs=1)
    return Made(fed_md(_networks(p), p.task, p.local, digest, logits))


def _fed_kemf(config: FederateConfig, p: Parts) -> Made:
    """The smallest tier travels; clients own the tiers."""
    networks = _networks(p)
    algorithm = fed_kemf(networks[-1], networks, p.task, p.local, _distil(config),
                         vote=_vote(config, p))  # fmt: skip
    return Made(algorithm, extract(p.variables, p.model.axes, p.tiers[-1]))


def _rafl(config: FederateConfig, p: Parts) -> Made:
    """Members of as many parameters as the tier that a client carries."""
    smallest = min(0.5, *config.tiers)
    net = supernet(p.model, p.variables, p.axes, smallest=smallest)
    least = float(net.parameters(jnp.asarray(net.smallest, jnp.float32)))
    sizes = np.array(
        [count_parameters(extract(p.variables, p.model.axes, tier).params) for tier in p.tiers]
    )
    limits = np.maximum(sizes[p.tier_of()], least)
    made = rafl(
        net, p.model, p.task, p.local, _distil(config),
        [Budget("parameters", net.parameters, limits)], num_tiers=len(p.tiers),
        vote=_vote(config, p),
    )  # fmt: skip
    return Made(made.algorithm, made.start, made.bucket)


def _network(p: Parts) -> Network:
    """The groups of channels that can be pruned."""
    inputs, _, _ = p.task.prepare(dict(p.some), None)
    return model_network(p.model, p.variables, inputs)


def _spatl(config: FederateConfig, p: Parts) -> Made:
    network, budget = _network(p), {"macs": config.keep}
    select = saliency(network, budget)
    if config.select == "agent":
        policy = load_policy(config.policy) if config.policy else None
        strategy = gnn_rl(policy_graph(network, p.variables), batch=8, policy=policy)
        select = agent(network, budget, strategy, p.task)
    algorithm = spatl(
        p.model, p.task, p.local, select, num_clients=p.num_clients, is_personal=p.is_last
    )
    return Made(algorithm)


def _adp(config: FederateConfig, p: Parts) -> Made:
    """The target is reached after half of the rounds."""
    rounds = max(1, config.rounds // 2)
    made = adp(_network(p), p.model, p.task, p.local, target=config.keep, rounds=rounds)
    return Made(made.algorithm)


NEEDS_PUBLIC = ("fed_df", "fed_md")  # fed_kemf and rafl distil where there are public data
SENDS_LOGITS = ("fed_md",)  # not movements, whose rest may come later

ALGORITHMS: dict[str, Callable[[FederateConfig, Parts], Made]] = {
    "fed_avg": lambda c, p: Made(fed_avg(p.model, p.task, p.local)),
    "fed_prox": lambda c, p: Made(fed_prox(p.model, p.task, p.local, mu=c.mu)),
    "fed_avg_m": lambda c, p: Made(fed_avg_m(p.model, p.task, p.local, momentum=c.server_momentum)),
    "fed_adam": lambda c, p: Made(
        fed_adam(p.model, p.task, p.local, learning_rate=c.server_learning_rate)
    ),
    "fed_yogi": lambda c, p: Made(
        fed_yogi(p.model, p.task, p.local, learning_rate=c.server_learning_rate)
    ),
    "scaffold": lambda c, p: Made(scaffold(p.model, p.task, p.local, num_clients=p.num_clients)),
    "fed_nova": lambda c, p: Made(fed_nova(p.model, p.task, p.local)),
    "fed_dyn": lambda c, p: Made(
        fed_dyn(p.model, p.task, p.local, num_clients=p.num_clients, alpha=c.fed_dyn_alpha)
    ),
    "fed_dp": lambda c, p: Made(fed_dp(p.model, p.task, p.local, threshold=c.threshold)),
    "fed_per": lambda c, p: Made(fed_per(p.model, p.task, p.local, is_personal=p.is_last)),
    "lg_fed_avg": lambda c, p: Made(lg_fed_avg(p.model, p.task, p.local, is_shared=p.is_last)),
    "hetero_fl": lambda c, p: Made(hetero_fl(p.model, p.task, p.local, p.tiers)),
    "fed_rolex": lambda c, p: Made(fed_rolex(p.model, p.task, p.local, p.tiers)),
    "raffm": lambda c, p: Made(raffm(p.model, p.task, p.local, p.tiers)),
    "spatl": _spatl,
    "adp": _adp,
    "fed_df": lambda c, p: Made(fed_df(p.model, p.task, p.local, _distil(c), vote=_vote(c, p))),
    "fed_md": _fed_md,
    "fed_kemf": _fed_kemf,
    "rafl": _rafl,
}
