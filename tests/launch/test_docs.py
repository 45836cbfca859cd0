"""The pages of docs/ stay true: their code runs in order, and what they link to exists."""

import pathlib
import re

import jax
import pytest

from jaxfm.federated import registry

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
CONCEPTS = sorted((DOCS / "concepts").glob("*.md"))
PAGES = [*sorted(DOCS.glob("*.md")), *CONCEPTS, ROOT / "CONTRIBUTING.md"]
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def name(page: pathlib.Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: pathlib.Path) -> list[str]:
    """The Python blocks of a page, each shifted to its own lines, so that errors name them."""
    text = page.read_text()
    found = PYTHON.finditer(text)
    return ["\n" * text.count("\n", 0, block.start(1)) + block[1] for block in found]


# Pages that compile the most are slow tests.
LONG = {"decoding.md", "own.md"}
RUN = [pytest.param(p, marks=[pytest.mark.slow] if p.name in LONG else []) for p in CONCEPTS]


@pytest.mark.parametrize("page", RUN, ids=name)
def test_code_runs(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where pages may write
    registry.entries()  # imports the library's own; what a page registers is forgotten
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    namespace = {"__name__": page.stem}  # one for the page: its blocks build on each other
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for code in blocks(page):
            exec(compile(code, name(page), "exec"), namespace)
    assert bool(capsys.readouterr().out) == bool(blocks(page))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_exist(page):
    links = LINK.findall(FENCED.sub("", page.read_text()))
    local = [link.partition("#")[0] for link in links if "://" not in link]
    assert [link for link in local if link and not (page.parent / link).exists()] == []


def test_pages_are_found():
    assert len(CONCEPTS) > 4
    assert any(blocks(page) for page in CONCEPTS)


def test_every_benchmark_stands_in_their_table():
    folder = DOCS.parent / "benchmarks"
    listed = re.findall(r"^\| `(\w+\.py)` \|", (folder / "README.md").read_text(), re.M)
    assert sorted(listed) == sorted(path.name for path in folder.glob("*.py"))


def test_the_glossary_is_in_order():
    words = re.findall(r"^- \*\*(.+?)\*\*", (DOCS / "concepts" / "glossary.md").read_text(), re.M)
    assert words == sorted(set(words), key=str.lower)
    assert len(words) > 50
