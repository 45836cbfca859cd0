"""jaxfm: federate, compress and serve foundation models in JAX.

The ground that everything shares: models as pure functions over trees with named axes, subnets,
data, tasks, checkpoints. On it stand `jaxfm.parallel` (decoding), `jaxfm.search` (compression),
`jaxfm.federated` (training over clients) and `jaxfm.launch` (scripts).

Models: Model, Variables, Stages, Past, Frozen, from_nnx, from_linen, count_parameters; families in
`models`, pretrained ones through `hub`; freeze, freeze_variables and thaw hold parameters fixed;
`adapters` are trained around what is fixed.
Subnets: Subnet, axis_sizes, width, extract, mask, embed, cover.
Training: `data`, `tasks`, Task, evaluate, distill, Checkpointer.
Text: Tokenizer, ByteTokenizer, load_tokenizer, train_bpe.
"""

import importlib

from jaxfm import adapters, data, hub, models, tasks
from jaxfm.checkpoint import Checkpointer
from jaxfm.distillation import distill
from jaxfm.frozen import freeze, freeze_variables, thaw
from jaxfm.linen import from_linen
from jaxfm.model import Frozen, Model, Past, Stages, Variables, count_parameters, from_nnx
from jaxfm.subnet import Subnet, axis_sizes, cover, embed, extract, mask, width
from jaxfm.tasks import Task, evaluate
from jaxfm.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe

__version__ = "0.1.0"

__all__ = [
    "ByteTokenizer",
    "Checkpointer",
    "Frozen",
    "Model",
    "Past",
    "Stages",
    "Subnet",
    "Task",
    "Tokenizer",
    "Variables",
    "adapters",
    "axis_sizes",
    "count_parameters",
    "cover",
    "data",
    "distill",
    "embed",
    "evaluate",
    "extract",
    "freeze",
    "freeze_variables",
    "from_linen",
    "from_nnx",
    "hub",
    "load_tokenizer",
    "mask",
    "models",
    "tasks",
    "thaw",
    "train_bpe",
    "width",
]

# What stands on the ground is imported when it is first asked for: `import jaxfm` stays quick.
_LAZY = ("federated", "launch", "parallel", "report", "search")


def __getattr__(name: str):
    if name in _LAZY:
        return importlib.import_module(f"jaxfm.{name}")
    raise AttributeError(f"module 'jaxfm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
