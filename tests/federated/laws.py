"""What the tests of federated algorithms share: one tiny classifier, its clients, and runs.

Populations differ in numbers and not in shapes, so that most laws of an algorithm share one
compiled program.
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxfm.adapters import lora, merge, pairs
from jaxfm.adapters.adapter import beside
from jaxfm.data.federation import Federation, RowIndex, federate
from jaxfm.federated import Algorithm, Distill, Local, Population, Setting, compile_rounds, profiles
from jaxfm.federated.algorithms.rafl import plan_members, rafl
from jaxfm.federated.registry import entries, last_layer
from jaxfm.federated.registry import make as make_entry
from jaxfm.model import Model, Variables, from_nnx
from jaxfm.models import mlp
from jaxfm.search.elastic.supernet import supernet
from jaxfm.search.strategies.project import Budget
from jaxfm.subnet import Subnet, embed
from jaxfm.tasks import classification

MODEL = mlp((6, 8, 3))
MODEL = MODEL._replace(init=jax.jit(MODEL.init))  # compiled once
ADAPTED = lora(MODEL, 2, targets="dense1,dense2", alpha=3.0)
TASK = classification(3, inputs="x")
LR = 0.1
LOCAL = Local(optax.sgd(LR), 4, 2)
TIERS = tuple(Subnet({"hidden1": np.arange(size)}) for size in (8, 4, 2))
DISTILL = Distill(optax.sgd(0.05), steps=3, batch_size=4)
PUBLIC = {"x": np.random.default_rng(1).normal(size=(5, 6)).astype(np.float32)}


class Case(NamedTuple):
    """An algorithm under the laws.

    Attributes:
      name: its name in the registry.
      options: that differ from the defaults.
      tiers: that its run offers.
    """

    name: str
    options: Mapping = MappingProxyType({})
    tiers: tuple[Subnet, ...] = TIERS[:2]


# Options under which a law says more than under the defaults. Every other algorithm of the registry
# is a case with its defaults.
MEAN = {"vote": "mean"}
# The last tier is the knowledge network: in the first bucket clients' own networks start from its
# weights, so that the first step of mutual learning is each one's own.
TWO_DESIGNS = (TIERS[0], TIERS[1], TIERS[0])
SPECIAL = {
    "fed_prox": Case("fed_prox", {"mu": 0.1}),
    "fed_dyn": Case("fed_dyn", {"alpha": 0.1}),
    "raffm": Case("raffm", {"reorder_every": 1, "distill": 0.5}),
    "fed_df": Case("fed_df", MEAN),
    "fed_kemf": Case("fed_kemf", MEAN, TWO_DESIGNS),
    "fed_kemf_published": Case("fed_kemf_published", {}, TWO_DESIGNS),
    "spatl": Case("spatl", {"keep": 0.6}),
    "adp_federated": Case("adp", {"federated_gates": True}),
    "hetero_fl_1": Case("hetero_fl", {}, (Subnet({}),)),
    "hetero_fl_3": Case("hetero_fl", {}, TIERS),
    "flora_ranks": Case("flora", {"ranks": (2, 1)}),
    "fed_ex_lora_rest": Case("fed_ex_lora", {"remainder": 2}),
}
ENTRIES = entries()
CASES = {name: Case(name) for name in ENTRIES} | SPECIAL
VARIANTS = [name for name, case in CASES.items() if name != case.name or ENTRIES[name].like]


def fixed(model: Model) -> Model:
    """Clients of the laws start alike."""
    return model._replace(init=lambda key: model.init(jax.random.key(7)))


def setting(
    model: Model = MODEL, task=TASK, local: Local = LOCAL, tiers: tuple[Subnet, ...] = TIERS
) -> Setting:
    """A run of six clients, as the registry sees it."""
    model = fixed(model)
    return Setting(
        model=model, variables=model.init(jax.random.key(0)), task=task, local=local,
        num_clients=6, total_examples=21.0, num_rounds=4, is_last=last_layer(model), tiers=tiers,
        axes=("hidden1",), tier_of=lambda: np.arange(6) % len(tiers), public=PUBLIC,
        some=examples(1), num_classes=3,
    )  # fmt: skip


def padded_member(model: Model, task, local: Local) -> Algorithm:
    """RaFL with a member of 16 channels, of which the first 8 are the model's, the others zeros."""
    wide = mlp((6, 32, 3))
    small = fixed(model).init(jax.random.key(0))
    like = jax.eval_shape(wide.init, jax.random.key(0))
    variables = embed(small, wide.axes, TIERS[0], like)
    in_order = lambda params, axes, name: -jnp.arange(32.0)
    net = supernet(wide, variables, ("hidden1",), importance=in_order)
    budgets = [Budget("channels", lambda counts: counts.sum(), np.array([16.0]))]
    members = plan_members(net, wide, budgets, search=lambda budgets, clients: np.array([16]))
    return rafl(wide, task, local, members, DISTILL)._replace(assignment=None)


def make(
    name: str, batch_size: int = 4, epochs: int = 2, model: Model | None = None, task=TASK,
    tiers: tuple[Subnet, ...] | None = None, options: Mapping | None = None,
) -> Algorithm:  # fmt: skip
    """The algorithm of a case."""
    local = Local(optax.sgd(LR), batch_size, epochs)
    model = model_of(name) if model is None else model
    if name in ("rafl", "rafl_published"):  # whose members must fit the model of the laws
        return padded_member(model, task, local)
    case = CASES[name]
    entry = ENTRIES[case.name]
    if "distill" in entry.supply:  # by gradient descent: Adam makes steps of no gradient at all
        entry = entry._replace(supply={**entry.supply, "distill": lambda setting: DISTILL})
    offered = setting(model, task, local, case.tiers if tiers is None else tiers)
    return make_entry(entry, offered, case.options if options is None else options)


def examples(num: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, num).astype(np.int32)
    x = rng.normal(size=(num, 6)) + label[:, None]
    return {"x": x.astype(np.float32), "label": label}


def federation(counts=(6, 1, 4, 3, 5, 2)) -> Federation:
    """Clients with the next counts[i] rows each, whatever the count the same 24 rows and width."""
    size = np.array(counts, np.int32)
    start = np.cumsum(size, dtype=np.int32) - size
    values = np.resize(np.arange(24, dtype=np.int32), 42)  # as long as that of `alike`
    index = RowIndex(values, start, size, longest=6)
    return Federation(examples(24), index, size)


def alike() -> Federation:
    """The same six rows for each of six clients."""
    return federate(examples(24), [np.arange(6)] * 6)


@functools.cache
def num_buckets(name: str) -> int:
    """Of a case."""
    return len(make(name).buckets)


def population(name: str, data: Federation, **profile) -> Population:
    num_clients = len(data.count)
    bucket = np.arange(num_clients) % num_buckets(name)
    return Population(data, profiles(num_clients, **profile), bucket)


def model_of(name: str) -> Model:
    """The model of a case: plain, or with an adapter."""
    return ADAPTED if ENTRIES[CASES[name].name].adapted else MODEL


def start(dtype=jnp.float32, name: str = "fed_avg"):
    """Where the runs of a case start; an adapter is no fresh one."""
    variables = MODEL.init(jax.random.key(7))
    if model_of(name) is ADAPTED:
        rng = np.random.default_rng(2)
        shapes = jax.eval_shape(ADAPTED.init, jax.random.key(0))
        draw = lambda x: jnp.asarray(rng.normal(size=x.shape).astype(np.float32) / 2)
        variables = shapes._replace(
            params=jax.tree.map(draw, shapes.params), frozen=variables.params
        )
    return jax.tree.map(lambda x: x.astype(dtype), variables)


def engine(name: str, *, cohort_size: int = 6, **options):
    """Six clients; calls give it populations with other numbers."""
    return _engine(name, cohort_size, **options)


@functools.cache
def _engine(name: str, cohort_size: int, **options):
    people = population(name, federation())
    return compile_rounds(make(name), people, cohort_size=cohort_size, public=PUBLIC, **options)


def run(name: str, people: Population, calls: int = 1, drop_rate: float = 0.0, **options):
    """(final state, the infos of all rounds joined), everybody in the cohort if not said."""
    return advance(engine(name, **options), people, calls, start(name=name), drop_rate=drop_rate)


def run_new(algorithm, people: Population, calls: int = 1, variables=None, **options):
    """As `run`, for an algorithm or a population of its own."""
    options = {"cohort_size": len(people.federation.count), "public": PUBLIC} | options
    return advance(compile_rounds(algorithm, people, **options), people, calls, variables)


def advance(engine, people: Population, calls: int, variables=None, drop_rate: float = 0.0):
    state = engine.init(start() if variables is None else variables, jax.random.key(3))
    infos = []
    for _ in range(calls):
        state, info = engine.run(state, people, drop_rate)
        infos.append(jax.tree.map(np.asarray, info))
    return state, jax.tree.map(lambda *x: np.concatenate(x), *infos)


@functools.cache
def two_rounds(name: str):
    """The reference of several laws: three of six clients a round, some of them slow."""
    return run(name, slow_and_fast(name), calls=2, cohort_size=3)


def slow_and_fast(name: str) -> Population:
    return population(name, federation(), max_steps=np.array([2, 9, 1, 9, 3, 9]))


def assert_same(a, b, tolerance: float = 1e-6):
    chex.assert_trees_all_close(a.server, b.server, rtol=tolerance, atol=tolerance)


def assert_is_fed_avg(algorithm: Algorithm, tolerance: float):
    state, _ = run_new(algorithm, slow_and_fast("fed_avg"), 2, cohort_size=3)
    reference, _ = two_rounds("fed_avg")
    chex.assert_trees_all_close(
        state.server.variables, reference.server.variables, rtol=tolerance, atol=tolerance
    )


def loss_gradient(params: dict, rows: dict) -> dict:
    """The gradient of the mean loss over some rows, in NumPy."""
    k1, b1, k2, b2 = (params[a][b] for a in ("dense1", "dense2") for b in ("kernel", "bias"))
    x, num = rows["x"], len(rows["x"])
    hidden = np.maximum(x @ k1 + b1, 0)
    odds = np.exp(hidden @ k2 + b2)
    error = (odds / odds.sum(-1, keepdims=True) - np.eye(3)[rows["label"]]) / num
    back = error @ k2.T * (hidden > 0)
    return {
        "dense1": {"kernel": x.T @ back, "bias": back.sum(0)},
        "dense2": {"kernel": hidden.T @ error, "bias": error.sum(0)},
    }


def one_step(name: str):
    """(parameters, their gradient on the rows of one client, the state after one step of it)."""
    people = population(name, federation((4, 0, 0, 0, 0, 0)), max_steps=1)
    state, info = run(name, people)
    assert info.spent.steps.sum() == 1 and info.examples.sum() == 4
    before = jax.tree.map(np.asarray, start(name=name).params)
    rows = {key: value[:4] for key, value in examples(24).items()}
    if model_of(name) is MODEL:
        return before, loss_gradient(before, rows), state
    scale = ADAPTED.adapter.config.scale(2)
    whole = jax.tree.map(np.asarray, merge(ADAPTED, start(name=name))[1].params)
    whole = loss_gradient(whole, rows)
    own = {}
    for path, (a, b) in pairs(before).items():
        gradient = scale * whole[path[0]]["kernel"]
        own[path] = {"a": gradient @ b.T, "b": a.T @ gradient}
    return before, beside(own, "lora"), state


def batch_norm_model() -> Model:
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(6, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
            self.last = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.last(jax.nn.relu(self.norm(self.first(x))))

    return from_nnx(Net)


BATCH_NORM = batch_norm_model()


@functools.cache
def batch_norm_step():
    """(variables, statistics averaged over clients that own rows 0-3 and 4-5)."""
    variables = jax.jit(BATCH_NORM.init)(jax.random.key(0))
    stats = jax.jit(lambda x: BATCH_NORM.apply(variables, x, train=True)[1])
    x = examples(24)["x"]
    # A batch is filled up with the client's own rows.
    first, second = stats(x[:4]), stats(x[[4, 5, 4, 5]])
    return variables, jax.tree.map(lambda a, b: (4 * a + 2 * b) / 6, first, second)


def quadratic_model() -> Model:
    init = lambda key: Variables({"y": jnp.ones(())}, {}, {})
    apply = lambda variables, x, train=False, key=None: (variables.params["y"] + 0 * x, {})
    return Model(init, apply, Variables({"y": ()}, {}, {}))


def _half_square(outputs, targets, weight):
    return jnp.sum(0.5 * weight * jnp.square(outputs - targets)), jnp.sum(weight)


QUADRATIC = quadratic_model()
SQUARES = TASK._replace(
    prepare=lambda batch, key: (batch["t"], batch["t"], jnp.ones_like(batch["t"])),
    loss=_half_square,
    metrics=lambda *args: {"loss": _half_square(*args)},
)


def quadratic(targets):
    """Clients that own one number each, and pull y towards it."""
    targets = np.asarray(targets, np.float32)
    data = federate({"t": targets}, [np.array([i]) for i in range(len(targets))])
    return QUADRATIC.init(jax.random.key(0)), targets, data
