"""Train, validation and test: what names say of them."""

from __future__ import annotations

import re

# What files and folders call the three parts.
_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}


def split_in(name: str) -> tuple[str, str]:
    """Returns the split that a name mentions, and the rest of the name.

    >>> split_in("x_train"), split_in("train-00000-of-00002"), split_in("contest")
    (('train', 'x'), ('train', '00000-of-00002'), ('', 'contest'))
    """
    words = re.split(r"([\W_]+)", name)
    for split, known in _NAMES.items():
        for place in range(0, len(words), 2):
            if words[place].lower() in known:
                left = "".join(words[: max(0, place - 1)])
                right = "".join(words[place + 2 :])
                return split, f"{left}_{right}" if left and right else left + right
    return "", name
