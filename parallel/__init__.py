"""Meshes, shardings and decoding: texts from prompts, on one device or many.

`generate` and `stream` run any decoder; `speculative` and `pipeinfer` take any drafter;
`simulate` predicts how fast a given cluster would decode.
"""

from jaxfm.parallel.decode import Decoder
from jaxfm.parallel.decoders.lookup import lookup
from jaxfm.parallel.decoders.plain import plain
from jaxfm.parallel.decoders.speculative import speculative
from jaxfm.parallel.drafters.composite import composite_drafter
from jaxfm.parallel.drafters.forced import forced_drafter
from jaxfm.parallel.drafters.lookup import lookup_drafter
from jaxfm.parallel.drafters.model import early_exit_drafter, model_drafter
from jaxfm.parallel.drafters.scripted import scripted_drafter
from jaxfm.parallel.drafting import Drafter
from jaxfm.parallel.generation import Generation, TextPiece, generate, stream
from jaxfm.parallel.grammars.automaton import Automaton, regular
from jaxfm.parallel.mesh import TENSOR_RULES, make_mesh, shard, shardings
from jaxfm.parallel.pipe.adapt import adapt
from jaxfm.parallel.pipe.pipeinfer import pipeinfer, pipelined
from jaxfm.parallel.pipe.scheduler import Limits, limits
from jaxfm.parallel.pipe.speed import Pipe, choose, linear_cost
from jaxfm.parallel.prefix import Prefix, read_prefix
from jaxfm.parallel.simulation.heads import Head, RoundHead
from jaxfm.parallel.simulation.simulator import Timing, best_speculative, draw_ranks, simulate
from jaxfm.parallel.verified import best_of, first_verified

__all__ = [  # noqa: RUF022 (in groups)
    # texts from prompts
    "generate",
    "stream",
    "Generation",
    "TextPiece",
    "read_prefix",
    "Prefix",
    # what texts must be
    "regular",
    "best_of",
    "first_verified",
    "Automaton",
    # decoders
    "Decoder",
    "plain",
    "speculative",
    "lookup",
    # a pipe of stages, its limits, and how they follow what is measured
    "pipeinfer",
    "pipelined",
    "adapt",
    "Limits",
    "limits",
    # drafters, for `speculative` and `pipeinfer`
    "Drafter",
    "model_drafter",
    "early_exit_drafter",
    "lookup_drafter",
    "forced_drafter",
    "composite_drafter",
    "scripted_drafter",
    # meshes and shardings
    "make_mesh",
    "shard",
    "shardings",
    "TENSOR_RULES",
    # how fast a cluster would decode
    "Pipe",
    "linear_cost",
    "choose",
    "Head",
    "RoundHead",
    "simulate",
    "draw_ranks",
    "best_speculative",
    "Timing",
]
