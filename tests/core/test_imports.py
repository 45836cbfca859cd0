"""Imports run one way: launch -> federated -> search -> parallel -> jaxfm.

Read from the syntax trees, so imports inside functions count too.
"""

import ast
import pathlib

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
LAYERS = ("jaxfm", "parallel", "search", "federated", "launch")  # ground first
INSTALLED_UNDER = LAYERS[1:]  # top-level folders whose import name is jaxfm.<folder>


def imported_names(path: pathlib.Path, package: str) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of everything that a file imports."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join(parents + ([node.module] if node.module else []))
            else:
                source = node.module or ""
            names += [(node.lineno, f"{source}.{alias.name}") for alias in node.names]
    return names


def layer_of(name: str) -> str | None:
    """Which layer a dotted import name belongs to; None for other projects."""
    first, *rest = name.split(".")
    if first != "jaxfm":
        return None
    return rest[0] if rest and rest[0] in INSTALLED_UNDER else "jaxfm"


def violations(root: pathlib.Path) -> list[str]:
    """What breaks the law in the tree at root, one line each."""
    found = []
    folders = [*LAYERS, "tests", "benchmarks", "tools"]
    for path in sorted(file for folder in folders for file in (root / folder).rglob("*.py")):
        relative = path.relative_to(root)
        folder = relative.parts[0]
        package = ".".join(relative.parent.parts)
        package = package if folder == "jaxfm" else f"jaxfm.{package}"
        for line, name in imported_names(path, package):
            where = f"{relative}:{line}: imports {name}"
            if name.split(".")[0] in INSTALLED_UNDER:
                found.append(f"{where}; write jaxfm.{name.split('.')[0]}")
            target = layer_of(name)
            if folder in LAYERS and target and LAYERS.index(target) > LAYERS.index(folder):
                found.append(f"{where}; {folder} stands below {target}")
    return found


@pytest.mark.smoke
def test_imports_run_one_way():
    assert violations(REPOSITORY) == []


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("jaxfm/a.py", "import jaxfm.search.env", "jaxfm stands below search"),
        ("jaxfm/a.py", "from jaxfm import parallel", "jaxfm stands below parallel"),
        ("jaxfm/data/a.py", "from ..federated import rounds", "jaxfm stands below federated"),
        ("parallel/a.py", "def f():\n  import jaxfm.federated", "parallel stands below federated"),
        ("search/a.py", "from jaxfm.launch.demo import main", "search stands below launch"),
        ("federated/a.py", "from ..launch import demo", "federated stands below launch"),
        ("launch/a.py", "import parallel.mesh", "write jaxfm.parallel"),
        ("tests/core/a.py", "from federated import fed_avg", "write jaxfm.federated"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, file, source, complaint):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert [line.endswith(complaint) for line in violations(tmp_path)] == [True]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("launch/a.py", "from jaxfm.federated import fed_avg\nimport jaxfm.parallel.mesh"),
        ("federated/a.py", "from . import rounds\nfrom jaxfm import subnet"),
        ("parallel/a.py", "from jaxfm.model import Model\nimport jax\nimport searchlib"),
    ],
)
def test_a_right_import_is_not(tmp_path, file, source):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert violations(tmp_path) == []
