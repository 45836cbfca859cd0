"""Models of 16 bits that federate without losing small steps.

A number of bfloat16 keeps 8 binary digits: a step below 1/512 of it is rounded away, and so are the
many small steps that a server, its optimizer or a client's memory adds up over the rounds. What is
kept from round to round is therefore kept in 32 bits, while the network computes in its own 16
bits, and 16 bits travel: a download is rounded when it is sent, an upload when it is made, so that
a movement loses 1/512 of itself and not of the parameters that it moves.

    server:  w <- w + mean of movements       w, moments, variates and memories in 32 bits
    client:  x = round(w); the network sees round(y), the optimizer moves y; sends round(y - x)

As in mixed-precision training: Micikevicius et al. 2018, section 3.1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfm.federated.algorithm import (
    Algorithm,
    Bucket,
    ClientData,
    Profile,
    full_width,
    with_variables,
)
from jaxfm.model import Key, Model, PyTree, Variables


class MasterState(NamedTuple):
    """The server of an algorithm over a model of 16 bits.

    Attributes:
      variables: the global model in its own dtypes, for whoever evaluates or saves it.
      wide: the algorithm's own state, in 32 bits.
    """

    variables: Variables
    wide: PyTree

    def with_variables(self, variables: Variables) -> MasterState:
        """See `jaxfm.federated.algorithm.with_variables`."""
        return MasterState(
            _like(self.variables, variables), with_variables(self.wide, widened(variables))
        )


def has_halves(variables: Variables) -> bool:
    """Whether any trained parameter, array or shape, is of 16 bits."""
    return any(x.dtype in (jnp.bfloat16, jnp.float16) for x in jax.tree.leaves(variables.params))


def widened(tree: PyTree) -> PyTree:
    """The tree with its floats of 16 bits as floats of 32; frozen parameters stay as they are."""

    def part(x: Any) -> Any:
        if not isinstance(x, Variables):
            return full_width(x)
        params, stats = jax.tree.map(full_width, (x.params, x.stats))
        return x._replace(params=params, stats=stats)

    return jax.tree.map(part, tree, is_leaf=lambda x: isinstance(x, Variables))


def wide_model(model: Model) -> Model:
    """The model with parameters and statistics of 32 bits, which it rounds to its own to compute.

    It takes parameters that are rounded already, too, and slices.
    """
    first = jax.eval_shape(model.init, jax.random.key(0))
    own = {
        path: leaf.dtype
        for path, leaf in jax.tree_util.tree_leaves_with_path((first.params, first.stats))
    }

    def apply(variables: Variables, inputs, **options):
        params, stats = jax.tree_util.tree_map_with_path(
            lambda path, x: x.astype(own.get(path, x.dtype)), (variables.params, variables.stats)
        )
        output, stats = model.apply(
            variables._replace(params=params, stats=stats), inputs, **options
        )
        return output, widened(stats)

    return model._replace(init=lambda key: widened(model.init(key)), apply=apply)


def with_masters(own: Algorithm, over: Algorithm) -> Algorithm:
    """The algorithm that keeps 32 bits, sends 16, and costs a link what `own` costs it.

    Args:
      own: the algorithm over a model of 16 bits.
      over: the same one over `wide_model` of it.
    """

    def init(variables: Variables) -> MasterState:
        wide = over.init(widened(variables))
        like = jax.eval_shape(own.init, variables).variables  # which may hold more than was given
        return MasterState(_like(like, wide.variables), wide)

    def server(state: MasterState, totals: PyTree, public: PyTree, key: Key):
        new, figures = over.server(state.wide, totals, public, key)
        return MasterState(_like(state.variables, new.variables), new), figures

    buckets = tuple(_bucket(own, *pair) for pair in zip(own.buckets, over.buckets, strict=True))
    return own._replace(init=init, buckets=buckets, server=server)


def _bucket(algorithm: Algorithm, own: Bucket, over: Bucket) -> Bucket:
    def state_of(server: MasterState) -> PyTree:
        """Shapes of the state that `algorithm` itself would have."""
        return jax.eval_shape(algorithm.init, server.variables)

    def send(server: MasterState, public) -> PyTree:
        sent = jax.eval_shape(own.send, state_of(server), public)
        return _like(sent, over.send(server.wide, public))

    def client(download, memory, data: ClientData, profile: Profile, key: Key):
        upload, memory, info = over.client(widened(download), memory, data, profile, key)
        kept = jax.eval_shape(own.init_client, download, data, profile, key)
        sent, _, _ = jax.eval_shape(own.client, download, kept, data, profile, key)
        return _like(sent, upload), memory, info

    def receive(server: MasterState, public, upload):
        seen = widened(_like(state_of(server), server.wide))  # by the client, when it was sent
        return over.receive(seen, public, widened(upload))

    def shared(server: MasterState) -> Variables:
        return _like(jax.eval_shape(own.shared, state_of(server)), over.shared(server.wide))

    combine, personal = over.combine, over.personal
    return own._replace(
        model=own.model and over.model and own.model._replace(apply=over.model.apply),
        send=send,
        client=client,
        init_client=lambda download, *rest: over.init_client(widened(download), *rest),
        receive=receive,
        combine=combine and (lambda server, *rest: combine(server.wide, *rest)),
        lift=lambda server, sums: over.lift(server.wide, sums),
        shared=shared,
        personal=personal and (lambda server, *rest: personal(server.wide, *rest)),
    )


def _like(like: PyTree, tree: PyTree) -> PyTree:
    """The tree in the dtypes of another, of arrays or shapes."""
    return jax.tree.map(lambda own, x: x.astype(own.dtype), like, tree)
