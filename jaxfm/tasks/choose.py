"""The task that loaded data are for."""

from jaxfm.data.loading import DataSet
from jaxfm.data.source import class_names
from jaxfm.tasks.classify import classification
from jaxfm.tasks.contrast import contrastive
from jaxfm.tasks.language import causal_lm, masked_lm
from jaxfm.tasks.tag import tagging
from jaxfm.tasks.task import Task
from jaxfm.tokenizer import bytes_per_token, padding_id

_INPUTS: dict[str, str | tuple[str, ...]] = {
    "images": "image",
    "features": "features",
    "text": ("tokens", "mask"),
}


def task_for(data: DataSet, *, masked: bool = False) -> Task:
    """Returns classification into the data's classes, of whole rows or of their words (tagging),
    contrastive for captioned images, or causal_lm for text to be continued.

    Args:
      data: as of `jaxfm.data.load`.
      masked: text is not continued: hidden tokens are recovered (masked_lm).
    Raises:
      ValueError: examples of a kind that `jaxfm.data.load` does not make; masked, of data that are
        not text to be continued, or without a token that stands for hidden ones.
    """
    if masked:
        return _masked(data)
    if data.kind == "language" and data.tokenizer is not None:
        return causal_lm(bytes_per_token(data.tokenizer), data.tokenizer.pad_id)
    if data.kind == "captions":
        return contrastive()
    if data.kind == "tags":
        return tagging(len(data.classes))
    if data.kind not in _INPUTS:
        leaves = sorted(data.splits["train"].examples)
        raise ValueError(f"There is no task for the leaves {leaves}; make one of jaxfm.tasks.")
    return classification(len(class_names(data.splits)), inputs=_INPUTS[data.kind])


def _masked(data: DataSet) -> Task:
    tokenizer = data.tokenizer
    if data.kind != "language" or tokenizer is None:
        raise ValueError("Tokens are hidden in text without labels, and these data are none.")
    if tokenizer.mask_id is None:
        raise ValueError("The tokenizer has no token that stands for hidden ones (mask_token).")
    return masked_lm(
        tokenizer.mask_id, tokenizer.vocab_size, tokenizer.special_ids, pad_id=padding_id(tokenizer)
    )
