"""Meshes, shardings and decoding: texts from prompts, on one device or many.

`plain`, `speculative`, `lookup`, `pipeinfer` and `pipelined` make decoders of one contract;
`generate` and `stream` run any of them. What a pipe drafts from is in `jaxfm.parallel.pipe.draft`.
"""

from jaxfm.parallel.decode import Decoder
from jaxfm.parallel.decoders.lookup import lookup
from jaxfm.parallel.decoders.plain import plain
from jaxfm.parallel.decoders.speculative import speculative
from jaxfm.parallel.generation import Generated, Piece, generate, stream
from jaxfm.parallel.mesh import TENSOR_RULES, make_mesh, shard, shardings
from jaxfm.parallel.pipe.draft import composite, early_exit, lookup_source, model_source
from jaxfm.parallel.pipe.pipeinfer import pipeinfer, pipelined

__all__ = [
    "TENSOR_RULES",
    "Decoder",
    "Generated",
    "Piece",
    "composite",
    "early_exit",
    "generate",
    "lookup",
    "lookup_source",
    "make_mesh",
    "model_source",
    "pipeinfer",
    "pipelined",
    "plain",
    "shard",
    "shardings",
    "speculative",
    "stream",
]
