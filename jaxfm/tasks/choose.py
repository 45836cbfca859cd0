"""The task that loaded data are for."""

from jaxfm.data.loading import DataSet
from jaxfm.data.source import class_names
from jaxfm.tasks.classify import classification
from jaxfm.tasks.language import causal_lm
from jaxfm.tasks.tag import tagging
from jaxfm.tasks.task import Task
from jaxfm.tokenizer import bytes_per_token

_INPUTS: dict[str, str | tuple[str, ...]] = {
    "images": "image",
    "features": "features",
    "text": ("tokens", "mask"),
}


def task_for(data: DataSet) -> Task:
    """Returns classification into the data's classes, of whole rows or of their words (tagging),
    or causal_lm for text to be continued.

    Raises:
      ValueError: examples of a kind that `jaxfm.data.load` does not make.
    """
    if data.kind == "language" and data.tokenizer is not None:
        return causal_lm(bytes_per_token(data.tokenizer), data.tokenizer.pad_id)
    if data.kind == "tags":
        return tagging(len(data.classes))
    if data.kind not in _INPUTS:
        leaves = sorted(data.splits["train"].examples)
        raise ValueError(f"There is no task for the leaves {leaves}; make one of jaxfm.tasks.")
    return classification(len(class_names(data.splits)), inputs=_INPUTS[data.kind])
