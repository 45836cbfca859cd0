"""Limits of the sandbox hold, and the machine around it is unharmed."""

import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
import uuid

import pytest

from jaxfm.tasks.hpc.verifiers import sandbox
from jaxfm.tasks.hpc.verifiers.sandbox import Limits, run

pytestmark = pytest.mark.skipif(
    not sandbox.kind().isolated, reason=f"No isolation here: {sandbox.kind().reason}"
)
TIGHT = Limits(seconds=1.0, memory_bytes=200 << 20, processes=20, disk_bytes=4 << 20)


def shell(script: str, limits: Limits = TIGHT, **options) -> sandbox.Result:
    return run(["sh", "-c", script], limits=limits, **options)


def processes_named(word: str) -> list[str]:
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word in path.read_text(errors="replace"):
                found.append(str(path))
        except OSError:
            continue
    return [path for path in found if path != f"/proc/{os.getpid()}/cmdline"]


@pytest.mark.smoke
def test_what_ends_by_itself_gives_its_status_output_and_files():
    result = shell("cat in; echo problem >&2; echo left > out; exit 3", files={"in": "given\n"})
    assert result.returncode == 3 and result.reason == ""
    assert (result.stdout, result.stderr, result.files) == ("given\n", "problem\n", {})
    assert shell("echo left > out", keep=["out", "none"]).files == {"out": b"left\n"}
    assert shell("kill -11 $$").returncode == -11


def test_a_program_that_is_not_there_is_an_exit_status():
    result = run(["no-such-program"])
    assert result.returncode == 127 and "no-such-program cannot be started" in result.stderr


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("while :; do :; done", "more than 1.0 seconds"),
        ("trap '' TERM INT HUP QUIT; while :; do :; done", "more than 1.0 seconds"),
        ("sleep 100 | sleep 100", "more than 1.0 seconds"),
        ("yes", "bytes of output"),
        ("yes >&2", "bytes of output"),
        ("head -c 100G /dev/zero | tail", "bytes of memory"),
    ],
)
def test_a_limit_ends_it(script, reason):
    begin = time.monotonic()
    result = shell(script, TIGHT if "memory" not in reason else TIGHT._replace(seconds=20))
    assert reason in result.reason and result.returncode is None
    assert time.monotonic() - begin < 30
    assert len(result.stdout) <= TIGHT.output_bytes


def test_processor_time_is_limited():
    result = shell("while :; do :; done", TIGHT._replace(seconds=30, cpu_seconds=1))
    assert "1 seconds of processor time" in result.reason


def test_a_fork_bomb_stays_within_its_number_of_processes():
    mark = f"bomb{uuid.uuid4().hex}"
    result = run(["sh", "-c", "b() { b | b & }; b; sleep 9", mark], limits=TIGHT)
    assert result.returncode is not None or result.reason
    assert processes_named(mark) == []
    count = shell("for i in $(seq 40); do sleep 5 & done; ps ax | wc -l")
    assert int((count.stdout.split() or [0])[-1]) < 25


def test_nothing_outlives_the_command():
    mark = f"{uuid.uuid4().int % 10**9 + 10**6}"
    script = f"for i in 1 2 3; do (setsid nohup sleep {mark} >/dev/null 2>&1 &); done; sleep 0.1"
    assert shell(script).returncode == 0
    assert processes_named(mark) == []


def test_zombies_are_collected():
    count = shell("for i in $(seq 60); do (sh -c : &); sleep 0.005; done; ps ax | wc -l")
    assert count.returncode == 0 and int(count.stdout) < 15


def test_nothing_outside_the_folder_is_written_or_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    tmp_path.chmod(0o777)
    (tmp_path / "here").write_text("secret")
    places = ["/", "/usr", "/etc", "/var/tmp", "/dev", "/dev/shm", "/proc", str(tmp_path)]
    name = f"mark{uuid.uuid4().hex}"
    script = "; ".join(f"echo x > {place}/{name}" for place in places)
    result = shell(f"{script}; cat {tmp_path}/here; ls ~root; env; ls -a")
    assert not any((pathlib.Path(place) / name).exists() for place in places)
    assert "secret" not in result.stdout and "SECRET_TOKEN" not in result.stdout
    assert result.stdout.split()[-2:] == [".", ".."]


def test_the_disk_is_limited():
    result = shell("for i in 1 2 3 4 5 6 7 8; do head -c 3000000 /dev/zero > f$i; done; du -sk .")
    assert int(result.stdout.split()[0]) <= 4 << 10
    assert shell("head -c 9000000 /dev/zero > f; wc -c f").stdout.split()[0] <= str(4 << 20)


@pytest.mark.skipif(not shutil.which("bash"), reason="bash opens sockets, and is missing.")
def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        result = run(["bash", "-c", f"echo hi > /dev/tcp/127.0.0.1/{port}"], limits=TIGHT)
        assert result.returncode != 0
        with pytest.raises(TimeoutError):
            server.accept()
    assert "eth" not in shell("cat /proc/net/dev").stdout


def test_no_privileges_are_to_be_had():
    result = shell(
        "grep Cap /proc/self/status; unshare -Ur true && echo got; mount -o remount,rw /"
    )
    lines = dict(line.split(":\t") for line in result.stdout.splitlines())
    assert int(lines["CapEff"], 16) == int(lines["CapPrm"], 16) == 0 and "got" not in result.stdout
    assert "remount" not in result.stdout and result.returncode != 0
    assert shell("kill -9 1; kill -9 -1; sleep 0.1; echo alive").returncode in (0, -9)


def test_a_kept_name_may_be_a_pipe_a_link_or_a_folder():
    script = "mkfifo a; ln -s /etc/passwd b; mkdir c; echo d > d"
    assert shell(script, keep=["a", "b", "c", "d"]).files == {"d": b"d\n"}


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", ""])
def test_names_of_files_are_plain(name):
    with pytest.raises(ValueError, match="have plain names"):
        run(["true"], {name: ""})


REFUSING = """
import os, sys
from jaxfm.tasks.hpc.verifiers import sandbox
sandbox.SUPERVISOR = sys.argv[1]
print(sandbox.kind())
limits = sandbox.Limits(seconds=1, isolated=False, memory_bytes=200 << 20)
for script in ("echo $HOME > f; cat f", "(setsid sleep 98765 &); while :; do :; done",
               "head -c 100G /dev/zero | tail"):
    print(sandbox.run(["sh", "-c", script], limits=limits))
try:
    sandbox.run(["true"])
except sandbox.Refused as refusal:
    print(refusal)
"""


def test_without_namespaces_it_refuses_unless_told(tmp_path):
    """A supervisor whose kernel knows no namespaces."""
    text = pathlib.Path(sandbox.SUPERVISOR).read_text()
    broken = tmp_path / "supervisor.py"
    broken.write_text(text.replace("libc.unshare(NAMESPACES)", "libc.unshare(1)"))
    done = subprocess.run(
        [sys.executable, "-c", REFUSING, str(broken)], capture_output=True, text=True, check=True
    )
    kind, inside, endless, greedy, refusal = done.stdout.splitlines()
    assert "isolated=False" in kind and "gives no namespaces" in kind
    folder = inside.split("stdout='")[1].split("\\n")[0]
    assert "jaxfm-" in folder and not os.path.exists(folder)
    assert "more than 1 seconds" in endless and "bytes of memory" in greedy
    assert refusal.startswith("This system gives no namespaces")
    assert processes_named("98765") == []
