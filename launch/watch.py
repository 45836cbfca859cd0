"""A local page over run folders that follows them while they go on (`launch/report --watch`).

    /                       the runs below a folder, and pages that lie among them
    /run/NAME               the report of a run, made anew whenever its files change
    /compare?run=A&run=B    curves of several runs over one pair of axes
    /page/NAME.html         a page that a script wrote, such as the timeline of a pipe

It only reads, and only below the folder that it was given: a name that leads out of it, also over
a link, is refused. It listens to this machine alone unless told otherwise, and answers requests
for another host's name with an error, so that no page of the web can read it through a browser.
"""

from __future__ import annotations

import html
import pathlib
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

from jaxfm.launch.report import build_report
from jaxfm.log import METRICS_FILE, read_metrics
from jaxfm.report import Html, Report, heading, line_plot, paragraph, render, row, table
from jaxfm.report.sections import main_metric, metric_label

RUN_FILES = ("config.json", METRICS_FILE, "results.json")
_NO_RUNS = ("checkpoints", "tensorboard", "model", "adapter", "draft")  # folders in those of runs
_MISSING = "--watch needs Starlette and uvicorn: pip install 'jaxfm[watch]'."
_DEPTH = 4  # of run folders below the folder that is watched
_CURVES = 12  # metrics that a comparison shows
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'"
_LIVE = _POLICY + "; script-src 'self'; connect-src 'self'; form-action 'self'"

# Asks twice a second whether the files of a page have changed, and loads it anew when they have.
_SCRIPT = """
const asked = document.currentScript.dataset.state;
let first = null;
setInterval(async () => {
  const answer = await fetch(asked).catch(() => null);
  if (answer === null || !answer.ok) return;
  const now = await answer.text();
  if (first !== null && now !== first) location.reload();
  first = now;
}, 500);
"""


class Run(NamedTuple):
    """A run folder.

    Attributes:
      name: its path below the folder that is watched.
      folder: where it lies.
      changed: when one of its files last changed, seconds since 1970.
    """

    name: str
    folder: pathlib.Path
    changed: float


class Outside(Exception):
    """A name that is not one of what is watched, as a sentence."""


def runs_in(root: pathlib.Path) -> list[Run]:
    """Returns the runs at and below a folder, the one that changed last first."""
    runs = [
        Run(str(folder.relative_to(root)), folder, _changed(folder))
        for folder in _folders(root, _DEPTH)
        if _is_run(folder)
    ]
    return sorted(runs, key=lambda run: -run.changed)


def find_run(root: pathlib.Path, name: str) -> pathlib.Path:
    """Returns the folder of a run by its name.

    Raises:
      Outside: there is no such run below the folder, or one of its files lies elsewhere.
    """
    folder = _inside(root, name)
    if not _is_run(folder):
        raise Outside(f"There is no run {name!r}.")
    for file in RUN_FILES:
        if not (folder / file).resolve().is_relative_to(folder):
            raise Outside(f"{file} of the run {name!r} is a link that leads out of its folder.")
    return folder


def find_page(root: pathlib.Path, name: str) -> pathlib.Path:
    """Returns a page that a script wrote, by its name.

    Raises:
      Outside: there is no such page below the folder.
    """
    file = _inside(root, name)
    if file.suffix != ".html" or not file.is_file():
        raise Outside(f"There is no page {name!r}.")
    return file


def _inside(root: pathlib.Path, name: str) -> pathlib.Path:
    path = None if "\0" in name else (root / name).resolve()
    if path is None or not path.is_relative_to(root.resolve()):
        raise Outside(f"{name!r} does not lie in the folder that is watched.")
    return path


def _folders(folder: pathlib.Path, depth: int) -> Iterator[pathlib.Path]:
    yield folder
    if depth:
        for inner in sorted(folder.iterdir()):
            is_kept = inner.name not in _NO_RUNS and not inner.name.startswith(".")
            if is_kept and inner.is_dir() and not inner.is_symlink():
                yield from _folders(inner, depth - 1)


def _is_run(folder: pathlib.Path) -> bool:
    """Whether a folder has a run's config and something that a run wrote; models have no such."""
    is_file = [(folder / name).is_file() for name in RUN_FILES]
    return is_file[0] and any(is_file[1:])


def _changed(folder: pathlib.Path) -> float:
    files = [folder / name for name in RUN_FILES]
    return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)


def index_page(root: pathlib.Path) -> Report:
    """The list of runs, with a form that compares those that are ticked."""
    runs, now = runs_in(root), time.time()
    rows = "".join(_index_row(run, now) for run in runs)
    head = "".join(f"<th>{text}</th>" for text in ("", "run", "last step", "figure", "changed"))
    form = Html(
        '<form action="/compare"><div class="panel scroll"><table><thead><tr>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        '<p><button type="submit">Compare the runs that are ticked</button></p></form>'
    )
    pages = [
        file.relative_to(root)
        for folder in _folders(root, _DEPTH)
        for file in sorted(folder.glob("*.html"))
        if file.name != "report.html"
    ]
    links = "".join(
        f'<li><a href="/page/{quote(str(page))}">{html.escape(str(page))}</a></li>'
        for page in pages
    )
    parts = [form if runs else paragraph("There is no run here yet.")]
    if pages:
        parts += [heading("Other pages"), Html(f"<ul>{links}</ul>")]
    return Report("Runs", str(root), (*parts, _live("/state")))


def _index_row(run: Run, now: float) -> str:
    name = html.escape(run.name)
    try:
        metrics = read_metrics(run.folder)
        step = f"{metrics[-1]['step']:,}" if metrics else "–"
        figure = _last_figure(metrics)
    except ValueError as error:
        step, figure = "–", str(error)
    cells = (
        f'<input type="checkbox" name="run" value="{name}" aria-label="{name}">',
        f'<a href="/run/{quote(run.name)}">{name}</a>',
        html.escape(step), html.escape(figure), html.escape(_ago(now - run.changed)),
    )  # fmt: skip
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _last_figure(metrics: Sequence[Mapping[str, float]]) -> str:
    last = {name: value for line in metrics for name, value in line.items()}
    names = [name for name in last if name.startswith("validation/")]
    name = f"validation/{main_metric(names)}" if names else "train/loss"
    return f"{metric_label(name)} {last[name]:.4g}" if name in last else "–"


def _ago(seconds: float) -> str:
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            number = int(seconds / length)
            return f"{number} {unit}{'s' * (number > 1)} ago"
    return "just now"


def run_page(root: pathlib.Path, name: str) -> Report:
    """The report of a run as it is now; a damaged file gives its sentence.

    Raises:
      Outside: as of `find_run`.
    """
    folder = find_run(root, name)
    try:
        report = build_report(folder)
    except ValueError as error:
        report = Report("A run that cannot be shown", f"run {name}", (paragraph(str(error)),))
    return report._replace(parts=(_BACK, *report.parts, _live("/state", [name])))


def compare_page(root: pathlib.Path, names: Sequence[str]) -> Report:
    """Curves of several runs, a plot for each metric, those of validation first.

    Raises:
      Outside: as of `find_run`; or no run was chosen.
    """
    if not names:
        raise Outside("No run was ticked: go back and choose some.")
    metrics, damaged = {}, []
    for name in dict.fromkeys(names):
        try:
            metrics[name] = read_metrics(find_run(root, name))
        except ValueError as error:
            damaged.append(paragraph(str(error)))
    found = {key for lines in metrics.values() for line in lines for key in line}
    shown = sorted(found - {"step", "time_s"}, key=_rank(found))[:_CURVES]
    plots = [
        line_plot(
            {name: _curve(lines, "step", key) for name, lines in metrics.items()},
            x_label="step", y_label=metric_label(key),
        )
        for key in shown
    ]  # fmt: skip
    if "total/bytes_up" in found and shown:
        curve = lambda lines: _curve(lines, "total/bytes_up", shown[0], 1e-6)
        by_bytes = {name: curve(lines) for name, lines in metrics.items()}
        y_label = metric_label(shown[0])
        plots.insert(1, line_plot(by_bytes, x_label="MB uploaded", y_label=y_label))
    last = [[name, len(lines), _last_figure(lines)] for name, lines in metrics.items()]
    parts = [_BACK, *damaged, table(["run", "lines of metrics", "last figure"], last), row(*plots)]
    title = f"{len(metrics)} run{'s' * (len(metrics) != 1)} side by side"
    return Report(title, ", ".join(metrics), (*parts, _live("/state", names)))


def _rank(names: Collection[str]) -> Callable[[str], tuple]:
    """The order of metrics: of validation first, of the whole model before its parts'."""
    kinds = ("validation/", "personal/", "train/", "private/", "")
    main = main_metric(sorted(name for name in names if name.startswith(kinds[0])))

    def rank(name: str) -> tuple:
        kind = next(place for place, kind in enumerate(kinds) if name.startswith(kind))
        return kind, name.count("/"), not name.endswith(main), name

    return rank


def _curve(lines: Sequence[Mapping[str, float]], x: str, y: str, scale: float = 1.0):
    points = [(line[x] * scale, line[y]) for line in lines if x in line and y in line]
    return [a for a, _ in points], [b for _, b in points]


def state_of(root: pathlib.Path, names: Sequence[str]) -> str:
    """A text that differs when files of these runs, or of any run, have changed."""
    folders = [find_run(root, name) for name in names] or list(_folders(root, _DEPTH))
    files = [folder / name for folder in folders for name in RUN_FILES]
    known = [(str(file), file.stat()) for file in files if file.exists()]
    return str(hash(tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in known)))


_BACK = Html('<p><a href="/">All runs</a></p>')


def _live(path: str, names: Sequence[str] = ()) -> Html:
    query = urlencode([("run", name) for name in names])
    asked = html.escape(f"{path}?{query}")
    return Html(f'<script src="/live.js" data-state="{asked}"></script>')


def application(root: pathlib.Path, hosts: Sequence[str]) -> Any:
    """Returns the Starlette application over the runs of a folder.

    Args:
      root: the folder.
      hosts: names that it answers to; "*" for any.
    Raises:
      ImportError: Starlette is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
        from starlette.responses import HTMLResponse, PlainTextResponse, Response
        from starlette.routing import Route
    except ImportError:
        raise ImportError(_MISSING) from None

    root = root.resolve()

    def page(report: Report) -> Response:
        headers = {"content-security-policy": _LIVE, "cache-control": "no-store"}
        return HTMLResponse(render(report), headers=headers)

    def index(request) -> Response:
        return page(index_page(root))

    def run(request) -> Response:
        return page(run_page(root, request.path_params["name"]))

    def compare(request) -> Response:
        return page(compare_page(root, request.query_params.getlist("run")))

    def other(request) -> Response:
        text = find_page(root, request.path_params["name"]).read_text(errors="replace")
        return HTMLResponse(text, headers={"content-security-policy": _POLICY})

    def state(request) -> Response:
        return PlainTextResponse(state_of(root, request.query_params.getlist("run")))

    def live(request) -> Response:
        return Response(_SCRIPT, media_type="text/javascript")

    def refuse(request, error: Exception) -> Response:
        return PlainTextResponse(f"{error}\n", 404)

    routes = {
        "/": index, "/run/{name:path}": run, "/compare": compare, "/page/{name:path}": other,
        "/state": state, "/live.js": live,
    }  # fmt: skip
    return Starlette(
        routes=[Route(path, answer) for path, answer in routes.items()],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        exception_handlers={Outside: refuse},
    )


def serve(root: pathlib.Path, host: str, port: int) -> None:
    """Serves the runs of a folder until it is interrupted.

    Args:
      root: the folder.
      host: address to listen on; anybody who can reach it can read the runs.
      port: 0 for any that is free.
    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: the address cannot be had.
      ImportError: Starlette or uvicorn is not installed.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {root}; give --run_dir a folder of runs.")
    is_local = host in ("127.0.0.1", "localhost", "::1")
    app = application(root, ("127.0.0.1", "localhost", "[::1]") if is_local else ("*",))
    import uvicorn

    try:
        bound = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
    except OSError as error:
        raise ValueError(
            f"{host}:{port} cannot be listened on ({error.strerror or error}); give another --port."
        ) from None
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{bound.getsockname()[1]} shows the runs in {root}. Ctrl-C ends it.")
    if not is_local:
        print("Anybody who can reach this address can read these runs.")
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[bound])
