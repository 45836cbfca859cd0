"""Laws of the set-up: whatever is in the way is one sentence, and half an environment is none."""

import ast
import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
BOOTSTRAP = REPOSITORY / "tools" / "bootstrap.py"

# Stand-ins that the bootstrap finds through PYTHONPATH before the real modules.
FAKE_VENV = """
import os, sys
if __name__ == "__main__":
    os.makedirs(os.path.join(sys.argv[1], "bin"))
    os.symlink(sys.executable, os.path.join(sys.argv[1], "bin", "python"))
"""
FAKE_PIP = """
import os, sys, time
open(os.environ["PIP_CALLS"], "a").write(" ".join(sys.argv[1:]) + chr(10))
exec(os.environ.get("PIP_DOES", ""))
"""


class Setup:
    """Runs the bootstrap in a folder of its own, with a fake venv and pip."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.fakes = folder, folder / "fakes"
        self.fakes.mkdir()
        (self.fakes / "venv.py").write_text(FAKE_VENV)
        (self.fakes / "pip.py").write_text(FAKE_PIP)
        self.stamp = folder / "venv" / "jaxfm-stamp"

    def start(self, *arguments: str, pip_does: str = "") -> subprocess.Popen:
        environment = os.environ | {
            "PYTHONPATH": str(self.fakes),
            "PIP_CALLS": str(self.folder / "calls"),
            "PIP_DOES": pip_does,
        }
        command = [sys.executable, str(BOOTSTRAP), "--venv", str(self.folder / "venv"), *arguments]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def __call__(self, *arguments: str, pip_does: str = "") -> tuple[int, list[str]]:
        process = self.start(*arguments, pip_does=pip_does)
        _, said = process.communicate(timeout=60)
        return process.returncode, said.splitlines()

    def pip_calls(self) -> int:
        calls = self.folder / "calls"
        return len(calls.read_text().splitlines()) if calls.exists() else 0


@pytest.fixture
def setup(tmp_path):
    return Setup(tmp_path)


def test_made_once_and_again_when_what_it_stands_on_changes(setup):
    assert setup()[0] == 0 and setup.pip_calls() == 1
    assert setup() == (0, []) and setup.pip_calls() == 1
    setup.stamp.write_text("of another pyproject.toml")
    assert setup()[0] == 0 and setup.pip_calls() == 2


def test_a_killed_set_up_is_not_taken_for_ready(setup):
    process = setup.start(pip_does="time.sleep(60)")
    while process.poll() is None and not setup.pip_calls():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not setup.stamp.exists()
    assert setup()[0] == 0 and setup.pip_calls() == 2 and setup.stamp.exists()


@pytest.mark.parametrize(
    ("pip_does", "sentence"),
    [
        ("sys.exit('OSError: [Errno 28] No space left on device')", "The disk is full: free about"),
        (
            "sys.exit('WARNING: Retrying (Retry(total=0)) after connection broken by "
            "NewConnectionError\\nERROR: No matching distribution found for jax')",
            "No network: pip could not reach its package index",
        ),
        ("sys.exit('ERROR: ResolutionImpossible')", "Setting up failed: ERROR: ResolutionImpossi"),
    ],
)
def test_a_failing_pip_gives_one_sentence(setup, pip_does, sentence):
    status, said = setup(pip_does=pip_does)
    assert status == 1 and len(said) == 2
    assert said[0].startswith("jaxfm: Setting up ") and sentence in said[1]
    assert not setup.stamp.exists()


@pytest.mark.parametrize(
    ("module", "code", "sentence"),
    [
        ("sitecustomize", "import sys; sys.version_info = (3, 8, 1)", "jaxfm needs Python 3.11 or"),
        ("ensurepip", "raise ImportError", "lacks the venv module: install it (on Debian"),
        (
            "sitecustomize",
            "import shutil, types\n"
            "shutil.disk_usage = lambda folder: types.SimpleNamespace(free=2**30)",
            "The disk is full: the environment needs about 3 GiB and",
        ),
    ],
)
def test_a_machine_that_lacks_something_gives_one_sentence(setup, module, code, sentence):
    (setup.fakes / f"{module}.py").write_text(code)
    status, said = setup()
    assert status == 1 and len(said) == 1 and sentence in said[0]
    assert setup.pip_calls() == 0


def test_torch_that_cannot_be_had_is_said_and_stops_nothing(setup):
    (setup.fakes / "torch.py").write_text("raise ImportError")
    status, said = setup("--parity", pip_does="if '--dry-run' in sys.argv: sys.exit('ERROR: none')")
    assert status == 0 and setup.stamp.exists()
    assert said[-1].startswith("jaxfm: The parity tests will be skipped: Setting up failed: ERROR")


def load_bootstrap():
    spec = importlib.util.spec_from_file_location("bootstrap", BOOTSTRAP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("machine", "required", "expected"),
    [
        ("x86_64", ["sympy", 'nvidia-cublas==13; platform_system == "Linux"'], True),
        ("x86_64", ["sympy", 'cuda-toolkit==13; platform_system == "Linux"'], True),
        ("x86_64", ["sympy", 'nvidia-ml-py; extra == "monitor"'], False),
        ("arm64", ["nvidia-cublas==13"], False),
    ],
)
def test_a_cuda_build_of_torch_is_recognised(monkeypatch, machine, required, expected):
    bootstrap = load_bootstrap()
    monkeypatch.setattr(bootstrap.platform, "machine", lambda: machine)
    report = {"install": [{"metadata": {"requires_dist": required}}]}
    assert bootstrap.needs_cuda(report) == expected


def test_an_old_python_can_parse_it():
    """Nothing newer than Python 2.7 and 3.4 share, or it could not say what it needs."""
    newer = (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr, ast.AsyncFunctionDef, ast.Match)
    tree = ast.parse(BOOTSTRAP.read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, newer)]
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert not [f.name for f in functions if f.returns or f.args.kwonlyargs or f.args.posonlyargs]


def test_make_names_a_python_that_is_missing():
    done = subprocess.run(
        ["make", "PYTHON=python3.nowhere", "venv"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert done.stderr.startswith("jaxfm: there is no python3.nowhere here: install Python 3.11")
