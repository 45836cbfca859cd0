"""The memory of a client at its fullest: what the compiler gives to the client's program.

    total = download + what the client keeps + buffers of the program + what it hands back

The ledger counts parameters, optimizer state and a gradient by shapes alone; activations, which are
often the larger part, follow from what the compiler fuses and when it frees. So the program of one
client of each bucket is compiled and asked (`memory_analysis`), once a process for each program.
The client's rows are not counted: they are its own before the program begins.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxfm.cost import num_bytes
from jaxfm.federated.accounting.ledger import ClientCost, client_costs, client_shapes
from jaxfm.federated.algorithm import Algorithm
from jaxfm.federated.population import Population
from jaxfm.model import PyTree, Variables

# Buffers are assigned before machine code is made; the least of that is enough for counting them.
_QUICK: dict[str, Any] = {"cpu": {"xla_backend_optimization_level": 0}}


class ClientMemory(NamedTuple):
    """Bytes of one client of a bucket, while its program runs.

    Attributes:
      held: the download, frozen parameters included, and what the client keeps between rounds.
      working: activations, gradients, optimizer state, copies of parameters; the upload and what is
        kept for the next round.
    """

    held: int
    working: int

    @property
    def total(self) -> int:
        return self.held + self.working


def client_memory(
    algorithm: Algorithm, population: Population, variables: Variables, public: PyTree = None
) -> tuple[ClientMemory, ...]:
    """The memory of one client of each bucket, compiled for this process's kind of device.

    It takes about as long as a round's compilation; on a CPU less, since the code is not optimized.

    Args:
      variables: arrays or shapes of the full model.
      public: as given to `compile_rounds`.
    Raises:
      ValueError: the backend tells no program's memory.
    """
    server = jax.eval_shape(algorithm.init, variables)
    found = []
    for bucket in algorithm.buckets:
        args = client_shapes(bucket, population, server, public)
        leaves, structure = jax.tree.flatten(args)
        working = _working(bucket.client, structure, tuple(_shape(x) for x in leaves))
        found.append(ClientMemory(num_bytes(args[:2]), working))
    return tuple(found)


def compiled_costs(
    algorithm: Algorithm, population: Population, variables: Variables, public: PyTree = None
) -> tuple[ClientCost, ...]:
    """As `client_costs`, with the memory of the compiled program, activations included."""
    costs = client_costs(algorithm, population, variables, public)
    memory = client_memory(algorithm, population, variables, public)
    return tuple(
        cost._replace(memory_bytes=own.total) for cost, own in zip(costs, memory, strict=True)
    )


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


@functools.lru_cache(maxsize=32)
def _working(client: Callable, structure: Any, shapes: tuple[jax.ShapeDtypeStruct, ...]) -> int:
    """Bytes beside a program's inputs."""
    lowered = jax.jit(client).lower(*jax.tree.unflatten(structure, shapes))
    backend = jax.default_backend()
    analysis = lowered.compile(compiler_options=_QUICK.get(backend)).memory_analysis()
    if analysis is None:
        raise ValueError(
            f"The backend {backend} does not tell how much memory a program needs; use the figures "
            "of client_costs, to which activations come on top."
        )
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return int(analysis.temp_size_in_bytes + outputs)
