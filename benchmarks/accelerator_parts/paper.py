"""Part 3: FedAvg, SCAFFOLD and SPATL with ResNet-20 at the papers' setting.

All of CIFAR-10 over ten clients by Dirichlet(0.1) on labels, all of them a round, ten epochs of
batches of 64; the learning rate is the papers' own and the same for all.
"""

from __future__ import annotations

import functools

import numpy as np
import optax
from federated_parts.rows import listed_rows
from federated_parts.work import setting_of

from accelerator_parts import contest
from accelerator_parts.frame import Case, Figures, Part, Setting
from jaxfm.federated import Local

ROWS = listed_rows(keep=0.5)
ALGORITHMS = ("fed_avg", "spatl_personal", "scaffold")


def cases(setting: Setting) -> dict[str, Case]:
    work = "digits" if setting.dry else "paper_resnet20"
    loaded = functools.cache(lambda: contest.load(work, setting))
    rows = lambda: loaded()[1]

    def make(name: str) -> contest.Contender:
        data = loaded()[0]
        epochs = 1 if setting.dry else data.size.epochs
        local = Local(optax.sgd(setting.rate, momentum=0.9), data.size.batch, epochs)
        everybody = np.zeros(data.size.clients, np.int32)
        algorithm = ROWS[name].make(setting_of(data, local, setting.num_rounds))
        return contest.Contender(algorithm, data.model, everybody)

    names = ALGORITHMS[:2] if setting.dry else ALGORITHMS
    table = {name: functools.partial(make, name) for name in names}
    return {
        "width": contest.width_case(table["fed_avg"], rows, setting),
        "rounds": contest.contest_case("part3", table, rows, setting),
    }


def ratio(figures: dict[str, Figures]) -> float | None:
    """How many times fewer bytes SPATL with personal heads needs than FedAvg."""
    return figures.get("rounds", {}).get("spatl_personal", {}).get("bytes_saving")


PART = Part(
    "part3_paper", cases, ratio,
    "bytes until FedAvg is at its best over bytes until SPATL (personal predictor) is as good",
)  # fmt: skip
