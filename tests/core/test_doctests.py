"""The examples in docstrings do what they show."""

import doctest
import importlib.util
import pathlib
import pkgutil

import pytest

import jaxfm
from jaxfm import federated, launch, parallel, search


def modules_with_examples() -> list[str]:
    # An editable install keeps the folders apart, so each is walked on its own.
    packages = [jaxfm, parallel, search, federated, launch]
    names = {
        module.name
        for package in packages
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    }
    origins = {name: importlib.util.find_spec(name).origin for name in names}
    return sorted(name for name in names if ">>> " in pathlib.Path(origins[name]).read_text())


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0 and result.failed == 0
