"""Meshes, shardings and decoding: texts from prompts, on one device or many.

`plain`, `speculative` and `lookup` make decoders of one contract; `generate` and `stream` run any
of them.
"""

from jaxfm.parallel.decode import Decoder
from jaxfm.parallel.generate import Generated, Piece, generate, stream
from jaxfm.parallel.lookup import lookup
from jaxfm.parallel.mesh import TENSOR_RULES, make_mesh, shard, shardings
from jaxfm.parallel.plain import plain
from jaxfm.parallel.speculative import speculative

__all__ = [
    "TENSOR_RULES",
    "Decoder",
    "Generated",
    "Piece",
    "generate",
    "lookup",
    "make_mesh",
    "plain",
    "shard",
    "shardings",
    "speculative",
    "stream",
]
