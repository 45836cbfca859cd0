"""Pre-training of foundation models: central phases on public rows, federated ones on private."""

from jaxfm.federated.foundation.alternating import FoundationRun, alternate
from jaxfm.federated.foundation.central import Central, TrainState, central_steps, train_steps
from jaxfm.federated.foundation.phases import Phase, phases_of

__all__ = [
    "Central",
    "FoundationRun",
    "Phase",
    "TrainState",
    "alternate",
    "central_steps",
    "phases_of",
    "train_steps",
]
