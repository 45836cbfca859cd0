"""Continual learning: streams of data, what protects against forgetting, and how to measure it."""

from jaxfm.federated.continual.drift import Drift, no_drift, watch
from jaxfm.federated.continual.elastic import Ewc, ewc, fisher_information
from jaxfm.federated.continual.learning import Learned, Scores, learn, scores
from jaxfm.federated.continual.routing import Bank, Routed, learn_adapters, predict, route
from jaxfm.federated.continual.stream import Stage, by_groups, rehearsed
from jaxfm.federated.continual.teaching import Lwf, lwf

__all__ = [
    "Bank",
    "Drift",
    "Ewc",
    "Learned",
    "Lwf",
    "Routed",
    "Scores",
    "Stage",
    "by_groups",
    "ewc",
    "fisher_information",
    "learn",
    "learn_adapters",
    "lwf",
    "no_drift",
    "predict",
    "rehearsed",
    "route",
    "scores",
    "watch",
]
