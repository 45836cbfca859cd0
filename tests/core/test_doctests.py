"""The examples in docstrings do what they show."""

import doctest
import importlib.util
import pathlib
import pkgutil

import pytest

import jaxfm


def modules_with_examples() -> list[str]:
    names = [module.name for module in pkgutil.walk_packages(jaxfm.__path__, "jaxfm.")]
    origins = {name: importlib.util.find_spec(name).origin for name in names}
    return sorted(name for name in names if ">>> " in pathlib.Path(origins[name]).read_text())


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0 and result.failed == 0
