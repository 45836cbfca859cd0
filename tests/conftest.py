"""Settings of every test. The environment comes first: XLA reads it once, when JAX is imported.

Subprocesses that tests start inherit it. One that is to be killed should set
JAX_ENABLE_COMPILATION_CACHE=false, since a cache entry is not written atomically.
"""

import importlib.metadata
import os
import pathlib

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".cache" / "jax"))
# Entries are not written atomically: workers that run side by side have caches of their own.
os.environ["JAX_COMPILATION_CACHE_DIR"] += os.environ.get("PYTEST_XDIST_WORKER", "")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    ).strip()
# Most of the tests' time is compiling. LLVM's optimisation is left out, which spares a third of it;
# programs are not split into parts that compile side by side, a sixth; and where XLA still knows
# the flag, fusions are emitted without MLIR, a third. (A flag that XLA does not know ends the
# process.)
if "xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += (
        " --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    )
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# Hugging Face libraries must not reach out: tests use only what they make or ship.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import contextlib  # noqa: E402
import ctypes  # noqa: E402
import gc  # noqa: E402

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same few examples on every run: a red test is red for everybody.
hypothesis.settings.register_profile(
    "jaxfm", derandomize=True, max_examples=20, deadline=None, database=None
)
hypothesis.settings.load_profile("jaxfm")

# Tracing makes many objects and few cycles; what is imported stays. Looking for garbage less often
# spares a twentieth of the time.
gc.freeze()
gc.set_threshold(50_000, 20, 50)

_PROCESS = pathlib.Path("/proc/self")
LONG_TESTS = pathlib.Path(__file__).with_name("long.txt")


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items):
    """Marks the tests that long.txt names."""
    names = set(LONG_TESTS.read_text().splitlines())
    for item in items:
        if item.nodeid.removeprefix("tests/") in names:
            item.add_marker("long")


@pytest.fixture(autouse=True)
def room_for_programs():
    """Drops compiled programs before there are too many of them for one process: each maps memory
    of its own, and Linux allows 65,530 maps; one more ends the process in the middle of a test."""
    yield
    if (_PROCESS / "maps").exists():
        with (_PROCESS / "maps").open("rb") as maps:
            count = sum(1 for _ in maps)
        if count > 25_000:
            forget_programs()


@pytest.fixture(autouse=True, scope="module")
def room_for_memory():
    """Drops compiled programs after a file that leaves the process large: files share few."""
    yield
    if (_PROCESS / "statm").exists():
        pages = int((_PROCESS / "statm").read_text().split()[1])
        if pages * os.sysconf("SC_PAGE_SIZE") > 1.5 * 2**30:
            forget_programs()


def forget_programs():
    """Drops compiled programs, and gives their memory back to the system."""
    jax.clear_caches()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
