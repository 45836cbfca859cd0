"""FedDF: the average of the clients' networks learns what their ensemble says.

    x0 = x + sum_i n_i (y_i - x) / sum_i n_i;   x <- argmin_x KL(softmax(mean_i f_{y_i}) || f_x)

from x0, on public data without labels. The mean of logits is over clients alike.
Source: Lin et al. 2020, algorithm 1; the paper stops by labelled validation data of the
server's, here the number of steps is given (a schedule in the optimizer decays its rate).
"""

from __future__ import annotations

from typing import NamedTuple

from jaxfm.federated.algorithm import Algorithm, Bucket, ClientData, Exact, Profile
from jaxfm.federated.averaging import difference
from jaxfm.federated.local import Local, local_fit, objective
from jaxfm.federated.parts.ensemble import (
    Distill,
    PredictionUpload,
    Vote,
    check_distill,
    distill_for,
    fusion,
    mean_vote,
    public_inputs,
    vote_for,
)
from jaxfm.federated.registry import register
from jaxfm.model import Key, Model, Variables
from jaxfm.tasks import Task


class FedDfState(NamedTuple):
    """The model is all that the server keeps."""

    variables: Variables


@register(like="fed_kemf", distill=distill_for, vote=vote_for)
def fed_df(
    model: Model, task: Task, local: Local, distill: Distill, *, vote: Vote | None = None
) -> Algorithm:
    """Federated averaging, then ensemble distillation on `compile_rounds(public={leaf: [P, ...]})`.

    Partition: parameters and statistics are shared; nothing is personal. Distillation does not
    move the statistics.

    Args:
      model: what all clients train.
      task: its loss.
      local: optimizer, batch size and epochs on the client.
      distill: how the server distils.
      vote: how the clients' logits make the teacher's; None: their mean, as in the paper.
    Raises:
      ValueError: settings of distillation out of range; no public data in `compile_rounds`.
    """
    check_distill(distill)
    vote = mean_vote() if vote is None else vote
    fit = local_fit(objective(model, task), local)
    receive, server = fusion(model, task, distill, vote)

    def send(state: FedDfState, public) -> Variables:
        public_inputs(task, public)  # raises where there is none
        return state.variables

    def client(download: Variables, memory, data: ClientData, profile: Profile, key: Key):
        trained, info = fit(download, data, profile.max_steps, key)
        move = difference(trained, download)
        return PredictionUpload(move, Exact(info.examples), Exact(vote.known(data))), memory, info

    bucket = Bucket(model, send, client, receive=receive)
    return Algorithm(FedDfState, (bucket,), server, model, needs_public=True)
