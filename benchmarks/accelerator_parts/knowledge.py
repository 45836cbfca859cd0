"""Part 5: FedKEMF, whose clients own residual networks of two depths while a small one travels.

The same rows as in part 3. Against it: FedAvg of the larger network that clients own, and of the
knowledge network itself. The server distils on half of the validation images, without labels; the
other half is what accuracies on validation rows are of, for all three.
"""

from __future__ import annotations

import functools

import numpy as np
import optax

from accelerator_parts import contest
from accelerator_parts.frame import Case, Figures, Part, Setting
from jaxfm.federated import Distill, Local, fed_avg, fed_kemf
from jaxfm.model import Model
from jaxfm.models.families.cnn import mlp
from jaxfm.models.families.resnet import resnet, resnet_config

DISTILL_RATE = 1e-3


def networks(setting: Setting) -> tuple[Model, list[Model]]:
    """The knowledge network, and those that clients own, the largest last."""
    if setting.dry:
        return mlp((64, 4, 10)), [mlp((64, 8, 10)), mlp((64, 16, 10))]
    return resnet(resnet_config(20)), [resnet(resnet_config(depth)) for depth in (32, 44)]


def split(rows: contest.Rows) -> tuple[contest.Rows, dict[str, np.ndarray]]:
    """Half of the validation images become public, without their labels."""
    half = len(rows.validation["label"]) // 2
    left = {name: leaf[half:] for name, leaf in rows.validation.items()}
    return rows._replace(validation=left), {"image": rows.validation["image"][:half]}


def cases(setting: Setting) -> dict[str, Case]:
    work = "digits" if setting.dry else "paper_resnet20"
    loaded = functools.cache(lambda: contest.load(work, setting))
    dealt = functools.cache(lambda: split(loaded()[1]))
    rows = lambda: dealt()[0]

    def make(name: str) -> contest.Contender:
        size, (knowledge, owned) = loaded()[0].size, networks(setting)
        epochs, steps = (1, 10) if setting.dry else (size.epochs, 200)
        local = Local(optax.sgd(setting.rate, momentum=0.9), size.batch, epochs)
        everybody = np.zeros(size.clients, np.int32)
        if name == "fed_kemf":
            distill = Distill(optax.adam(DISTILL_RATE), steps, size.batch)
            algorithm = fed_kemf(knowledge, contest.TASK, local, owned, distill)
            bucket = np.arange(size.clients, dtype=np.int32) % len(owned)
            return contest.Contender(algorithm, knowledge, bucket, dealt()[1])
        model = owned[-1] if name == "fed_avg_large" else knowledge
        return contest.Contender(fed_avg(model, contest.TASK, local), model, everybody)

    names = ("fed_avg_large", "fed_kemf") if setting.dry else (
        "fed_avg_large", "fed_kemf", "fed_avg_small",
    )  # fmt: skip
    table = {name: functools.partial(make, name) for name in names}
    return {
        "width": contest.width_case(table["fed_kemf"], rows, setting),
        "rounds": contest.contest_case("part5", table, rows, setting),
    }


def ratio(figures: dict[str, Figures]) -> float | None:
    """How many times fewer bytes a round FedKEMF sends than FedAvg."""
    return figures.get("rounds", {}).get("fed_kemf", {}).get("bytes_a_round_saving")


PART = Part(
    "part5_fed_kemf", cases, ratio, "bytes a round of FedAvg's large network over those of FedKEMF"
)
