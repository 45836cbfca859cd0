"""The contract of a federated algorithm: pure functions, hyper-parameters in the closure.

One round: the server sends, clients train, and what they upload is added up.

    download = bucket.send(server, public)
    upload, memory, info = bucket.client(download, memory, data, profile, key)    # many clients
    sums = sum of bucket.receive(server, public, upload) over clients             # one psum
    totals = sum of bucket.lift(server, sums) over buckets
    server, info = algorithm.server(server, totals, public, key)

Received uploads are pytrees of *sums* (numerators and denominators, see `Mean`), so that one
all-reduce aggregates them and secure aggregation stays possible; narrow dtypes are summed in 32
bits. An aggregation that is not a sum, such as a median, asks for the uploads stacked
(`Bucket.combine`), and may leave them so over several buckets (`Stacked`). Clients of one shape
form a bucket, which is one compiled program; buckets may hold slices of one network or different
architectures, as long as `lift` brings their sums to the same coordinates.

A complete algorithm, the mean of all clients' numbers:

>>> from typing import NamedTuple
>>> import jax, jax.numpy as jnp, numpy as np
>>> from jaxfm.data.federation import federate
>>> from jaxfm.federated import Population, compile_rounds, profiles
>>> from jaxfm.model import Variables
>>> class State(NamedTuple):
...     variables: Variables
>>> def client(download, memory, data, profile, key):
...     real = (jnp.arange(data.index.shape[0]) < data.count).astype(jnp.float32)
...     x, n = data.examples["x"][data.index], data.count.astype(jnp.float32)
...     gap = (x - download) * real  # rows past `count` only fill the table
...     upload = weighted(n, gap.sum() / jnp.maximum(n, 1))
...     info = Info(Spent(steps=jnp.ones(())), examples=n, loss_total=gap @ gap, loss_count=n)
...     return upload, memory, info
>>> def server(state, totals, public, key):
...     x = state.variables.params["x"] + mean(totals)
...     return State(state.variables._replace(params={"x": x})), {}
>>> send = lambda state, public: state.variables.params["x"]
>>> toy = Algorithm(init=State, buckets=(Bucket(None, send, client),), server=server)

Three clients of unequal size hold the numbers 1 to 6:

>>> rows = [np.array([0]), np.array([1, 2]), np.array([3, 4, 5])]
>>> data = federate({"x": np.arange(1.0, 7.0, dtype=np.float32)}, rows)
>>> people = Population(data, profiles(3), bucket=np.zeros(3, np.int32))
>>> engine = compile_rounds(toy, people, cohort_size=3)
>>> zero = Variables({"x": jnp.zeros(())}, {}, {})
>>> state, info = engine.run(engine.init(zero, jax.random.key(0)))
>>> float(state.server.variables.params["x"])
3.5
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.federated.accounting.privacy import Privacy
from jaxfm.model import Array, Key, Model, PyTree, Variables

# Of the path of a leaf, ("classifier", "bias"): whether it stays with the clients.
IsPersonal = Callable[[tuple[str, ...]], bool]


class Profile(NamedTuple):
    """What one client's machine can do; scalars, or arrays [C] for all clients.

    Attributes:
      max_steps: i32, local steps it has time for in a round.
      flops_per_s: f32, sustained.
      memory_bytes: f32, for parameters, gradients and optimizer state.
      up_bytes_per_s, down_bytes_per_s: f32, of its link.
    """

    max_steps: Array
    flops_per_s: Array
    memory_bytes: Array
    up_bytes_per_s: Array
    down_bytes_per_s: Array


class ClientData(NamedTuple):
    """One client's examples: rows of arrays that all clients of a device share.

    Attributes:
      examples: leaves [N, ...].
      index: i32[M], the client's rows; padded.
      count: i32[], how many of them are real; 0 for an empty or absent client.
      validation_index, validation_count: the same for the rows that the client holds back from
        training and may select by; None where the population holds none back.
    """

    examples: Mapping[str, Array]
    # These two names hide methods of tuple that nobody needs here.
    index: Array  # type: ignore[assignment]
    count: Array  # type: ignore[assignment]
    validation_index: Array | None = None
    validation_count: Array | None = None


class Mean(NamedTuple):
    """A weighted mean as a ratio of sums.

    Attributes:
      num: a tree, the sum of weight * value.
      den: the sum of weights: f32[], or a tree like num where coordinates have weights of their
        own (coverage). In an upload it is `Exact`.
    """

    num: PyTree
    den: PyTree


class Known(NamedTuple):
    """A part of a download that clients already have (public data, say): it costs no bytes.

    Attributes:
      value: what they have.
    """

    value: PyTree


class Aside(NamedTuple):
    """A part of a download that a client takes as far as it has missed earlier downloads.

    It has no bytes of its own: clients report how many downloads they caught up on
    (`Spent.caught_up`), each of which costs as much as one of this round.

    Attributes:
      value: what there is to catch up on.
    """

    value: PyTree


class Exact(NamedTuple):
    """A part of an upload or download that no wrapper may round or leave out.

    Weights that are divided by, and statistics such as variances, which rounding or a late update
    may make zero or negative.

    Attributes:
      value: a tree that travels as it is.
    """

    value: PyTree


class Stacked(NamedTuple):
    """A part of what a bucket lifts that is no sum: that of another bucket is laid behind it.

    Attributes:
      value: a tree whose leaves have a leading axis, of clients say.
    """

    value: PyTree


def added(totals: PyTree, lifted: PyTree) -> PyTree:
    """The lifted sums of two buckets together: `Stacked` parts joined, all else added."""

    def add(a: Any, b: Any) -> Any:
        if not isinstance(a, Stacked):
            return jnp.add(a, b)
        return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), a, b)

    return jax.tree.map(add, totals, lifted, is_leaf=lambda x: isinstance(x, Stacked))


def exact(part: Any) -> Any:
    """The tree without its `Exact` markers."""
    is_exact = lambda x: isinstance(x, Exact)
    return jax.tree.map(lambda x: x.value if is_exact(x) else x, part, is_leaf=is_exact)


class Spent(NamedTuple):
    """The work of a client in one round, which counts though its update may be left out.

    Attributes:
      steps: f32[], local steps.
      flops: f32[], operations of the whole call, where they depend on the data; None: the ledger
        counts them by steps.
      bytes_up: f32[], bytes of the upload, where they depend on the data; None: the ledger counts
        them by shape.
      caught_up: f32[], whole number of earlier downloads that it took as well, since it had missed
        them (`Aside`); None: none.
    """

    steps: Array
    flops: Array | None = None
    bytes_up: Array | None = None
    caught_up: Array | None = None


class Info(NamedTuple):
    """What one client reports of a round, for logs and for the ledger; `local_fit` makes one.

    Attributes:
      spent: its work.
      examples: f32[], rows it trained on, by which it counts; with weights, the sum of these.
      loss_total, loss_count: f32[]; total / count is its mean training loss.
      extra: f32[] by name, an algorithm's own figures; they are summed over clients.
    """

    spent: Spent
    examples: Array
    loss_total: Array
    loss_count: Array
    extra: Mapping[str, Array] | None = None

    def measured(self, **spent: Any) -> Info:
        """The report with `flops` or `bytes_up` as the client itself measured them."""
        return self._replace(spent=self.spent._replace(**spent))


def mean(sums: Mean) -> PyTree:
    """num / den, and zero where den is zero: a coordinate that nobody covered does not move."""

    def ratio(num, den):
        den = den.astype(num.dtype)
        return jnp.where(den > 0, num / jnp.where(den > 0, den, 1), 0)

    den = sums.den.value if isinstance(sums.den, Exact) else sums.den
    if jax.tree_util.all_leaves([den]):
        return jax.tree.map(lambda num: ratio(num, den), sums.num)
    return jax.tree.map(ratio, sums.num, den)


def scaled(weight: Array, tree: PyTree) -> PyTree:
    """weight * tree: in the dtypes of the tree, of which only float16 and integers are widened.

    Only the product is rounded. Numbers of float16 end at 65504, which a client of many examples
    exceeds, so its products are float32 (and twice the bytes); products of integers are, too.
    """

    def times(x):
        narrow = x.dtype.itemsize < 4 or not jnp.issubdtype(x.dtype, jnp.floating)
        wide = jnp.float32 if narrow else x.dtype
        product = weight.astype(wide) * x.astype(wide)
        return product.astype(x.dtype) if x.dtype == jnp.bfloat16 else product

    return jax.tree.map(times, tree)


def full_width(x: Array) -> Array:
    """Floats of 16 bits as floats of 32; the rest as they are."""
    return x.astype(jnp.float32) if x.dtype in (jnp.bfloat16, jnp.float16) else x


def weighted(weight: Array, tree: PyTree) -> Mean:
    """One client's summand of a weighted mean: weight * tree over the weight f32[]."""
    return Mean(scaled(weight, tree), Exact(weight))


def anybody(weights: PyTree) -> Array:
    """bool[]: whether any of the summed weights is positive, that is, whether anybody reported."""
    return jnp.array([(weight > 0).any() for weight in jax.tree.leaves(weights)]).any()


def _global_variables(server: Any) -> Variables:
    return server.variables


def with_variables(server: Any, variables: Variables) -> Any:
    """A server's state with another global model in the place of its own, as of central training.

    What else the state holds (momentum, control variates) stays. A state that keeps more of the
    model than its `variables` has a method of this name; wrappers hold the state of an algorithm as
    `own`.

    Raises:
      ValueError: a state that has none of these.
    """
    fields = getattr(server, "_fields", ())
    if hasattr(server, "with_variables"):
        return server.with_variables(variables)
    if "variables" in fields:
        return server._replace(variables=variables)
    if "own" in fields:
        return server._replace(own=with_variables(server.own, variables))
    raise ValueError(
        f"A {type(server).__name__} cannot take a model that was trained centrally; give it a "
        "field 'variables', or a method with_variables(variables)."
    )


class Bucket(NamedTuple):
    """Clients that run the same program.

    Attributes:
      model: what these clients train; its `apply` evaluates their variables.
      send: `(server_state, public) -> download`: all that a client gets to see.
      client: `(download, memory, data: ClientData, profile: Profile, key)
        -> (upload, memory, info: Info)`. `upload` is a tree of sums, weights included.
      init_client: `(download, data, profile, key) -> memory`: what a client keeps between rounds.
      receive: `(server_state, public, upload) -> received`: what the server makes of one upload
        before it is added up (decompression, scattering, predictions on public data). The ledger
        counts the upload, in bytes by shape.
      combine: `(server_state, received, counted bool[n]) -> sums`, of the received uploads of n
        clients stacked along a leading axis, of which only those that are `counted` are valid;
        None: they are added up, and never stand side by side in memory.
      lift: `(server_state, sums) -> sums in the coordinates of all buckets`.
      shared: `(server_state) -> Variables` that all clients of the bucket predict with.
      personal: `(server_state, memory) -> Variables` that one client predicts with; None: clients
        have no models of their own, and `shared` is what they predict with.
      travels: `(upload) -> tree like it of f32[]`: the share of each leaf's bytes that a wire
        needs, where a mask in the upload leaves some out; None: all of it.
      sends_predictions: the upload holds predictions, in which small entries matter as much as
        large ones, and not movements, whose rest may be sent later.
      most_caught_up: of `Spent.caught_up` of one client in one round.
      changes_places: the entries of an upload stand for other parameters in every round, so that
        what is left out of one cannot be sent with the next.
      privacy: uploads are clipped, and who adds noise to their sum, "server" or "clients"; nothing
        may carry the rest of one over to a later round. None: nobody.
    """

    model: Model | None
    send: Callable[[PyTree, PyTree], PyTree]
    client: Callable[..., tuple[PyTree, PyTree, Info]]
    init_client: Callable[..., PyTree] = lambda download, data, profile, key: ()
    receive: Callable[[PyTree, PyTree, PyTree], PyTree] = lambda server, public, upload: upload
    combine: Callable[[PyTree, PyTree, Array], PyTree] | None = None
    lift: Callable[[PyTree, PyTree], PyTree] = lambda server, sums: sums
    shared: Callable[[PyTree], Variables] = _global_variables
    personal: Callable[[PyTree, PyTree], Variables] | None = None
    travels: Callable[[PyTree], PyTree] | None = None
    sends_predictions: bool = False
    most_caught_up: int = 0
    changes_places: bool = False
    privacy: str | None = None


def client_variables(bucket: Bucket, server: PyTree, memory: PyTree) -> Variables:
    """The variables that a client with this memory predicts with."""
    if bucket.personal is None:
        return bucket.shared(server)
    return bucket.personal(server, memory)


def wire_bytes(upload: PyTree, shares: PyTree) -> Array:
    """f32[]: bytes of an upload (arrays or shapes), each leaf by its share of `Bucket.travels`."""
    bits = jax.tree.map(lambda x, share: share * (x.size * x.dtype.itemsize), upload, shares)
    return jnp.asarray(sum(jax.tree.leaves(bits)), jnp.float32)


class Algorithm(NamedTuple):
    """A federated algorithm.

    Attributes:
      init: `(variables) -> server_state`, a NamedTuple with a field `variables`: the global model.
      buckets: the kinds of client, one compiled program each.
      server: `(server_state, totals, public, key) -> (server_state, figures)`, with `totals` the
        sum of all lifted uploads, all zeros when nobody took part, and `figures` f32[] by name.
      model: the network of the global model, to evaluate it by; its `init` is where a run starts.
        None: there is no global model.
      is_personal: which leaves of the model stay with the clients; None: none does.
      needs_public: whether rounds cannot run without public data.
      is_nested: whether buckets hold slices of the global model, each within the one before it:
        nobody trains what lies outside the largest one that has clients.
      assignment: i32[C], the bucket of each client, where the algorithm itself has planned it;
        None: any client may be in any bucket.
      privacy: what its rounds promise and cost (`with_privacy`); None: nothing.
    """

    init: Callable[[Variables], PyTree]
    buckets: tuple[Bucket, ...]
    server: Callable[[PyTree, PyTree, PyTree, Key], tuple[PyTree, dict[str, Array]]]
    model: Model | None = None
    is_personal: IsPersonal | None = None
    needs_public: bool = False
    is_nested: bool = False
    assignment: np.ndarray | None = None
    privacy: Privacy | None = None
