"""The source code of the running Python's standard library: a corpus that needs no download.

Real, some 8 MB, and naturally unequal and non-IID: one client is one top-level package or module
(`asyncio`, `email`, `typing`, ...), about 190 of them. A file's split follows from its path alone
(`jaxfm.data.text.split_of`), so patch versions of Python agree on it.

These are left out, so that all distributions and versions of Python give nearly the same corpus:
- tests (some 17 MB where installed) and installed packages;
- what distributions package separately or later versions dropped: tkinter and turtledemo, idlelib,
  lib2to3, distutils, ensurepip;
- tables rather than programs: encodings, pydoc_data, the build's own configuration.
"""

import sysconfig
from pathlib import Path

from jaxfm.data.source import Source
from jaxfm.data.text import Document, corpus, top_level
from jaxfm.tokenizer import ByteTokenizer, Tokenizer

EXCLUDED = frozenset(
    [
        *("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"),
        *("lib-dynload", "tkinter", "turtledemo", "idlelib", "lib2to3", "distutils"),
        *("ensurepip", "encodings", "pydoc_data"),
    ]
)
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")

# Small, old and stable: four clients, and each split has some.
TINY = (
    *("abc.py", "bisect.py", "email/encoders.py", "email/errors.py", "email/iterators.py"),
    *("json/decoder.py", "json/encoder.py", "json/scanner.py", "keyword.py", "secrets.py"),
)


def stdlib_documents(root: str | Path | None = None, *, tiny: bool = False) -> list[Document]:
    """Returns the files of the standard library, sorted by path.

    Args:
      root: the library's folder; by default that of the running Python.
      tiny: a few files (some 50 kB) only, for tests.
    Raises:
      FileNotFoundError: the running Python keeps its library as a zip file or without sources.
    """
    root = Path(root or sysconfig.get_path("stdlib"))
    paths = [root / name for name in TINY] if tiny else root.rglob("*.py")
    names = sorted(path.relative_to(root) for path in paths if path.is_file())
    names = [name for name in names if _wanted(name)]
    if not names:
        raise FileNotFoundError(
            f"{root} holds no Python source files (a zipped or stripped standard library?); "
            f"give the folder of another Python's as root."
        )
    return [Document(name.as_posix(), top_level(name), _read(root / name)) for name in names]


def stdlib(
    tokenizer: Tokenizer | None = None,
    *,
    length: int = 256,
    num_clients: int | None = None,
    held_out: float = 0.1,
    root: str | Path | None = None,
    tiny: bool = False,
) -> dict[str, Source]:
    """Returns the corpus as rows of tokens, bytes by default; see `jaxfm.data.corpus`."""
    documents = stdlib_documents(root, tiny=tiny)
    tokenizer = tokenizer or ByteTokenizer()
    return corpus(documents, tokenizer, length=length, num_clients=num_clients, held_out=held_out)


def _wanted(name: Path) -> bool:
    return EXCLUDED.isdisjoint(name.parts) and not name.parts[0].startswith(EXCLUDED_PREFIXES)


def _read(path: Path) -> str:
    # A few files declare another encoding; for text to learn from, replacing is good enough.
    return path.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
