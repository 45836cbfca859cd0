"""Clients that read data of their own, which neither the server nor anybody else has."""

import contextlib
import csv
import json

import chex
import numpy as np
import pytest
from programs import compiled_once  # noqa: F401  # a fixture of all tests here

from jaxfm import config as configs
from jaxfm import federated
from jaxfm.data.federation import federate
from jaxfm.federated.remote.in_process import in_process
from jaxfm.federated.remote.run import serve
from jaxfm.federated.remote.site import prepare_site
from jaxfm.launch.federate import ready
from jaxfm.launch.flower.app import FORM, dealt_client, read_flags, write_app
from jaxfm.launch.flower.join import JoinConfig, OwnDataConfig, joined
from jaxfm.launch.flower.own_data import (
    client_of_node,
    form_of,
    read_rows,
    rows_of_clients,
    server_data,
)
from jaxfm.launch.flower.processes import free_port
from jaxfm.launch.flower.serve import ServeConfig, listening, make_app, submit
from jaxfm.parallel.mesh import make_mesh

NAMES = ("ant", "bee", "cat")
ROWS = 24  # of each client
FLAGS = [
    *("--data.num_clients=3", "--cohort_size=3", "--rounds=2", "--local=sgd", "--model=mlp"),
    *("--max_steps=2", "--data.standardize=true", "--data.label=kind", "--eval_every=2"),
]


def rows(seed, size=ROWS):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, size)
    return np.eye(3)[label] + rng.normal(size=(size, 3)), [NAMES[i] for i in label]


def write_csv(path, seed, size=ROWS, *, names=("a", "b", "c", "kind"), labels=None):
    points, own = rows(seed, size)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([*p, name] for p, name in zip(points.tolist(), labels or own))
    return path


def config_of(folder, *words, algorithm="fed_avg"):
    write_csv(folder / "server.csv", 0, 40)
    source = f"--data.source={folder / 'server.csv'}"
    return read_flags([f"--algorithm={algorithm}", source, *FLAGS, *words])


def node(folder, number, source, **more):
    """The file that `join` writes for a client."""
    path = folder / f"node_{number}.json"
    configs.save(OwnDataConfig(str(source), **more), path)
    return path


def play(folder, config, own_rows, files):
    """The served run, and the server's own view of its data."""
    form, data = server_data(config, own_rows)
    form = form_of(form.to_json())

    def prepare(where, order):
        client = client_of_node(form, config, own_rows, files[order["client"]], order["client"])
        prepare_site(where, client, order["bucket"])

    _, _, prepared = ready(config, data)
    exchange = in_process(folder / "clients", prepare)
    return serve(
        prepared, data, exchange, num_rounds=2, cohort_size=3, seed=0, eval_every=2
    ), data  # fmt: skip


@pytest.mark.parametrize("algorithm", ["fed_avg", "scaffold"])
def test_clients_with_files_of_their_own_train_as_if_their_rows_were_dealt_out(tmp_path, algorithm):
    config = config_of(tmp_path, algorithm=algorithm)
    sizes = (ROWS,) * 3
    files = [node(tmp_path, i, write_csv(tmp_path / f"{i}.csv", i + 1)) for i in range(3)]
    found, data = play(tmp_path, config, sizes, files)
    assert found.refused == [] and found.totals["reported"] == 6
    points = np.concatenate([rows(i + 1)[0] for i in range(3)]).astype(np.float32)
    label = np.array([NAMES.index(name) for i in range(3) for name in rows(i + 1)[1]], np.int32)
    joined = {"features": data.scale.apply(points), "label": label}
    parts = [np.arange(ROWS, dtype=np.int32) + ROWS * i for i in range(3)]
    dealt = data._replace(train=federate(joined, parts))
    _, _, prepared = ready(config, dealt)
    expected = federated.train(
        prepared, dealt, num_rounds=2, cohort_size=3, seed=0, eval_every=2,
        mesh=make_mesh(clients=1),
    )  # fmt: skip
    chex.assert_trees_all_close(
        found.state.server.variables, expected.state.server.variables, rtol=1e-5, atol=1e-6
    )
    assert found.test["accuracy"] == pytest.approx(expected.test["global/accuracy"])


def test_the_server_has_no_rows_of_clients_and_the_app_none_of_the_server(tmp_path):
    config = config_of(tmp_path)
    form, data = server_data(config, (ROWS,))
    assert not data.train.examples["features"].any()
    assert [int(n) for n in data.train.count] == [ROWS] * 3
    assert len(data.validation["label"]) + len(data.test["label"]) == 40
    words = [f"--data.source={tmp_path / 'server.csv'}", *FLAGS]
    app = tmp_path / "app"
    limits = {"round_s": 1.0, "hello_s": 2.0, "nodes": 3}
    write_app(app, words, limits, (ROWS,))
    (path,) = app.glob(f"*/{FORM}")
    assert path.read_text() == form.to_json() == form_of(form.to_json()).to_json()
    write_app(app, words, limits)
    assert not [*app.glob(f"*/{FORM}")]


OTHERS = {
    "label": ({"labels": ["leopard"] * ROWS}, {}, "the label 'leopard' is none of 'ant', 'bee'"),
    "columns": ({"names": ("a", "b", "z", "kind")}, {}, "features='c' is not a column"),
    "more": ({}, {"features": ("a", "b")}, "2 columns of numbers, where the scale"),
    "rows": ({"size": ROWS + 1}, {}, f"has {ROWS + 1} training rows, where the server's"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_client_whose_data_do_not_fit_says_why_at_home_and_the_round_goes_on(
    tmp_path, capsys, case
):
    how, more, sentence = OTHERS[case]
    config = config_of(tmp_path)
    files = [node(tmp_path, i, write_csv(tmp_path / f"{i}.csv", i + 1)) for i in range(2)]
    files.append(node(tmp_path, 2, write_csv(tmp_path / "2.csv", 3, **how), **more))
    found, _ = play(tmp_path, config, (ROWS,), files)
    assert found.totals["reported"] == 4
    assert {(one.client, one.reason) for _, one in found.refused} == {
        (2, "It failed: Its own data do not fit the run; its log says why.")
    }
    assert sentence in capsys.readouterr().err


def test_columns_of_other_names_and_other_files_are_read_by_flags(tmp_path):
    config = config_of(tmp_path)
    form, _ = server_data(config, (ROWS,))
    points, labels = rows(1)
    renamed = write_csv(tmp_path / "x.csv", 1, names=("kind", "y", "x", "disease"))
    expected = read_rows(form, config, OwnDataConfig(str(write_csv(tmp_path / "0.csv", 1))))
    assert expected["label"].tolist() == [NAMES.index(name) for name in labels]
    lines = [dict(zip("abc", p)) | {"kind": n} for p, n in zip(points.tolist(), labels)]
    (tmp_path / "0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    np.savez(tmp_path / "0.npz", x=points, y=np.array(labels))
    for own in (
        OwnDataConfig(str(renamed), label="disease", features=("kind", "y", "x")),
        OwnDataConfig(str(tmp_path / "0.jsonl")),
        OwnDataConfig(str(tmp_path / "0.npz"), label="y", features=("x",)),
    ):
        chex.assert_trees_all_close(read_rows(form, config, own), expected)


def test_texts_are_as_long_as_the_servers_whatever_a_client_has(tmp_path):
    texts = lambda n: [
        {"text": NAMES[i % 3] * (1 + i % n), "label": NAMES[i % 3]} for i in range(30)
    ]
    for name, longest in (("server", 2), ("own", 9)):
        lines = [json.dumps(line) + "\n" for line in texts(longest)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    config = read_flags([f"--data.source={tmp_path / 'server.jsonl'}", "--data.length=16"])
    form, data = server_data(config, (30,))
    found = read_rows(form, config, OwnDataConfig(str(tmp_path / "own.jsonl")))
    assert found["tokens"].shape == (30, 16) and data.test["tokens"].shape[1] == 16
    assert found["mask"].sum(1).max() == 16 and found["mask"].sum(1).min() < 8


def test_what_cannot_be_is_told_before_a_run(tmp_path):
    config = config_of(tmp_path)
    assert rows_of_clients(config, (7,)) == [7, 7, 7]
    with pytest.raises(ValueError, match=r"own_rows=1,2: give a number of rows for all clients"):
        rows_of_clients(config, (1, 2))
    with pytest.raises(ValueError, match="scaffold needs the number of rows of each client"):
        rows_of_clients(config_of(tmp_path, algorithm="scaffold"), (7,))
    with pytest.raises(ValueError, match="leave out --data"):
        rows_of_clients(config_of(tmp_path, "--data.partition=iid"), (7,))
    nowhere = JoinConfig(folder=str(tmp_path), data=OwnDataConfig("nowhere.csv"))
    with pytest.raises(ValueError, match="there is no such file or folder"), joined(nowhere):
        pass
    with pytest.raises(ValueError, match=r"data\.source is missing"):
        OwnDataConfig(label="kind")
    with pytest.raises(ValueError, match="is one client's"):
        JoinConfig(numbers=(0, 1), data=OwnDataConfig(str(tmp_path / "server.csv")))
    with pytest.raises(ValueError, match="served without --own_rows"):
        dealt_client(config, "data.json", 0)


@pytest.mark.slow
def test_real_nodes_read_their_own_files(tmp_path):
    """Two SuperNodes with files that fit and one without; the server's log has no cell of it."""
    pytest.importorskip("flwr")
    write_csv(tmp_path / "server.csv", 0, 40)
    port = free_port()
    config = ServeConfig(folder=str(tmp_path / "srv"), port=port, clients=3, own_rows=(ROWS,))
    words = [f"--data.source={tmp_path / 'server.csv'}", f"--run_dir={tmp_path / 'run'}", *FLAGS]
    app = make_app(config, words)
    with listening(config) as home, contextlib.ExitStack() as stack:
        for i in range(3):
            labels = ["leopard"] * ROWS if i == 2 else None
            own = OwnDataConfig(str(write_csv(tmp_path / f"{i}.csv", i + 1, labels=labels)))
            folder = str(tmp_path / "clients")
            stack.enter_context(joined(JoinConfig((i,), f"127.0.0.1:{port}", folder, data=own)))
        assert submit(home, app) == 0
    found = json.loads((tmp_path / "run" / "results.json").read_text())["flower"]
    assert found["totals"]["reported"] == 4 and {one["client"] for one in found["refused"]} == {2}
    assert all("its log says why" in one["reason"] for one in found["refused"])
    log = (tmp_path / "clients" / "node_2" / "supernode.log").read_text()
    assert "the label 'leopard' is none of 'ant', 'bee', 'cat'" in log
    kept = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    kept += [*(tmp_path / "srv").rglob("*.log")]
    assert not any(b"leopard" in path.read_bytes() for path in kept)
