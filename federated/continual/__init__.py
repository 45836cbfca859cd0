"""Continual learning: streams of data, what protects against forgetting, and how to measure it."""

from jaxfm.federated.continual.drift import Drift, no_drift, watch
from jaxfm.federated.continual.elastic import Ewc, ewc, fisher_information
from jaxfm.federated.continual.learning import Learned, Scores, learn, scores
from jaxfm.federated.continual.stream import Stage, by_groups, rehearsed
from jaxfm.federated.continual.teaching import Lwf, lwf

__all__ = [
    "Drift",
    "Ewc",
    "Learned",
    "Lwf",
    "Scores",
    "Stage",
    "by_groups",
    "ewc",
    "fisher_information",
    "learn",
    "lwf",
    "no_drift",
    "rehearsed",
    "scores",
    "watch",
]
