"""Imports run one way: launch -> federated -> search -> parallel -> jaxfm; inside folders, too.

Read from the syntax trees, so imports inside functions count too.
"""

import ast
import importlib
import pathlib
import pkgutil
import tomllib

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
LAYERS = ("jaxfm", "parallel", "search", "federated", "launch")  # ground first
INSTALLED_UNDER = LAYERS[1:]  # top-level folders whose import name is jaxfm.<folder>
# What the modules of a sub-package may import of their own folder: its root modules, by name, and
# sub-packages. None: all of the root. A root module may import the sub-packages of its folder.
INSIDE: dict[str, tuple[tuple[str, ...] | None, tuple[str, ...]]] = {
    "parallel.decoders": (None, ("parallel.drafters",)),
    "parallel.drafters": (None, ()),
    "parallel.grammars": (("grammar",), ()),
    "parallel.pipe": (None, ("parallel.drafters",)),
    "parallel.simulation": (None, ("parallel.pipe",)),
    "search.trace": ((), ()),
    "search.strategies": ((), ("search.trace",)),
    "search.elastic": ((), ("search.trace", "search.strategies")),
    "federated.accounting": (
        ("algorithm", "cohort", "local", "population", "rounds"), ()
    ),
    "federated.continual": (
        ("algorithm", "averaging", "local", "population", "rounds"), ("federated.accounting",)
    ),
    "federated.foundation": (None, ("federated.accounting", "federated.wrappers")),
    "federated.audit": (("algorithm", "local"), ()),
    "federated.parts": (("algorithm", "averaging", "local", "registry"), ()),
    "federated.remote": (
        None, ("federated.accounting", "federated.secure", "federated.wrappers")
    ),
    "federated.secure": ((), ()),
    "federated.wrappers": (("algorithm",), ("federated.accounting", "federated.parts")),
    "federated.algorithms": (
        ("algorithm", "averaging", "local", "partition", "registry", "slices"),
        ("federated.parts",),
    ),
}  # fmt: skip


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


def inner_violations(root: pathlib.Path) -> list[str]:
    """Imports of a sub-package that `INSIDE` does not allow, one line each."""
    found = []
    for package, (modules, packages) in INSIDE.items():
        folder = package.split(".")[0]
        subpackages = {p.name for p in (root / folder).iterdir() if (p / "__init__.py").exists()}
        for path in sorted((root / package.replace(".", "/")).rglob("*.py")):
            for line, name in imported_names(path, f"jaxfm.{package}"):
                parts = name.split(".")
                if parts[:2] != ["jaxfm", folder] or len(parts) < 3:
                    continue
                own = ".".join(parts[1:3])
                if parts[2] in subpackages:
                    allowed = own == package or own in packages
                else:
                    allowed = modules is None or parts[2] in modules
                if not allowed:
                    found.append(f"{path.relative_to(root)}:{line}: {package} imports {name}")
    return found


@pytest.mark.smoke
def test_imports_run_one_way():
    assert violations(REPOSITORY) == []


@pytest.mark.smoke
def test_imports_run_one_way_inside_folders():
    assert inner_violations(REPOSITORY) == []


def test_every_folder_of_code_is_a_package_that_is_installed():
    tree = set()
    for layer in LAYERS:
        for init in (REPOSITORY / layer).rglob("__init__.py"):
            parts = init.parent.relative_to(REPOSITORY).parts
            tree.add(".".join(parts if layer == "jaxfm" else ("jaxfm", *parts)))
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert sorted(settings["packages"]) == sorted(tree)
    folders = {path.parent for layer in LAYERS for path in (REPOSITORY / layer).rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders)


def test_no_function_hides_the_module_it_lives_in():
    """`import jaxfm.search.elastic.supernet as s` gives a module, for every module."""
    hidden, packages = [], ["jaxfm", *(f"jaxfm.{layer}" for layer in INSTALLED_UNDER)]
    for name in packages:
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            importlib.import_module(module.name)
            parent, _, last = module.name.rpartition(".")
            found = getattr(importlib.import_module(parent), last)
            if getattr(found, "__name__", None) != module.name:
                hidden.append(module.name)
    assert hidden == []


def test_one_import_reaches_everything():
    import jaxfm

    assert callable(jaxfm.search.prune) and callable(jaxfm.federated.fed_avg)
    assert {"federated", "parallel", "search"} <= set(dir(jaxfm))
    with pytest.raises(AttributeError, match="no attribute 'serch'"):
        jaxfm.serch  # noqa: B018


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
