"""FedDP: weights that are small after a local epoch become zero; the server averages densely.

    client   after each local epoch   W <- W [|W| > tau]   for every kernel
    server   x <- sum_i n_i y_i / sum_i n_i

As its published code has it, for comparison with `adp`, whose successor it is. A weight that one
client zeroes is filled up by the others, zeros travel like all other numbers and no machine is
faster by them; at the published tau a hundredth of the weights falls away.
Source: FedDP, after Yu et al. 2021 (arXiv 2106.06921).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxfm.federated.algorithm import (
    Algorithm,
    Bucket,
    ClientData,
    Info,
    Profile,
    Spent,
    weighted,
)
from jaxfm.federated.algorithms.fed_avg import fed_avg
from jaxfm.federated.averaging import difference, send_variables
from jaxfm.federated.local import Local, examples_of, local_fit, objective
from jaxfm.federated.registry import register
from jaxfm.model import Array, Key, Model, PyTree, Variables
from jaxfm.tasks import Task


@register(like="fed_avg")
def fed_dp(model: Model, task: Task, local: Local, *, threshold: float = 1e-3) -> Algorithm:
    """Federated averaging of clients that zero small weights; threshold 0 zeroes none.

    Partition: as in federated averaging. The optimizer starts anew in every epoch, as the published
    one, which has no momentum, might.

    Args:
      model, task, local: as in `fed_avg`.
      threshold: tau, below which a weight becomes zero after a local epoch.
    Raises:
      ValueError: threshold is negative or not finite.
    """
    if not 0 <= threshold < float("inf"):
        raise ValueError(f"threshold={threshold} must be a number of at least 0.")
    fit = local_fit(objective(model, task), local._replace(epochs=1))

    def sparse(params: PyTree) -> PyTree:
        large = lambda w: jnp.abs(w) > threshold if w.ndim > 1 else jnp.ones(w.shape, bool)
        return jax.tree.map(lambda w: jnp.where(large(w), w, jnp.zeros((), w.dtype)), params)

    def client(download: Variables, memory, data: ClientData, profile: Profile, key: Key):
        per_epoch = jnp.maximum(-(-data.count // local.batch_size), 1)

        def epoch(e: Array, carry: tuple[Variables, Info]):
            variables, so_far = carry
            left = profile.max_steps - e * per_epoch
            trained, info = fit(variables, data, left, jax.random.fold_in(key, e))
            trained = trained._replace(params=sparse(trained.params))
            return trained, jax.tree.map(jnp.add, so_far, info)

        epochs = jnp.clip(-(-profile.max_steps // per_epoch), 0, local.epochs)
        epochs = jnp.where(data.count > 0, epochs, 0)
        zero = jnp.zeros((), jnp.float32)
        trained, info = lax.fori_loop(
            0, epochs, epoch, (download, Info(Spent(zero), zero, zero, zero))
        )
        info = info._replace(examples=examples_of(data))  # of one epoch, not of all
        return weighted(info.examples, difference(trained, download)), memory, info

    bucket = Bucket(model, send_variables, client)
    return fed_avg(model, task, local)._replace(buckets=(bucket,))
