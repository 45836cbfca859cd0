"""What each device of a cluster does in a round, a step or a tick, read from compiled programs.

Programs are compiled for the CPU in float32, on one device or two: what a device does for itself
does not depend on how many there are (weak scaling), and an exchange between two is one among n.
XLA counts the body of a loop once. So a step is compiled with its layers taken apart, and a round
or a client counts as what its program has beside one step, plus as many steps as it makes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxfm.data.federation import federate
from jaxfm.federated import Population, compile_rounds, profiles
from jaxfm.federated.accounting.ledger import client_shapes
from jaxfm.federated.algorithm import Algorithm
from jaxfm.federated.foundation.central import TrainState, train_steps
from jaxfm.model import Model, PyTree, Variables, layers_of, unstack, with_layers
from jaxfm.parallel.cache import causal_model, extend, init_cache
from jaxfm.parallel.mesh import make_mesh, shardings
from jaxfm.parallel.simulation.programs import Collective, Program, read_program
from jaxfm.parallel.simulation.roofline import Piece
from jaxfm.tasks import Task

# Fusions are chosen before machine code is made; the least of that is enough for counting.
_QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0}
PAIR = 2  # devices that programs with exchanges are compiled for


class Workload(NamedTuple):
    """Work that grows with the number of devices.

    Attributes:
      name: of its curve.
      unit: of what it does.
      amount: of that, by one device in the time of `pieces`.
      pieces: `(devices) -> what each of them does`.
      group: devices that exchange with each other; None: all.
    """

    name: str
    unit: str
    amount: float
    pieces: Callable[[int], tuple[Piece, ...]]
    group: int | None = None


class Training(NamedTuple):
    """What is trained, and on which batches.

    Attributes:
      model, task: as everywhere.
      optimizer: of local and central steps.
      examples: rows of a batch, leaves [B, ...], of any values.
    """

    model: Model
    task: Task
    optimizer: optax.GradientTransformation
    examples: dict[str, np.ndarray]

    @property
    def batch_size(self) -> int:
        """B, the rows of a device's step."""
        return len(next(iter(self.examples.values())))


def variables_of(model: Model, *, apart: bool = True) -> Variables:
    """The shapes of a model's variables, its layers taken apart or as it stacks them."""

    def init() -> Variables:
        variables = model.init(jax.random.key(0))
        layers = layers_of(variables)
        return with_layers(variables, unstack(layers)) if layers.params and apart else variables

    return jax.eval_shape(init)


def compiled_program(function: Any, *args: PyTree) -> Program:
    """What XLA says of a function of arrays or shapes."""
    traced = function if hasattr(function, "lower") else jax.jit(function)
    return read_program(traced.lower(*args).compile(compiler_options=_QUICK))


def step_program(training: Training, devices: int = 1, *, apart: bool = True) -> Program:
    """One step of training on `devices`, a batch on each; its gradient's exchange included.

    Args:
      training: the step.
      devices: 1 or 2.
      apart: layers are taken apart, so that each one counts; else one of those that are stacked.
    """
    mesh = make_mesh(data=devices)
    rows = devices * training.batch_size
    run = train_steps(training.model, training.task, training.optimizer, rows, 1, mesh)
    state = jax.eval_shape(
        lambda v: TrainState(
            v, training.optimizer.init(v.params), jnp.zeros((), jnp.int32), jax.random.key(0)
        ),
        variables_of(training.model, apart=apart),
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)
    return compiled_program(run, *jax.tree.map(place, (state, training.examples)))


def data_parallel(training: Training, amount: float, unit: str) -> Workload:
    """Steps of one batch a device, whose gradients are added up in every step.

    Args:
      training: the step.
      amount, unit: what a device's batch is counted as.
    """
    step = step_program(training, PAIR)
    return Workload("data parallel", unit, amount, lambda devices: (Piece(step),))


def rounds_work(
    algorithm: Algorithm, training: Training, *, clients: int, steps: int, amount: float,
    unit: str, name: str,
) -> Workload:  # fmt: skip
    """Rounds of `clients` on each device, which make `steps` steps each, one after another.

    Clients live on devices of their own (`Population.home`), as their memories would otherwise be
    sent to all devices. What a round gathers of its clients (their reports) grows with their
    number.

    Args:
      algorithm: of one bucket, whose clients take the steps of `training`.
      training: a client's step.
      clients: of a device.
      steps: of a client.
      amount, unit, name: as of `Workload`.
    Raises:
      ValueError: no client, no step, or an algorithm of several buckets.
    """
    if clients < 1 or steps < 1:
        raise ValueError(f"clients={clients}, steps={steps}: give at least 1 of each a round.")
    if len(algorithm.buckets) != 1:
        raise ValueError(
            f"This algorithm has {len(algorithm.buckets)} sizes of models; project each alone."
        )
    whole, one = _round_programs(algorithm, training)
    stacked, step = step_program(training, apart=False), step_program(training)
    round_rest, client_rest = _beside(whole, stacked), _beside(one, stacked)

    def pieces(devices: int) -> tuple[Piece, ...]:
        grow = lambda c: (
            c._replace(nbytes=c.nbytes * clients * devices / PAIR) if c.kind == "all-gather" else c
        )
        grown = round_rest._replace(collectives=tuple(map(grow, round_rest.collectives)))
        return Piece(grown), Piece(client_rest, clients - 1), Piece(step, clients * steps)

    return Workload(name, unit, amount, pieces)


def _round_programs(algorithm: Algorithm, training: Training) -> tuple[Program, Program]:
    """A round of one client on each of two devices, and a client's part of it."""
    rows = np.arange(training.batch_size)
    people = Population(
        federate(training.examples, [rows] * PAIR), profiles(PAIR), np.zeros(PAIR, np.int32),
        home=np.arange(PAIR),
    )  # fmt: skip
    engine = compile_rounds(
        algorithm, people, cohort_size=PAIR, mesh=make_mesh(clients=PAIR), clients_at_once=1
    )
    variables = variables_of(training.model, apart=False)
    state = jax.eval_shape(engine.init, variables, jax.random.key(0))
    whole = compiled_program(lambda state: engine.run(state), state)
    server = jax.eval_shape(algorithm.init, variables)
    args = client_shapes(algorithm.buckets[0], people, server, None)
    return whole, compiled_program(algorithm.buckets[0].client, *args)


def _beside(program: Program, step: Program) -> Program:
    """What a program does beside one step."""
    flops, nbytes = program.flops - step.flops, program.nbytes - step.nbytes
    return program._replace(flops=max(0.0, flops), nbytes=max(0.0, nbytes))


def tick_program(model: Model, batch: int, cells: int, tensor: int = 1) -> Program:
    """One token more of each of `batch` texts, whose caches have `cells` cells.

    Args:
      model: a causal language model.
      batch: texts.
      cells: all of which are read, whether full or not.
      tensor: devices that share each layer; 1 or 2.
    """
    lm, mesh, variables = causal_model(model), make_mesh(tensor=tensor), variables_of(model)
    cache = jax.eval_shape(lambda v: init_cache(lm, v, batch, cells), variables)
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    everywhere = NamedSharding(mesh, PartitionSpec())
    heads = NamedSharding(mesh, PartitionSpec(None, "tensor"))

    def tick(variables, cache, tokens, start):
        x, cache = extend(lm, variables, cache, tokens, start, jnp.ones_like(tokens, bool))
        logits = lm.stages.head(variables, x)
        return jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32), cache

    split = shardings(model.axes, variables, mesh, replicate_uneven=True)
    where = jax.tree.map(lambda x: heads if x.ndim == 4 else everywhere, cache)
    ints = lambda *shape: place(jax.ShapeDtypeStruct(shape, jnp.int32), everywhere)
    return compiled_program(
        jax.jit(tick, donate_argnums=1), jax.tree.map(place, variables, split),
        jax.tree.map(place, cache, where), ints(batch, 1), ints(batch),
    )  # fmt: skip


def tensor_decoding(model: Model, batch: int, cells: int, tensor: int) -> Workload:
    """Copies of a model over `tensor` devices each, with texts of their own.

    What a device does is a + b / tensor, with a and b from the programs of one device and of two.
    """
    alone = tick_program(model, batch, cells)
    share = alone
    if tensor > 1:
        pair = tick_program(model, batch, cells, PAIR)
        at = lambda one, two: max(0.0, 2 * two - one) + (min(one, 2 * (one - two))) / tensor
        share = Program(at(alone.flops, pair.flops), at(alone.nbytes, pair.nbytes),
                        pair.collectives)  # fmt: skip
    return Workload(
        f"decoding, tensor {tensor}", "tokens", batch / tensor, lambda devices: (Piece(share),),
        tensor,
    )  # fmt: skip


def stage_decoding(model: Model, batch: int, cells: int, stages: int, embed_dim: int) -> Workload:
    """Pipes of `stages` devices, an even part of the model on each, full of texts.

    A stage passes on what its batch has become, batch * embed_dim numbers; each of the `stages`
    batches in the pipe gets its token after as many times of a stage.
    """
    hop = Collective("collective-permute", 4.0 * batch * embed_dim)
    own = tick_program(model, batch, cells).part(1 / stages)
    share = own._replace(collectives=(hop,) if stages > 1 else ())
    return Workload(
        f"decoding, stages {stages}", "tokens", batch / stages, lambda devices: (Piece(share),),
        stages,
    )  # fmt: skip
