"""The commands of real clients: apps, keys, and runs of Flower's own processes."""

import contextlib
import datetime
import importlib.util
import os
import pathlib
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import tomllib

import chex
import pytest

from jaxfm import federated
from jaxfm.federated.remote.standalone import load_arrays
from jaxfm.federated.remote.trees import flat
from jaxfm.launch.flower import commands
from jaxfm.launch.flower.app import VARIABLES, read_flags, write_app
from jaxfm.launch.flower.join import JoinConfig, joined
from jaxfm.launch.flower.keys import make_keys
from jaxfm.launch.flower.processes import environment, free_port
from jaxfm.launch.flower.serve import ServeConfig, listening, make_app, submit
from jaxfm.parallel.mesh import make_mesh

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)
needs_flower = pytest.mark.skipif(
    importlib.util.find_spec("flwr") is None,
    reason="flwr is not installed: pip install 'jaxfm[flower]'",
)
FLAGS = [
    *("--data=digits", "--data.num_clients=4", "--cohort_size=3", "--rounds=3", "--local=sgd"),
    *("--model=mlp", "--eval_every=3", "--max_steps=3"),
]


def test_the_command_line_is_split_at_two_dashes():
    assert commands.split(["serve", "--port=1", "--", "--data=digits"]) == (
        "serve", ["--port=1"], ["--data=digits"]
    )  # fmt: skip
    assert commands.split(["join"]) == ("join", [], [])
    for argv in ([], ["--", "--data=digits"]):
        with pytest.raises(ValueError, match="Give one of the commands local, serve"):
            commands.split(argv)
    with pytest.raises(ValueError, match="Did you mean serve"):
        commands.split(["serv"])


@pytest.mark.parametrize("forbidden", [False, True])
def test_what_is_compiled_for_one_message_is_there_for_the_next(tmp_path, monkeypatch, forbidden):
    """In Flower's own folder, where the environment wants no bytecode beside sources."""
    monkeypatch.setattr(sys, "dont_write_bytecode", forbidden)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1" if forbidden else "")
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", "")
    found = environment(tmp_path)
    assert found["PYTHONDONTWRITEBYTECODE"] == ""
    assert found["PYTHONPYCACHEPREFIX"] == (str(tmp_path / "pycache") if forbidden else "")


def test_an_app_carries_its_flags_and_all_that_a_client_needs(tmp_path):
    words = ["--algorithm=scaffold", "--run_dir=with space", *FLAGS]
    write_app(tmp_path, words, {"round_s": 1.0, "hello_s": 2.0, "nodes": 4})
    about = tomllib.loads((tmp_path / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert shlex.split(about["config"]["flags"]) == words
    assert read_flags(words).algorithm == "scaffold"
    carried = [*tmp_path.glob("jaxfm_app/**/*.py")]
    assert {"standalone.py", "masked.py", "texts.py"} <= {path.name for path in carried}
    library = [path.name for path in carried if "jaxfm.federated" in path.read_text()]
    assert library == []
    code = "import sys, jaxfm_app.masked; assert 'jaxfm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    with pytest.raises(ValueError, match="algorithm"):
        write_app(tmp_path, ["--algorithm=none"], {})
    with pytest.raises(ValueError, match=r"drop_rate=0\.2 is for simulations"):
        write_app(tmp_path, [*FLAGS, "--drop_rate=0.2"], {})


@pytest.mark.parametrize(
    "words, sentence",
    [
        (lambda: ServeConfig(port=0), "port=0"),
        (lambda: ServeConfig(round_s=0.0), "give seconds above 0"),
        (lambda: JoinConfig(numbers=(1, 1)), "a client is one node"),
        (lambda: JoinConfig(numbers=(-1,)), "give the numbers of clients"),
    ],
    ids=["port", "round_s", "twice", "negative"],
)
def test_wrong_settings_are_told(words, sentence):
    with pytest.raises(ValueError, match=sentence):
        words()


def certificates(folder, start=NOW - DAY, until=NOW + DAY):
    pytest.importorskip("cryptography")
    make_keys(folder, 2, (), start, until)
    return folder


def handshake(server: pathlib.Path, authority: pathlib.Path) -> str:
    """What a client that trusts an authority says of a server; empty: it is trusted."""
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(server / "server.pem", server / "server.key")
    mine = ssl.create_default_context(cafile=str(authority / "ca.pem"))
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept():
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                theirs.wrap_socket(connection, server_side=True).close()

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            with socket.create_connection(listener.getsockname()) as plain:
                mine.wrap_socket(plain, server_hostname="127.0.0.1").close()
            return ""
        except ssl.SSLCertVerificationError as error:
            return error.verify_message
        finally:
            thread.join()


def test_certificates_are_trusted_by_their_authority_alone_and_while_they_are_valid(tmp_path):
    ours = certificates(tmp_path / "ours")
    others = certificates(tmp_path / "others")
    old = certificates(tmp_path / "old", NOW - 3 * DAY, NOW - DAY)
    assert handshake(ours, ours) == ""
    assert "unable to get local issuer" in handshake(ours, others) or "signature" in handshake(
        ours, others
    )
    assert handshake(old, old) == "certificate has expired"


def test_keys_are_private_and_made_once(tmp_path):
    folder = certificates(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {path.name for path in folder.iterdir() if path.stat().st_mode & 0o077 == 0} == {
        "ca.key", "server.key", "client-0.key", "client-1.key",
    }  # fmt: skip
    made = make_keys(folder, 3, (), NOW - DAY, NOW + DAY)
    assert {path.name for path in made} == {"client-2.key", "client-2.pub"}
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    (folder / "server.pem").unlink()
    with pytest.raises(ValueError, match=r"lacks server\.pem: remove ca\.pem"):
        make_keys(folder, 3, (), NOW - DAY, NOW + DAY)


def simulated(words):
    """The trained variables of the same run in one process."""
    from jaxfm.launch.federate import ready

    config = read_flags(words)
    data, _, prepared = ready(config)
    result = federated.train(
        prepared, data, num_rounds=config.rounds, cohort_size=config.cohort_size,
        seed=config.seed, eval_every=config.rounds, mesh=make_mesh(clients=1),
    )  # fmt: skip
    return flat("variables", result.state.server.variables)


STARTER = """
import dataclasses, pathlib, sys, time, types
from jaxfm.launch.flower import commands, processes

@dataclasses.dataclass(frozen=True)
class Config:
    pass

def main(config):
    words = ["python", "-c", "import time; time.sleep(600)"]
    with processes.running(words, pathlib.Path("home"), pathlib.Path("log")) as child:
        print(child.pid, flush=True)
        time.sleep(600)

processes.program = lambda name: sys.executable
module = types.ModuleType("starter")
module.CONFIG, module.main = Config, main
sys.modules["starter"], commands.COMMANDS["starter"] = module, "starter"
sys.argv = ["flower", "starter"]
commands.main()
"""


def test_a_command_that_is_asked_to_stop_ends_what_it_has_started(tmp_path):
    words = [sys.executable, "-c", STARTER]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as command:
        child = int(command.stdout.readline())
        os.kill(child, 0)  # it is there
        command.terminate()
        assert command.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


@pytest.mark.slow
@needs_flower
def test_real_processes_give_the_numbers_of_the_simulation(tmp_path):
    """A SuperLink and four SuperNodes on loopback; SCAFFOLD keeps its variates on disk."""
    port = free_port()
    serve = ServeConfig(folder=str(tmp_path / "server"), port=port, clients=4)
    join = JoinConfig((0, 1, 2, 3), f"127.0.0.1:{port}", str(tmp_path / "clients"))
    with listening(serve) as home, joined(join):
        for algorithm in ("fed_avg", "scaffold"):
            words = [f"--algorithm={algorithm}", f"--run_dir={tmp_path / algorithm}", *FLAGS]
            assert submit(home, make_app(serve, words)) == 0
            found = load_arrays(tmp_path / algorithm / VARIABLES)
            chex.assert_trees_all_close(found, simulated(words), rtol=0, atol=1e-6)


@pytest.mark.slow
@needs_flower
def test_nodes_with_a_wrong_key_or_another_authority_do_not_get_in(tmp_path):
    """Each ends by itself, and the logs say why; the server goes on."""
    ours, others = certificates(tmp_path / "ours"), certificates(tmp_path / "others")
    wrong = {"key": (ours, others), "authority": (others, ours)}
    port = free_port()
    serve = ServeConfig(folder=str(tmp_path / "server"), port=port, certificates=str(ours))
    with listening(serve), contextlib.ExitStack() as stack:
        nodes = []
        for name, (authority, keys) in wrong.items():
            folder = tmp_path / name
            folder.mkdir()
            shutil.copy(authority / "ca.pem", folder)
            shutil.copy(keys / "client-0.key", folder)
            join = JoinConfig((0,), f"127.0.0.1:{port}", str(folder), str(folder))
            nodes += stack.enter_context(joined(join))
        assert [node.wait(300) for node in nodes] == [1, 1]
    log = lambda name: (tmp_path / name / "node_0/supernode.log").read_text()
    assert "Failed to activate SuperNode" in log("key")
    assert "certificate verify failed" in log("authority")
    server = (tmp_path / "server/superlink.log").read_text()
    assert "No SuperNode found with the given public key" in server
