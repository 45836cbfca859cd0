"""Tasks: what a model is trained for and how it is scored."""

from jaxfm.tasks.choose import task_for
from jaxfm.tasks.classify import classification
from jaxfm.tasks.contrast import contrastive
from jaxfm.tasks.evaluation import evaluate, metric_totals
from jaxfm.tasks.language import causal_lm, completion, masked_lm
from jaxfm.tasks.tag import tagging
from jaxfm.tasks.task import Task, prepare_weighted

__all__ = [
    "Task",
    "causal_lm",
    "classification",
    "completion",
    "contrastive",
    "evaluate",
    "masked_lm",
    "metric_totals",
    "prepare_weighted",
    "tagging",
    "task_for",
]
