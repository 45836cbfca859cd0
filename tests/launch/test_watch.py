"""The page over run folders: what it shows, what it refuses, and that it follows a run."""

import contextlib
import http.client
import json
import re
import shutil
import subprocess
import threading

import pytest

from jaxfm.launch import watch
from jaxfm.launch.report import ReportConfig
from jaxfm.launch.watch import (
    Outside,
    compare_page,
    find_page,
    find_run,
    index_page,
    run_page,
    runs_in,
)
from jaxfm.report import render


def make_run(folder, losses=(3.0, 2.0, 1.0), **config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"rounds": 9} | config))
    lines = [
        {"step": n, "time_s": 1.0, "validation/loss": loss, "total/bytes_up": 1e6 * n}
        for n, loss in enumerate(losses)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def root(tmp_path):
    """Two runs, one of them deeper; a model, which is no run; a page; and a run outside."""
    make_run(tmp_path / "runs" / "one")
    make_run(tmp_path / "runs" / "pair" / "two & <b>", losses=(5.0, 4.5))
    (tmp_path / "runs" / "one" / "model").mkdir()
    (tmp_path / "runs" / "one" / "model" / "config.json").write_text("{}")
    (tmp_path / "runs" / "timeline.html").write_text("<p>a pipe</p>")
    make_run(tmp_path / "outside", secret="never shown")
    (tmp_path / "outside.html").write_text("never shown")
    return tmp_path / "runs"


def test_runs_are_found_and_models_are_none(root):
    assert {run.name for run in runs_in(root)} == {"one", "pair/two & <b>"}
    page = render(index_page(root))
    assert "validation/loss 1" in page and "/page/timeline.html" in page
    assert "<b>" not in page and "two &amp; &lt;b&gt;" in page
    assert "/run/pair/two%20%26%20%3Cb%3E" in page


def test_a_run_may_be_what_is_watched(root):
    assert [run.name for run in runs_in(root / "one")] == ["."]
    assert "validation loss" in render(run_page(root / "one", "."))


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc", "one/../../outside", "no such", "one/model", "pair", "", "a\0b"],
)
def test_what_is_no_run_below_the_folder_is_refused(name, root):
    with pytest.raises(Outside, match=r"does not lie in the folder|There is no run"):
        find_run(root, name)
    with pytest.raises(Outside, match=r"does not lie in the folder|There is no page"):
        find_page(root, f"{name}.html")


def test_links_out_of_the_folder_are_refused(root):
    """No report shows the file of another run."""
    (root / "linked").symlink_to(root.parent / "outside")
    with pytest.raises(Outside, match="does not lie in the folder"):
        find_run(root, "linked")
    (root / "one" / "results.json").symlink_to(root / "pair" / "two & <b>" / "metrics.jsonl")
    with pytest.raises(Outside, match=r"results\.json of the run 'one' is a link"):
        run_page(root, "one")
    (root / "page.html").symlink_to(root.parent / "outside.html")
    with pytest.raises(Outside, match="does not lie in the folder"):
        find_page(root, "page.html")
    assert "linked" not in {run.name for run in runs_in(root)}


def test_runs_side_by_side_have_a_curve_each(root):
    page = render(compare_page(root, ["one", "pair/two & <b>", "one"]))
    assert "2 runs side by side" in page and "MB uploaded" in page
    assert page.count('class="series') % 2 == 0
    with pytest.raises(Outside, match="No run was ticked"):
        compare_page(root, [])


def test_a_damaged_run_says_so_and_hides_no_other(root):
    (root / "one" / "metrics.jsonl").write_text("{}\n")
    sentence = "Line 1 of"
    assert sentence in render(index_page(root)) and sentence in render(run_page(root, "one"))
    page = render(compare_page(root, ["one", "pair/two & <b>"]))
    assert sentence in page and "1 run side by side" in page


def test_settings_that_change_nothing_are_refused():
    with pytest.raises(ValueError, match=r"port=80 changes nothing without --watch\."):
        ReportConfig(port=80)
    with pytest.raises(ValueError, match=r"port=-1 must be in 0\.\.65535\."):
        ReportConfig(watch=True, port=-1)


@pytest.fixture
def served(root):
    """The root, and the port of a server over it."""
    pytest.importorskip("starlette")
    uvicorn = pytest.importorskip("uvicorn")
    app = watch.application(root, ("127.0.0.1", "localhost"))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    yield root, server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def ask(port, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", path, headers=headers)
    with contextlib.closing(connection), connection.getresponse() as answer:
        return answer.status, answer.read().decode(), answer.headers


def test_the_server_answers_and_refuses(served):
    _, port = served
    status, page, headers = ask(port, "/run/one")
    assert status == 200 and "validation loss" in page
    assert "script-src 'self'" in headers["content-security-policy"]
    assert ask(port, "/page/timeline.html")[1] == "<p>a pipe</p>"
    assert ask(port, "/compare?run=one&run=pair/two%20%26%20%3Cb%3E")[0] == 200
    for path in ("/run/../outside", "/run/%2e%2e/outside", "/page/..%2Foutside.html", "/run/x%00"):
        status, text, _ = ask(port, path)
        assert status == 404 and "never shown" not in text, path
    assert ask(port, "/", Host="evil.example")[0] == 400  # a name that leads here through the web


def test_a_page_changes_state_when_its_run_goes_on(served):
    root, port = served
    _, page, _ = ask(port, "/run/one")
    state = re.search(r'data-state="([^"]+)"', page)[1]
    before = ask(port, state)[1]
    assert ask(port, state)[1] == before
    with (root / "one" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "time_s": 1.0, "validation/loss": 0.5}) + "\n")
    assert ask(port, state)[1] != before
    assert "0.5" in ask(port, "/")[1]


def test_a_browser_shows_the_page(served, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("There is no Chromium here.")
    _, port = served
    picture = tmp_path / "page.png"
    profile = f"--user-data-dir={tmp_path}"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", profile]
    url = f"http://127.0.0.1:{port}/run/one"
    taken = subprocess.run(
        [*command, f"--screenshot={picture}", url], capture_output=True, timeout=120
    )
    assert taken.returncode == 0 and picture.read_bytes().startswith(b"\x89PNG")
    dump = [*command, "--dump-dom", url]
    shown = subprocess.run(dump, capture_output=True, timeout=120, text=True)
    assert "<svg" in shown.stdout and "Refused" not in shown.stderr  # by the content policy


def test_an_address_that_is_taken_is_named(served):
    root, port = served
    with pytest.raises(ValueError, match=f"127.0.0.1:{port} cannot be listened on"):
        watch.serve(root, "127.0.0.1", port)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        watch.serve(root / "none", "127.0.0.1", 0)
