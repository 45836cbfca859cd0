"""DiLoCo: many inner steps of AdamW on each client, one outer step of Nesterov on the server.

    d = sum_i n_i (y_i - x) / sum_i n_i;   m <- b m + d;   x <- x + a (d + b m)

with y_i the parameters after H inner steps of client i, which keeps the state of its inner
optimizer from round to round; nobody else sees it. A run that exchanges parameters every H steps
sends H times fewer bytes than one that exchanges every gradient.
Source: Douillard et al. 2023 (DiLoCo), algorithm 1 and section 3.1 (a = 0.7, b = 0.9).
"""

from __future__ import annotations

import optax

from jaxfm.federated.algorithm import Algorithm, Bucket, ClientData, Profile, weighted
from jaxfm.federated.algorithms.fed_opt import OWN_STEP, check_rates, server_optimizer
from jaxfm.federated.averaging import difference, send_variables
from jaxfm.federated.local import Local, continued_fit, objective
from jaxfm.federated.registry import register
from jaxfm.model import Key, Model, PyTree, Variables
from jaxfm.tasks import Task


@register(like="fed_adam", breaks=OWN_STEP)
def diloco(
    model: Model, task: Task, local: Local, *, learning_rate: float = 0.7, momentum: float = 0.9
) -> Algorithm:
    """DiLoCo: clients keep their optimizer, and the server steps with Nesterov momentum.

    Partition: parameters and statistics are shared; the optimizer's state stays with the client.
    A round without a single upload changes nothing. With momentum 0, learning rate 1 and an upload
    of the largest entries it is SparseLoCo.

    Args:
      model, task: as in `fed_avg`.
      local: the inner optimizer, AdamW in the paper, with the batch size and epochs of a round.
      learning_rate: of the outer steps.
      momentum: share of the last outer step that the server keeps; 0 is plain gradient descent.
    Raises:
      ValueError: a value out of range.
    """
    check_rates(learning_rate=learning_rate, momentum=momentum)
    outer = optax.sgd(learning_rate, momentum or None, nesterov=momentum > 0)
    init, server = server_optimizer(outer)
    start, fit = continued_fit(objective(model, task), local)

    def init_client(download: Variables, data: ClientData, profile: Profile, key: Key) -> PyTree:
        return start(download)

    def client(download: Variables, opt_state, data: ClientData, profile: Profile, key: Key):
        trained, opt_state, info = fit(download, opt_state, data, profile.max_steps, key)
        return weighted(info.examples, difference(trained, download)), opt_state, info

    bucket = Bucket(model, send_variables, client, init_client)
    return Algorithm(init, (bucket,), server, model)
