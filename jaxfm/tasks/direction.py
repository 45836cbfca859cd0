"""Which way a metric is better."""

from __future__ import annotations

_KNOWN = dict.fromkeys(("accuracy", "f1", "recall", "precision", "auc", "exact_match"), True)
_KNOWN |= dict.fromkeys(("loss", "bits_per_byte", "perplexity", "error"), False)


def higher_is_better(name: str) -> bool | None:
    """Returns whether a metric is better the higher it is; None where its name does not say.

    >>> higher_is_better("loss"), higher_is_better("recall"), higher_is_better("speed")
    (False, True, None)
    """
    return _KNOWN.get(name)
