"""Makes the virtual environment that the Makefile's commands run in; standard library only.

    python3 tools/bootstrap.py [--parity] [--venv FOLDER]

Does nothing if the environment is up to date. It is rebuilt when pyproject.toml or the Python
changes, and when an earlier set-up did not finish: a stamp, written last, marks a complete one.
--parity also installs PyTorch for the parity tests, if a CPU build is available.

A failure is reported in one sentence. The syntax is old on purpose, so that an old Python can
report it, too.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OLDEST_PYTHON = (3, 11)
NEEDED_GIB = 3
# The release that parity is tested with. Newer ones may exist only as CUDA builds of gigabytes.
TORCH = "torch==2.13.0"
# Reads and writes adapters; it needs PyTorch, which is there before it.
PEFT = "peft>=0.18"

NO_SPACE = re.compile(r"No space left on device|Errno 28\b|Disk quota exceeded")
NO_NETWORK = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|ConnectionError"
    r"|Connection refused|Failed to establish|Temporary failure in name resolution|Retrying \(Retry"
)


class SetupError(Exception):
    """Why setting up failed, as one sentence for the user."""


def check_python():
    """Raises SetupError if this Python cannot make the environment."""
    if sys.version_info[:2] < OLDEST_PYTHON:
        raise SetupError(
            "jaxfm needs Python {}.{} or newer, but {} is {}.{}: install a newer one and name it, "
            "as in `make PYTHON=python3.12 ...`.".format(
                *(OLDEST_PYTHON + (sys.executable,) + tuple(sys.version_info[:2]))
            )
        )
    try:
        import ensurepip
        import venv
    except ImportError:
        raise SetupError(
            "{} lacks the venv module: install it (on Debian and Ubuntu: apt-get install "
            "python3-venv), or name another Python, as in `make PYTHON=python3.12 ...`.".format(
                sys.executable
            )
        )
    del ensurepip, venv


def check_disk(folder):
    """Raises SetupError if the disk of `folder` cannot hold the environment."""
    free_gib = shutil.disk_usage(folder).free / 2.0**30
    if free_gib < NEEDED_GIB:
        raise SetupError(
            "The disk is full: the environment needs about {} GiB and {} has {:.1f} GiB "
            "free.".format(NEEDED_GIB, folder, free_gib)
        )


def run(command, log):
    """Runs a command with its output in the file `log`; raises SetupError saying why it failed."""
    with open(log, "ab") as output:
        start = output.tell()
        status = subprocess.call(command, stdout=output, stderr=subprocess.STDOUT, cwd=REPOSITORY)
    if status == 0:
        return
    with open(log, "rb") as output:
        output.seek(start)
        text = output.read().decode("utf-8", "replace")
    if NO_SPACE.search(text):
        raise SetupError("The disk is full: free about {} GiB and run again.".format(NEEDED_GIB))
    if NO_NETWORK.search(text):
        raise SetupError(
            "No network: pip could not reach its package index (its output is in {}); connect, or "
            "point pip at an index or wheel folder that you have, and run again.".format(log)
        )
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()] or lines
    raise SetupError(
        "Setting up failed: {} (the whole log is {}).".format((errors or ["no output"])[-1], log)
    )


def fingerprint():
    """Returns a hash of what the environment depends on: pyproject.toml and the Python."""
    with open(os.path.join(REPOSITORY, "pyproject.toml"), "rb") as file:
        content = file.read()
    return hashlib.sha256(content + sys.version.encode() + sys.base_prefix.encode()).hexdigest()


def read(path):
    """Returns the text of a small file, or "" if it does not exist."""
    try:
        with open(path) as file:
            return file.read()
    except (IOError, OSError):
        return ""


def write(path, text):
    """Writes a small file atomically."""
    with open(path + ".part", "w") as file:
        file.write(text)
    os.replace(path + ".part", path)


def make_environment(folder, log):
    """Makes `folder` a complete environment unless it is one already."""
    stamp = os.path.join(folder, "jaxfm-stamp")
    python = os.path.join(folder, "bin", "python")
    if read(stamp) == fingerprint() and os.path.exists(python):
        return
    check_disk(os.path.dirname(folder))
    say("Setting up {} (some minutes, once; the log is {})".format(folder, log))
    start = time.time()
    if os.path.exists(log):
        os.remove(log)
    shutil.rmtree(folder, ignore_errors=True)
    run([sys.executable, "-m", "venv", folder], log)
    # Modules are compiled when they are first imported, which most never are.
    install = ["install", "--quiet", "--no-compile"]
    run([python, "-m", "pip"] + install + ["--editable", ".[test]"], log)
    write(stamp, fingerprint())
    say("Ready after {:.0f} s".format(time.time() - start))


def add_torch(folder, log):
    """Adds PyTorch if a CPU build is available, or says why not."""
    stamp = os.path.join(folder, "jaxfm-parity")
    if read(stamp):
        return
    python = os.path.join(folder, "bin", "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--no-compile"]
    report = os.path.join(folder, "torch.json")
    dry = ["--dry-run", "--no-deps", "--ignore-installed", "--report", report]
    try:
        if not imports_torch(python):
            run(pip + dry + [TORCH], log)  # reads the metadata, not the wheel
            if needs_cuda(json.loads(read(report))):
                raise SetupError(
                    "{} is only available as a CUDA build of several GB here.".format(TORCH)
                )
            say("Adding {} for the parity tests".format(TORCH))
            run(pip + [TORCH], log)
        run(pip + [PEFT], log)
        write(stamp, TORCH)
    except SetupError as error:
        say(
            "The parity tests will be skipped: {} To run them, install PyTorch into {} "
            "yourself.".format(error, folder)
        )


def imports_torch(python):
    """Returns whether the environment already has PyTorch."""
    with open(os.devnull, "w") as nowhere:
        return subprocess.call([python, "-c", "import torch"], stderr=nowhere) == 0


def needs_cuda(report):
    """Returns whether installing what pip's report names would bring the CUDA libraries."""
    required = report["install"][0]["metadata"].get("requires_dist", [])
    names = [line.split(";")[0].lower() for line in required if "extra ==" not in line]
    has_cuda = any(name.startswith(("nvidia", "cuda")) for name in names)
    return has_cuda and (platform.system(), platform.machine()) == ("Linux", "x86_64")


def say(text):
    """Tells the user immediately."""
    sys.stderr.write("jaxfm: {}\n".format(text))
    sys.stderr.flush()


def main():
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--venv", default=os.path.join(REPOSITORY, ".venv"), metavar="FOLDER")
    parser.add_argument("--parity", action="store_true", help="also install PyTorch (CPU)")
    arguments = parser.parse_args()
    folder = os.path.abspath(arguments.venv)
    log = folder + ".log"
    try:
        check_python()
        make_environment(folder, log)
        if arguments.parity:
            add_torch(folder, log)
    except SetupError as error:
        say(str(error))
        return 1
    except (IOError, OSError) as error:
        say("Setting up failed: {}.".format(error))
        return 1
    except KeyboardInterrupt:
        say("Stopped; the next run starts over.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
