"""Accelerators as a roofline sees them: operations, memory and links a second.

Peaks are those of vendors' data sheets, dense (without sparsity); nobody reaches them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from jaxfm.plain_types import suggest

Dtype = Literal["bfloat16", "float32"]
ITEM_BYTES: dict[str, int] = {"bfloat16": 2, "float32": 4}


class Machine(NamedTuple):
    """A kind of accelerator in the cluster that it is sold in.

    Attributes:
      name: as flags have it.
      bfloat16, float32: FLOP/s of matrix products.
      memory: bytes/s of its main memory.
      capacity: bytes of it.
      near: devices that `near_link` joins: those of a node of GPUs, of a slice of TPUs.
      near_link, far_link: bytes/s that a device sends, while it receives as many, to others among
        those and beyond.
      source: of the figures.
    """

    name: str
    bfloat16: float
    float32: float
    memory: float
    capacity: float
    near: int
    near_link: float
    far_link: float
    source: str

    def flops(self, dtype: Dtype) -> float:
        """FLOP/s of products of matrices of this type."""
        return self.bfloat16 if dtype == "bfloat16" else self.float32


_GPU = "NVIDIA {} data sheet (SXM, dense); {} data sheet for the network: {} a GPU"
_TPU = (
    "Google Cloud TPU documentation, page TPU {}; float32 is no figure of it: a sixth of bfloat16, "
    "as a product in float32 is six passes (XLA's precision HIGHEST)"
)


def _gpu(name: str, bfloat16: float, float32: float, memory: float, capacity: float,
         nvlink: float, network: float, source: str) -> Machine:  # fmt: skip
    """FLOP/s in T; bytes, and bytes/s of memory and links, in G; NVLink's figure is both ways."""
    return Machine(
        name, bfloat16 * 1e12, float32 * 1e12, memory * 1e9, capacity * 1e9, 8, nvlink / 2 * 1e9,
        network / 8 * 1e9, source,
    )  # fmt: skip


def _tpu(name: str, bfloat16: float, memory: float, capacity: float, near: int,
         interconnect: float, network: float, page: str) -> Machine:  # fmt: skip
    """As of GPUs; the interconnect's figure is both ways, of all links of a chip together."""
    return Machine(
        name, bfloat16 * 1e12, bfloat16 / 6 * 1e12, memory * 1e9, capacity * 1e9, near,
        interconnect / 2 * 1e9, network / 8 * 1e9, _TPU.format(page),
    )  # fmt: skip


MACHINES: dict[str, Machine] = {
    machine.name: machine
    for machine in (
        _gpu("a100", 312, 19.5, 2039, 80, 600, 200,
             _GPU.format("A100 80GB", "DGX A100", "a 200 Gb/s adapter")),
        _gpu("h100", 989, 67, 3350, 80, 900, 400,
             _GPU.format("H100", "DGX H100", "a 400 Gb/s adapter")),
        _gpu("h200", 989, 67, 4800, 141, 900, 400,
             _GPU.format("H200", "DGX H200", "a 400 Gb/s adapter")),
        _tpu("v5e", 197, 819, 16, 256, 400, 25, "v5e (6.4 Tb/s of network a pod of 256)"),
        _tpu("v5p", 459, 2765, 95, 6144, 1200, 50, "v5p (largest slice: 6,144 chips)"),
        _tpu("v6e", 918, 1638, 32, 256, 800, 100, "v6e (25.6 Tb/s of network a pod of 256)"),
    )
}  # fmt: skip


def machine_named(name: str) -> Machine:
    """The machine of the table.

    Raises:
      ValueError: there is none of this name.
    """
    if name not in MACHINES:
        raise ValueError(f"machine={name!r} is not in the table. {suggest(name, MACHINES)}")
    return MACHINES[name]


def shared(machine: Machine, devices: int, cores: int) -> Machine:
    """The machine as each of several devices sees it that take turns on its cores.

    A host of 2 cores that runs 4 processes gives each one half a core: half the FLOP/s, memory and
    link of a core. Fewer devices than cores have one each.

    Args:
      machine: of one core.
      devices: that run at once.
      cores: that there are.
    """
    share = max(1.0, devices / cores)
    return machine._replace(
        bfloat16=machine.bfloat16 / share,
        float32=machine.float32 / share,
        memory=machine.memory / share,
        near_link=machine.near_link / share,
        far_link=machine.far_link / share,
    )
