"""Robust aggregation, around any algorithm whose uploads are weighted means.

    totals = (m w) rule(x_1, ..., x_n),  m w      in place of      sum_i w_i x_i,  sum_i w_i

with x_i what client i says, m the number of clients whose upload counted and w the median of their
weights: the server's step sees the rule's result where it saw the mean. The rules are
`jaxfm.federated.wrappers.robust_rules`; any function of theirs is a rule.

What it costs: uploads stand side by side, memory for n of them and for a copy as rows, and the
server must see each, so nothing that shows it only their sum can stand below. Parameters and
statistics (`Exact` parts) are judged apart by the same rule, as are several means of one upload.
Clients that are absent, empty or not finite count for nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from jaxfm.data.federation import leading_size
from jaxfm.federated.algorithm import Algorithm, Bucket, ClientData, Profile
from jaxfm.federated.wrappers import robust_rules as rules
from jaxfm.federated.wrappers.rows import Rows, from_rows, rows_of
from jaxfm.model import Array, PyTree

RuleName = Literal[
    "none",
    "median",
    "trimmed_mean",
    "norm_bound",
    "krum",
    "multi_krum",
    "geometric_median",
    "fl_trust",
]
BY_FRACTION = ("trimmed_mean", "krum", "multi_krum")


def with_robust(
    algorithm: Algorithm,
    rule: rules.Rule,
    *,
    root: Mapping[str, Array] | None = None,
    root_steps: int = 2**30,
) -> Algorithm:
    """The algorithm whose uploads are aggregated by a rule instead of a weighted mean.

    Uploads may be compressed or of 16 bits: the rule sees them restored, in 32 bits. Wrap it before
    (inside) compression.

    Args:
      algorithm: with one kind of client, whose uploads are `Mean`s of one weight a client.
      rule: `(rows f32[n, d], weights f32[n]) -> f32[d]`; with `root`, `fl_trust` or another
        `(rows, weights, root f32[d]) -> f32[d]`, and the algorithm's clients must keep no memory.
      root: the server's own examples, with the leaves of the clients'. It trains on them as one
        more client, whose answer is never aggregated; its batches come in the same order in every
        round.
      root_steps: most local steps of that client.
    Raises:
      ValueError: several kinds of client, uploads that are combined already, `root` without a rule
        that takes it or the reverse. Uploads that are no weighted means are found when the rounds
        are compiled.
    """
    _check(algorithm, rule, root, root_steps)
    (bucket,) = algorithm.buckets
    own = None if root is None else _root_client(bucket, root, root_steps)

    def combine(server: PyTree, received: PyTree, counted: Array) -> PyTree:
        matrices = rows_of(received, counted)
        if own is None:
            return from_rows(received, [_judged(rule, *rows) for rows in matrices])
        roots = rows_of(own(server), jnp.ones(1, bool))
        judged = [
            _judged(lambda *args, r=r: rule(*args, r.values[0]), *rows)
            for rows, r in zip(matrices, roots, strict=True)
        ]
        return from_rows(received, judged)

    return algorithm._replace(buckets=(bucket._replace(combine=combine),))


def named_robust(
    algorithm: Algorithm,
    *,
    rule: RuleName = "none",
    fraction: float = 0.3,
    bound: float = 0.0,
    root: Mapping[str, Array] | None = None,
    root_steps: int = 2**30,
) -> Algorithm:
    """Robust aggregation by name, as scripts take it.

    Args:
      algorithm: as in `with_robust`.
      rule: how uploads become one; none: their weighted mean.
      fraction: share of adversaries that trimmed_mean, krum and multi_krum hold, below 0.5.
      bound: largest norm of a movement under norm_bound; 0: the median of the round's norms.
      root, root_steps: as in `with_robust`, for fl_trust.
    """
    if rule == "fl_trust":
        return with_robust(algorithm, rules.fl_trust, root=root, root_steps=root_steps)
    makers: dict[str, Callable[[], rules.Rule]] = {
        "median": lambda: rules.median,
        "trimmed_mean": lambda: rules.trimmed_mean(fraction),
        "norm_bound": lambda: rules.norm_bound(bound or None),
        "krum": lambda: rules.krum(fraction),
        "multi_krum": lambda: rules.multi_krum(fraction),
        "geometric_median": lambda: rules.geometric_median(),
    }
    return algorithm if rule == "none" else with_robust(algorithm, makers[rule]())


def _judged(rule: rules.Rule, values: Array, weights: Array) -> Rows:
    """The rule's result f32[d], and the weight f32[] by which it counts as a sum."""
    came = (weights > 0).any()
    result = jnp.where(came, rule(values, weights), 0)
    # The median, since the sum of weights is whatever one client claims.
    total = (weights > 0).sum(dtype=jnp.float32) * rules.median(weights[:, None], weights)[0]
    return Rows(result, jnp.where(came, total, 0))


def _root_client(
    bucket: Bucket, examples: Mapping[str, Array], max_steps: int
) -> Callable[[PyTree], PyTree]:
    """Returns `(server_state) -> received`, leaves [1, ...]: the server as a client of itself."""
    size = leading_size(examples)
    held = {name: jnp.asarray(leaf) for name, leaf in examples.items()}
    data = ClientData(held, jnp.arange(size, dtype=jnp.int32), jnp.int32(size))
    number = jnp.float32(jnp.inf)
    profile = Profile(jnp.int32(max_steps), number, number, number, number)
    key = jax.random.key(0)

    def received(server: PyTree) -> PyTree:
        download = bucket.send(server, None)
        memory = bucket.init_client(download, data, profile, key)
        if jax.tree.leaves(memory):
            raise ValueError(
                "A rule with root rows takes algorithms whose clients keep nothing between rounds, "
                "as the server does not; this one's clients have a memory."
            )
        upload, _, _ = bucket.client(download, memory, data, profile, key)
        return jax.tree.map(lambda x: x[None], bucket.receive(server, None, upload))

    return received


def _check(algorithm: Algorithm, rule: rules.Rule, root, root_steps: int) -> None:
    if len(algorithm.buckets) != 1:
        raise ValueError(
            f"A robust rule takes clients of one kind, and this algorithm has "
            f"{len(algorithm.buckets)}: in a small tier a few adversaries would be the majority. "
            "Give one tier, --tiers=1.0."
        )
    if algorithm.privacy is not None:
        raise ValueError(
            "A private algorithm bounds what a client adds to a sum; how far it moves another "
            "aggregation has no such bound. Leave the robust rule or privacy out."
        )
    if algorithm.buckets[0].combine is not None:
        raise ValueError(
            "These uploads are already combined in another way (by another rule or secure "
            "aggregation, say); a robust rule must see each of them. Leave one of the two out."
        )
    takes_root = len(inspect.signature(rule).parameters) == 3
    if takes_root and root is None:
        raise ValueError(
            "This rule judges by examples of the server's own: give root={...} with the leaves of "
            "the clients' examples."
        )
    if root is not None and not takes_root:
        raise ValueError("This rule does not look at root examples: leave root out, or fl_trust.")
    if root is not None and algorithm.needs_public:
        raise ValueError("A rule with root rows takes algorithms without public data.")
    if root_steps < 1:
        raise ValueError(f"root_steps={root_steps} must be at least 1.")
